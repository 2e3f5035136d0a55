"""Checkpoints written by the peers: read, decoded, packed again, and compared byte for byte, configs included."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor

from llmq.checkpoint import Source
from llmq.checkpoint.dialects import METHODS
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids._microscaling import Microscaling
from llmq.grids.nvfp4 import Nvfp4
from llmq.model.pretrained import blank_model, model_config
from llmq.types import FloatParams, QTensor

GOLDEN = Path(__file__).parents[1] / "golden"
FLOATS = {
    "ct_fp8_block", "ct_fp8_dynamic", "ct_fp8_static", "ct_mixed_floats", "ct_mxfp4", "ct_mxfp8a16", "ct_nvfp4",
}  # fmt: skip
EXPECTED = FLOATS | {
    "awq_gptqmodel_w4g32",
    "awq_w4g32",
    "awq_w4g64",
    "ct_int_w8a8_dynamic",
    "ct_int_w8a8_static",
    "ct_mixed",
    "ct_pack_w3g32",
    "ct_pack_w4g32_asym",
    "ct_pack_w4g32_sym",
    "ct_pack_w8_channel_sym",
    "gptq_v1_w2g32",
    "gptq_v1_w3g32",
    "gptq_v1_w4_perchannel",
    "gptq_v1_w4g32_asym",
    "gptq_v1_w4g32_desc_act",
    "gptq_v1_w4g32_sym",
    "gptq_v1_w8g32_sym",
    "gptq_v2_w4g32_asym",
    "gptq_v2_w4g32_sym",
}
MOST_ERROR = {2: 0.65, 3: 0.28, 4: 0.15, 8: 0.01}  # |Q - W| / |W|; a wrong zero or order of codes gives 0.3 to 1.4
MOST_ERROR_FLOATS = {4: 0.15, 8: 0.03}
MOST_ERROR_AWQ = 0.3  # of weights that AWQ rescaled


@cache
def floats() -> dict[str, Tensor]:
    return load_file(GOLDEN / "float" / "model.safetensors")


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text()).get("quantization_config", {})


def quantized() -> list[str]:
    """The folders present with a `quantization_config` that llmq reads."""
    found = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))
    return [name for name in found if config_of(name).get("quant_method") in METHODS]


@cache
def opened(name: str) -> PackedCheckpoint:
    source = Source(GOLDEN / name)
    return PackedCheckpoint.open(source, blank_model(source, model_config(source)))


def test_every_golden_checkpoint_is_here() -> None:
    assert set(quantized()) >= EXPECTED


@pytest.mark.parametrize("name", quantized())
def test_rewritten_byte_for_byte(name: str) -> None:
    stored, packed = load_file(GOLDEN / name / "model.safetensors"), opened(name)
    form = packed.packing.format
    assert len(packed.linears) == 14 and stored["lm_head.weight"].is_floating_point()
    for module, linear in packed.linears.items():
        tensors = {k.removeprefix(f"{module}."): t for k, t in stored.items() if k.startswith(f"{module}.")}
        q = packed.qtensor(module)
        again = form.pack(q, linear)
        assert again.keys() == form.layout(linear).keys() and tensors.keys() == packed.stored(module).keys()
        assert again.keys() - tensors.keys() <= (form.derived if name.startswith("auto_round") else set())
        for key, t in tensors.items():
            assert again[key].dtype == t.dtype and again[key].shape == t.shape == packed.stored(module)[key].shape, key
            assert again[key].is_contiguous() and torch.equal(again[key], t), f"{module}.{key}"
        assert q.codes.dtype == torch.uint8
        assert isinstance(q.params, FloatParams) if name in FLOATS else q.params.zero.dtype == torch.int32


@pytest.mark.parametrize("name", [n for n in quantized() if not n.startswith("auto_round")])  # a dialect never written
def test_config_regenerated(name: str) -> None:
    packed = opened(name)
    assert packed.packing.format.config(list(packed.linears.values()), ["lm_head"]) == config_of(name)


@pytest.mark.parametrize("name", quantized())
def test_decoded_weights_are_near_the_float_ones(name: str) -> None:
    packed = opened(name)
    for module in packed.linears:
        q, W = packed.qtensor(module), floats()[f"{module}.weight"].float()
        error = ((q.dequantize() - W).norm() / W.norm()).item()
        most = MOST_ERROR_FLOATS if name in FLOATS else MOST_ERROR
        assert error < (MOST_ERROR_AWQ if name.startswith("awq") else most[q.grid.bits])


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_the_library_decodes_small_floats_alike(name: str) -> None:
    stored, packed = load_file(GOLDEN / name / "model.safetensors"), opened(name)
    groups = config_of(name)["config_groups"].values()
    schemes = {g["format"]: QuantizationScheme(**g) for g in groups}
    for module, linear in packed.linears.items():
        tensors = {k.removeprefix(f"{module}."): t for k, t in stored.items() if k.startswith(f"{module}.")}
        kind = CompressedTensors().config([linear], [])["format"]
        library = BaseCompressor.get_value_from_registry(kind)
        weight = library.decompress(tensors, schemes[kind])["weight"]
        assert torch.equal(weight, packed.qtensor(module).dequantize().to(weight.dtype)), module


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_min_max_of_the_same_bfloat16_weights(name: str) -> None:
    """Scales that are powers of two and their codes are the library's; others it rounds to bfloat16 on the way.

    FP8 has its scales, and codes that differ by one where the library's quotient was rounded twice; so do a few scales
    of NVFP4. What llmq rounds once is the nearer.
    """
    packed = opened(name)
    for module, linear in packed.linears.items():
        q, W = packed.qtensor(module), floats()[f"{module}.weight"].float()
        grid = linear.scheme.weight.stored_in(torch.bfloat16)
        if isinstance(grid, Nvfp4):
            grid = replace(grid, divisor=q.params.divisor[0].item())
        ours = QTensor.rounded(W, grid)
        differ = (ours.codes != q.codes).float().mean().item()
        assert differ == 0 if isinstance(grid, Microscaling) else differ < 0.06
        assert (ours.params.scale != q.params.scale).float().mean() < (0.05 if isinstance(grid, Nvfp4) else 1e-9)
        assert (ours.dequantize() - W).norm() <= (q.dequantize() - W).norm() * 1.005
