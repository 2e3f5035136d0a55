"""compressed-tensors' small floats: every scheme that the library names, against the library itself, both ways."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor, Scheme

N, K = 192, 256
NAME = "model.layers.0.mlp.down_proj"
PRESETS = {  # the library's name: what llmq calls it
    "FP8": Scheme(Fp8("tensor"), Fp8("tensor")),
    "FP8_DYNAMIC": Scheme(Fp8("channel"), Fp8("channel")),
    "FP8_BLOCK": Scheme(Fp8("128x128"), Fp8(128)),
    "NVFP4": Scheme(Nvfp4(), Nvfp4()),
    "NVFP4A16": Scheme(Nvfp4()),
    "MXFP4": Scheme(Mxfp4(), Mxfp4()),
    "MXFP4A16": Scheme(Mxfp4()),
    "MXFP4XFP8": Scheme(Mxfp4(), Fp8(128)),
    "MXFP8": Scheme(Mxfp8(), Mxfp8()),
    "MXFP8A16": Scheme(Mxfp8()),
}


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of other sizes, a group of zeros, an outlier, values on ties; the last rows fill half a block."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=g) * torch.logspace(-6, 1, N)[:, None]
    W[3, 32:64], W[5, 7] = 0.0, 90.0
    W[9] = (torch.arange(K) % 29 - 14) * 0.25
    return W.to(dtype).float()


def planned(preset: str) -> tuple[CompressedTensors, LinearSpec]:
    form, spec = CompressedTensors(), LinearSpec(NAME, N, K, PRESETS[preset])
    form.check([spec])
    return form, spec


def solved(spec: LinearSpec) -> QTensor:
    q, activation = QTensor.rounded(weight(), spec.scheme.weight), spec.scheme.activation
    if not spec.scheme.static:
        return q
    divisor = torch.tensor([100.0])
    return replace(
        q, input=FloatParams(divisor) if activation == Fp8("tensor") else FloatParams(1 / divisor, None, divisor)
    )


def of_library(preset: str, W: torch.Tensor) -> tuple[QuantizationScheme, dict[str, torch.Tensor]]:
    """The scheme, and what the library stores of a float weight by min-max: its observers call `calculate_qparams`."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args, dims = scheme.weights, (1, 3) if "BLOCK" in preset else -1
    padded = torch.nn.functional.pad(W, (0, 0, 0, -N % 128))
    gathered = {
        "channel": W[:, None],
        "tensor": W.flatten(),
        "block": padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)),
    }.get(args.strategy, W.unflatten(-1, (-1, args.group_size or 1)))
    state = {"weight": W}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(W.min(), W.max())
    low, high = gathered.amin(dims), gathered.amax(dims)
    state["weight_scale"] = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))[0]
    return scheme, BaseCompressor.get_value_from_registry(_format(preset)).compress(state, scheme)


def _format(preset: str) -> str:
    form, spec = planned(preset)
    return form.config([spec], [])["format"]


