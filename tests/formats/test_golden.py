"""Checkpoints written by the peers: read, decoded, packed again, and compared byte for byte, configs included."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmq import registry
from llmq.types import LinearSpec

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"awq": "awq", "gptq": "gptq", "compressed-tensors": "compressed_tensors"}  # quant_method: file
EXPECTED = {
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
MOST_ERROR_AWQ = 0.3  # of weights that AWQ rescaled


@cache
def floats() -> dict[str, Tensor]:
    return load_file(GOLDEN / "float" / "model.safetensors")


def quantized() -> list[str]:
    """The folders present whose config has a `quantization_config` that a format reads."""
    return sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if method_of(p.parent.name) in FILES)


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text()).get("quantization_config", {})


def method_of(name: str) -> str:
    return config_of(name).get("quant_method", "")


def linears_of(name: str) -> tuple[Any, list[LinearSpec], list[str]]:
    """The format, the quantized linears and the names of the others, by the float checkpoint's shapes."""
    form, scheme_of = registry.find("formats", FILES[method_of(name)]).read(copy.deepcopy(config_of(name)))
    linears, skipped = [], []
    for key, W in floats().items():
        module = key.removesuffix(".weight")
        if W.ndim != 2 or module.endswith("embed_tokens"):
            continue
        scheme = scheme_of(module, *W.shape)
        if scheme is None:
            skipped.append(module)
        else:
            linears.append(LinearSpec(module, *W.shape, scheme))
    return form, linears, skipped


def test_every_golden_checkpoint_is_here() -> None:
    assert set(quantized()) >= EXPECTED


@pytest.mark.parametrize("name", quantized())
def test_rewritten_byte_for_byte(name: str) -> None:
    stored = load_file(GOLDEN / name / "model.safetensors")
    form, linears, skipped = linears_of(name)
    assert len(linears) == 14 and skipped == ["lm_head"]
    assert stored["lm_head.weight"].is_floating_point()
    for linear in linears:
        prefix = linear.name + "."
        tensors = {k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}
        q = form.unpack(tensors, linear)
        again = form.pack(q, linear)
        assert again.keys() == tensors.keys() == form.layout(linear).keys()
        for key, t in again.items():
            assert t.dtype == tensors[key].dtype and t.shape == tensors[key].shape, key
            assert t.is_contiguous() and torch.equal(t, tensors[key]), f"{linear.name}.{key}"
        assert q.codes.dtype == torch.uint8 and q.params.zero.dtype == torch.int32


@pytest.mark.parametrize("name", quantized())
def test_config_regenerated(name: str) -> None:
    form, linears, skipped = linears_of(name)
    assert form.config(linears, skipped) == config_of(name)


@pytest.mark.parametrize("name", quantized())
def test_decoded_weights_are_near_the_float_ones(name: str) -> None:
    stored = load_file(GOLDEN / name / "model.safetensors")
    form, linears, _ = linears_of(name)
    for linear in linears:
        prefix = linear.name + "."
        q = form.unpack({k.removeprefix(prefix): t for k, t in stored.items() if k.startswith(prefix)}, linear)
        W = floats()[f"{linear.name}.weight"].float()
        error = ((q.dequantize() - W).norm() / W.norm()).item()
        assert error < (MOST_ERROR_AWQ if name.startswith("awq") else MOST_ERROR[q.grid.bits])
