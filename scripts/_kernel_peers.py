"""Other people's 4-bit kernels, where they are installed, as functions of x for scripts/bench_kernels.py.

Each entry builds a symmetric 4-bit linear with groups of 128 of its own rounding: what is compared is time, not error.
Their interfaces were read from their sources and have not been run here: a peer that refuses is named with its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
GROUP = 128


def marlin(W_NK: Tensor) -> Linear:
    """Marlin, as vLLM ships it."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    N, K = W_NK.shape
    kind = scalar_types.uint4b8
    _, words, scales, g_idx, order, _ = marlin_utils_test.marlin_quantize(W_NK.t().contiguous(), kind, GROUP, False)
    zeros = marlin_utils.marlin_make_empty_g_idx(W_NK.device)
    workspace = marlin_utils.marlin_make_workspace_new(W_NK.device)
    shared = (words, scales, zeros, g_idx, order, workspace, kind, N, K, True)
    return lambda x: marlin_utils.apply_gptq_marlin_linear(x, *shared)


def gemlite(W_NK: Tensor) -> Linear:
    """GemLite's Triton kernels."""
    from gemlite.core import DType, GemLiteLinearTriton

    N, K = W_NK.shape
    groups = W_NK.reshape(N, -1, GROUP).float()
    scale = (groups.abs().amax(-1) / 7.5).clamp(min=1e-5)
    codes = ((groups / scale[..., None]).round() + 8).clamp(0, 15).to(torch.uint8).reshape(N, K)
    linear = GemLiteLinearTriton(4, GROUP, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16)
    linear.pack(codes, scale.half().reshape(-1, 1), torch.full_like(scale.half(), 8).reshape(-1, 1), None)
    return linear


def torchao(W_NK: Tensor) -> Linear:
    """Tinygemm, as torchao ships it, which takes bf16 only: timed on x in bf16."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    N, K = W_NK.shape
    layer = torch.nn.Linear(K, N, bias=False, device=W_NK.device, dtype=torch.bfloat16)
    layer.weight.data = W_NK.bfloat16()
    model = torch.nn.Sequential(layer)
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return lambda x: model(x.bfloat16() if x.dtype != torch.bfloat16 else x)


PEERS = {"Marlin": marlin, "GemLite": gemlite, "torchao": torchao}