def test_nothing_that_the_library_names_is_left_out() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    floats = {n for n, s in PRESET_SCHEMES.items() if s.get("weights") and s["weights"].type == "float"}
    assert floats - set(PRESETS) == {"MXFP6A16", "MXFP6A8"}  # no hardware multiplies E2M3 with anything but itself


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_as_laid_out_and_back(preset: str) -> None:
    form, spec = planned(preset)
    q = solved(spec)
    tensors, meta = form.pack(q, spec), form.layout(spec)
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {k: (t.dtype, t.shape) for k, t in meta.items()}
    assert all(t.is_contiguous() for t in tensors.values())
    back = form.unpack(tensors, spec)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    for found, given in ((back.params, q.params), (back.input, q.input)):
        if given is None:
            assert found is None
            continue
        assert found.tensors().keys() == given.tensors().keys()
        assert all(
            torch.equal(t, given.tensors()[n]) and t.dtype == given.tensors()[n].dtype
            for n, t in found.tensors().items()
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_min_max_gives_the_bytes_of_the_library_and_both_decode_them_alike(preset: str) -> None:
    form, spec = planned(preset)
    q = QTensor.rounded(weight(), spec.scheme.weight)
    ours, (scheme, theirs) = form.pack(q, spec), of_library(preset, weight())
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype and ours[name].shape == t.shape, name
        assert torch.equal(ours[name].view(torch.uint8), t.view(torch.uint8)), name
    decoded = BaseCompressor.get_value_from_registry(_format(preset)).decompress(dict(ours), scheme)["weight"]
    assert torch.equal(decoded, q.dequantize().to(decoded.dtype))


@pytest.mark.parametrize("preset", PRESETS)
def test_described_as_the_library_describes_it(preset: str) -> None:
    form, spec = planned(preset)
    config = form.config([spec], ["lm_head"])
    group = config["config_groups"]["group_0"]
    named = preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
    for key in ("weights", "input_activations"):
        want = named[key] and {k: v for k, v in named[key].items() if k != "observer"}
        assert group[key] == want, key
    QuantizationScheme(**group)
    form, scheme_of = CompressedTensors.read(copy.deepcopy(config))
    assert scheme_of(NAME) == spec.scheme and scheme_of("lm_head") is None
    assert form.config([spec], ["lm_head"]) == config


def test_groups_of_other_formats_in_one_checkpoint() -> None:
    schemes = [PRESETS["NVFP4"], PRESETS["FP8_DYNAMIC"], Scheme(Int(4, True, 32))]
    linears = [LinearSpec(f"model.layers.{i}.mlp.down_proj", N, K, s) for i, s in enumerate(schemes)]
    form = CompressedTensors()
    form.check(linears)
    config = form.config(linears, ["lm_head"])
    assert config["format"] == "mixed-precision"
    formats = [g["format"] for g in config["config_groups"].values()]
    assert formats == ["nvfp4-pack-quantized", "float-quantized", "pack-quantized"]
    _, scheme_of = CompressedTensors.read(config)
    assert [scheme_of(s.name) for s in linears] == schemes


def test_the_librarys_own_name_of_float8_weights_alone_is_kept() -> None:
    spec = LinearSpec(NAME, N, K, Scheme(Fp8("channel")))
    config = CompressedTensors().config([spec], [])
    assert config["format"] == "float-quantized"
    naive = {"format": "naive-quantized"}
    config |= naive | {"config_groups": {"group_0": config["config_groups"]["group_0"] | naive}}
    form, scheme_of = CompressedTensors.read(copy.deepcopy(config))
    assert scheme_of(NAME) == spec.scheme and form.config([spec], []) == config


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("weights", {"block_structure": [128]}, "weights.block_structure is [128], not two sizes"),
        ("weights", {"symmetric": False}, "weights.symmetric is False"),
        ("weights", {"dynamic": True}, "weights.dynamic is True"),
        ("weights", {"strategy": "attn_head"}, "weights.strategy is 'attn_head'"),
        ("input_activations", {"dynamic": False}, "input_activations.dynamic is False"),
        ("input_activations", {"type": "int"}, "input_activations.strategy is 'group'"),
    ],
)
def test_read_refuses(where: str, change: dict[str, Any], message: str) -> None:
    form, spec = planned("FP8_BLOCK")
    config = form.config([spec], [])
    config["config_groups"]["group_0"][where] |= change
    with pytest.raises(LlmqError, match=re.escape(message)):
        CompressedTensors.read(config)


def test_what_no_weight_can_have_is_refused_by_its_name() -> None:
    form, spec = planned("NVFP4")
    tensors = form.pack(solved(spec), spec)
    scales = tensors["weight_scale"].clone()
    scales.view(torch.uint8)[4, 2] = 0x7F
    damaged = {
        "weight_scale": scales,
        "weight_global_scale": torch.tensor([0.0]),
        "input_global_scale": torch.tensor([torch.inf]),
    }
    for name, t in damaged.items():
        with pytest.raises(LlmqError, match=rf"down_proj\.{name}: the scale at \[.*damaged"):
            form.unpack(tensors | {name: t}, spec)
    with pytest.raises(LlmqError, match=r"weight_scale is torch.float32 .*, not torch.float8_e4m3fn"):
        form.unpack(tensors | {"weight_scale": scales.float()}, spec)
    form, spec = planned("FP8_DYNAMIC")
    tensors = form.pack(solved(spec), spec)
    tensors["weight"].view(torch.uint8)[0, 0] = 0xFF
    with pytest.raises(LlmqError, match=r"down_proj\.weight holds NaN"):
        form.unpack(tensors, spec)


def test_refusals() -> None:
    def check(scheme: Scheme, K: int = 64) -> None:
        CompressedTensors().check([LinearSpec(NAME, 64, K, scheme)])

    with pytest.raises(LlmqError, match="no integer activations of float weights"):
        check(Scheme(Fp8("channel"), Int(8, True, "channel")))
    with pytest.raises(LlmqError, match="float8 activations of integer weights have scales per token"):
        check(Scheme(Int(4), Fp8("tensor")))
    with pytest.raises(LlmqError, match="group size 16 does not divide K = 40"):
        check(Scheme(Nvfp4()), 40)


def test_which_runtimes_take_them() -> None:
    def rows(*schemes: Scheme) -> dict[str, tuple[bool | None, str]]:
        linears = [LinearSpec(f"model.layers.{i}.mlp.down_proj", N, K, s) for i, s in enumerate(schemes)]
        return {r.runtime: (r.accepts, r.reason) for r in CompressedTensors().readers(linears)}

    found = rows(PRESETS["NVFP4"])
    assert found["TensorRT-LLM"][0] and "Blackwell" in found["vLLM"][1] and found["SGLang"][0]
    assert not rows(PRESETS["NVFP4"], PRESETS["FP8_DYNAMIC"])["TensorRT-LLM"][0]
    assert not rows(PRESETS["MXFP4"])["SGLang"][0] and rows(PRESETS["MXFP4"])["vLLM"][0]
    assert not rows(Scheme(Fp8(128)))["vLLM"][0]
    assert "one scale a tensor" in rows(PRESETS["FP8"])["vLLM"][1]
    assert not rows(Scheme(Int(4, True, 32)))["TensorRT-LLM"][0]
