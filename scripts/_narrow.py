"""A float checkpoint rewritten as its makers ship it in narrow floats: FP8, NVFP4, MXFP4, MXFP8, by the peers' code.

    fp8-block, fp8-tensor        as DeepSeek and Mistral do: float8, weight_scale_inv, by a few lines here
    fbgemm                       float8, a scale per row
    modelopt-nvfp4               by compressed-tensors, under modelopt's names
    ct-fp8-channel, ct-fp8-tensor, ct-fp8-block, ct-fp8-group, ct-nvfp4, ct-mxfp4, ct-mxfp8
                                 by compressed-tensors' compressors

Tests decode what this writes with llmq and with the peers' decoders; the fuzzer mutates it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
BLOCK = (48, 40)  # that divides neither rows nor columns of a tiny Llama
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
ARGS = {
    "ct-fp8-channel": _FLOAT8 | {"strategy": "channel"},
    "ct-fp8-tensor": _FLOAT8 | {"strategy": "tensor"},
    "ct-fp8-block": _FLOAT8 | {"strategy": "block", "block_structure": [*BLOCK]},
    "ct-fp8-group": _FLOAT8 | {"strategy": "group", "group_size": 32},
    "ct-nvfp4": _FLOAT4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    "ct-mxfp4": _FLOAT4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "ct-mxfp8": _FLOAT8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}
COMPRESSORS = {
    "ct-fp8": "float-quantized", "ct-nvfp4": "nvfp4-pack-quantized", "ct-mxfp4": "mxfp4-pack-quantized",
    "ct-mxfp8": "mxfp8-quantized",
}  # fmt: skip
KINDS = ("fp8-block", "fp8-tensor", "fbgemm", "modelopt-nvfp4", *ARGS)


def rewrite(folder: Path, kind: str, start: str = "") -> None:
    """Rewrite every linear of the blocks of a float checkpoint in one file in this kind, and say so in config.json.

    start: how the names of those begin that are rewritten.
    gpt-oss: every linear as the only expert of a fused tensor, which no model of that config has a place for.
    """
    file = folder / "model.safetensors"
    out: Tensors = {}
    for name, tensor in load_file(file).items():
        linear = name.startswith(start) and name.endswith("_proj.weight")
        if linear and kind == "gpt-oss":
            out |= {f"{name}{end}": t for end, t in gpt_oss(tensor[None])}
        elif linear:
            module = name.removesuffix(".weight")
            out |= {f"{module}.{local}": t for local, t in packed(tensor, kind).items()}
        else:
            out[name] = tensor
    save_file({n: t.contiguous() for n, t in out.items()}, file, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": config(kind)}))


def config(kind: str) -> dict[str, object]:
    """Return the `quantization_config` of a kind."""
    match kind:
        case "gpt-oss":
            return {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        case "fp8-block":
            return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
        case "fp8-tensor":
            return {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
        case "fbgemm":
            return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
        case "modelopt-nvfp4":
            return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    form = compressor_name(kind)
    group = {"targets": ["Linear"], "weights": ARGS[kind], "input_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed(W_NK: Tensor, kind: str) -> Tensors:
    """Return the tensors of a linear, by local names."""
    match kind:
        case "fp8-block":
            codes, scale = _fp8(W_NK.float(), BLOCK)
            return {"weight": codes, "weight_scale_inv": scale}
        case "fp8-tensor":
            codes, scale = _fp8(W_NK.float(), tuple(W_NK.shape))
            one = scale.reshape(()).to(torch.bfloat16)
            return {"weight": codes, "weight_scale_inv": one, "activation_scale": torch.tensor(0.5)}
        case "fbgemm":
            codes, scale = _fp8(W_NK.float(), (1, W_NK.shape[1]))
            return {"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])}
        case "modelopt-nvfp4":
            found = packed(W_NK, "ct-nvfp4")
            whole = 1 / found["weight_global_scale"].reshape(())
            scales = {"weight_scale": found["weight_scale"], "weight_scale_2": whole, "input_scale": torch.tensor(0.1)}
            return {"weight": found["weight_packed"]} | scales
    stored = compressor(kind).compress({"weight": W_NK, **_scales(W_NK, kind)}, scheme(kind))
    return {local: t for local, t in stored.items() if t is not None}


def compressor_name(kind: str) -> str:
    """Return compressed-tensors' name of a format."""
    return next(form for start, form in COMPRESSORS.items() if kind.startswith(start))


def compressor(kind: str):
    """Return compressed-tensors' compressor of a kind."""
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(compressor_name(kind))


def scheme(kind: str):
    """Return compressed-tensors' scheme of a kind."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**ARGS[kind]))


def gpt_oss(W_ENK: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the blocks and scales of experts' matrices, as gpt-oss has them: codes of the nearest MXFP4 values."""
    E, N, K = W_ENK.shape
    stored = [packed(W_NK, "ct-mxfp4") for W_NK in W_ENK]
    yield "_blocks", torch.stack([s["weight_packed"] for s in stored]).reshape(E, N, K // 32, 16)
    yield "_scales", torch.stack([s["weight_scale"] for s in stored])


def _fp8(W_NK: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return float8 codes and the scale of each block, amax / 448."""
    (N, K), (n, k) = W_NK.shape, block
    blocks = F.pad(W_NK, (0, -K % k, 0, -N % n)).unflatten(1, (-1, k)).unflatten(0, (-1, n))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(0, 1).flatten(1)[:N, :K].contiguous(), scale


def _scales(W_NK: Tensor, kind: str) -> Tensors:
    """Return what compressed-tensors' observers would find: scales by the largest value of what shares one."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme(kind).weights
    (N, K), size = W_NK.shape, args.group_size
    if args.strategy == "block":
        n, k = args.block_structure
        grouped = F.pad(W_NK, (0, -K % k, 0, -N % n)).unflatten(1, (-1, k)).unflatten(0, (-1, n))
        largest = grouped.abs().amax((1, 3))
    elif args.strategy == "tensor":
        largest = W_NK.abs().amax().reshape(1)
    else:
        largest = W_NK.unflatten(1, (-1, size or K)).abs().amax(2)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(W_NK.min(), W_NK.max()).reshape(1)
    whole = found.get("weight_global_scale")
    scale, _ = calculate_qparams(-largest, largest, args, global_scale=whole)
    return found | {"weight_scale": scale}
