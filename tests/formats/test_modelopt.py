"""ModelOpt's names: the codes of compressed-tensors, with the inverse of what divides there; NVIDIA's configs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.modelopt import ModelOpt
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import E4M3
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor, Scheme
from llmq.verify.packing import packing
from llmq.verify.report import Report

NAME, N, K = "model.layers.0.mlp.down_proj", 48, 64
ALGOS = {
    "FP8": Scheme(Fp8("tensor"), Fp8("tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(Fp8("channel"), Fp8("channel")),
    "NVFP4": Scheme(Nvfp4(), Nvfp4()),
    "W4A16_NVFP4": Scheme(Nvfp4()),
    "MXFP8": Scheme(Mxfp8(), Mxfp8()),
}


def solved(scheme: Scheme) -> tuple[QTensor, LinearSpec]:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, N)[:, None]
    q, one = QTensor.rounded(W, scheme.weight), torch.tensor([96.0])
    if scheme.static:
        q = replace(q, input=FloatParams(one) if isinstance(q.grid, Fp8) else FloatParams(1 / one, divisor=one))
    return q, LinearSpec(NAME, N, K, scheme)


@pytest.mark.parametrize("algo", ALGOS)
def test_the_same_bytes_as_compressed_tensors_under_other_names(algo: str) -> None:
    q, spec = solved(ALGOS[algo])
    ours, theirs = ModelOpt().pack(q, spec), CompressedTensors().pack(q, spec)
    meta = ModelOpt().layout(spec)
    assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in meta.items()}
    codes = theirs.get("weight_packed", theirs.get("weight"))
    assert torch.equal(ours["weight"].view(torch.uint8), codes.view(torch.uint8))
    for name in ("weight_scale", "input_scale"):
        if name in theirs:
            assert torch.equal(ours[name].flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8))
    for name, inverse in (("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")):
        if inverse in theirs:
            assert torch.equal(ours[name].reshape(1), 1 / theirs[inverse])


@pytest.mark.parametrize("algo", ALGOS)
def test_read_back_as_a_runtime_multiplies_it(algo: str) -> None:
    q, spec = solved(ALGOS[algo])
    tensors = ModelOpt().pack(q, spec)
    back = ModelOpt().unpack(tensors, spec)
    assert torch.equal(back.codes, q.codes)
    torch.testing.assert_close(back.dequantize(), q.dequantize(), rtol=3e-7, atol=0)
    if algo == "NVFP4":
        scales = E4M3.decode(tensors["weight_scale"].view(torch.uint8)) * tensors["weight_scale_2"]
        assert torch.equal(back.params.scale, scales) and back.input is not None
        assert torch.equal(back.input.scale, tensors["input_scale"].reshape(1))
    config = ModelOpt().config([spec], ["lm_head"])
    how, report = packing(config)(NAME), Report()
    values = how.values(tensors, NAME, report)
    assert report.passed and torch.equal(torch.from_numpy(values), back.dequantize())
    assert how.tensors(N, K).keys() == tensors.keys() and packing(config)("lm_head") is None


@pytest.mark.parametrize("algo", ALGOS)
def test_config_and_the_file_beside_it(algo: str) -> None:
    _, spec = solved(ALGOS[algo])
    config = ModelOpt().config([spec], ["lm_head"])
    assert config["quant_algo"] == algo and config["ignore"] == ["lm_head"] and config["quant_method"] == "modelopt"
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and ("input_activations" in group) == (algo != "W4A16_NVFP4")
    beside = ModelOpt().beside(config)
    size = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}.get(algo)
    assert beside["quantization"].get("group_size") == size
    for said in (config, {"quant_method": "modelopt"} | beside["quantization"], {"quant_method": "modelopt"} | beside):
        form, scheme_of = ModelOpt.read(copy.deepcopy(said))
        assert scheme_of(NAME) == spec.scheme and scheme_of("lm_head") is None
        assert form.config([spec], ["lm_head"]) == said


def test_mixed_precision_is_said_module_by_module() -> None:
    schemes = [ALGOS["NVFP4"], ALGOS["FP8"], ALGOS["NVFP4"]]
    linears = [LinearSpec(f"model.layers.{i}.mlp.down_proj", N, K, s) for i, s in enumerate(schemes)]
    config = ModelOpt().config(linears, ["model.layers.3.mlp.down_proj", "lm_head"])
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"][linears[0].name] == {"quant_algo": "NVFP4", "group_size": 16}
    assert [g["targets"] for g in config["config_groups"].values()] == [
        [linears[0].name, linears[2].name],
        [linears[1].name],
    ]
    _, scheme_of = ModelOpt.read(config)
    assert [scheme_of(s.name) for s in linears] == schemes and scheme_of("model.layers.3.mlp.down_proj") is None
    assert [str(packing(config)(s.name)) for s in linears] == ["nvfp4", "fp8", "nvfp4"]
    assert set(ModelOpt().beside(config)["quantization"]) >= {"quantized_layers", "exclude_modules"}


def test_what_stays_float_may_be_a_pattern() -> None:
    config = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.1.*", "*router*"]}
    scheme_of = ModelOpt.read(config)[1]
    how = packing(config | {"quant_method": "modelopt"})
    for name, packed in {NAME: True, "model.layers.1.mlp.up_proj": False, "model.layers.2.router.w": False}.items():
        assert (scheme_of(name) is not None) == (how(name) is not None) == packed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_algo": "W4A16_AWQ"}, "quant_algo is 'W4A16_AWQ'; llmq reads FP8, "),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "INT8"}}}, "quant_algo is 'INT8'"),
        ({"quant_algo": "FP8", "exclude_modules": 5}, "exclude_modules is 5"),
    ],
)
def test_read_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=message):
        ModelOpt.read(config)
    with pytest.raises(LlmqError):
        packing(config | {"quant_method": "modelopt"})


@pytest.mark.parametrize("scheme", [Scheme(Mxfp4()), Scheme(Int(4)), Scheme(Fp8("channel")), Scheme(Fp8("32x32"))])
def test_a_scheme_without_a_name_is_refused(scheme: Scheme) -> None:
    with pytest.raises(LlmqError, match="modelopt has no name for .* use --format compressed-tensors"):
        ModelOpt().check([LinearSpec(NAME, N, K, scheme)])


def test_who_reads_it() -> None:
    _, spec = solved(ALGOS["NVFP4"])
    found = {r.runtime: r.accepts for r in ModelOpt().readers([spec])}
    assert {name for name, accepts in found.items() if accepts} == {"vLLM", "SGLang", "TensorRT-LLM"}
