"""compressed-tensors: every layout against the library itself, its matching, refusals and config."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match, match_targets

from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.int import Int
from llmq.grids.q4_0 import Q4_0
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Scheme


def spec_like(q: QTensor, activation: Int | None = None) -> LinearSpec:
    return LinearSpec("model.layers.0.mlp.down_proj", *q.codes.shape, Scheme(q.grid, activation))


DYNAMIC, ASYMMETRIC, STATIC = Int(8, True, "channel"), Int(8, False, "channel"), Int(8, True, "tensor")
LAYOUTS = {"group": 32, "channel": "channel", "tensor": "tensor"}


def case_of(
    bits: int, sym: bool, layout: str, activation: Int | None, q_of: Any, spec_of: Any
) -> tuple[CompressedTensors, QTensor, LinearSpec]:
    """A planned format, a random linear of 40 x 96 and its spec, scales in float32."""
    grid = Int(bits, sym, LAYOUTS[layout], scale_dtype=torch.float32)
    q, spec = q_of(grid, 40, 96), spec_of(grid, 40, 96, activation=activation)
    if activation is STATIC:
        q = replace(q, input=Params(torch.tensor([0.25]), torch.tensor([128], dtype=torch.int32)))
    form = CompressedTensors()
    form.check([spec])
    return form, q, spec


@pytest.mark.parametrize("activation", [None, DYNAMIC, STATIC], ids=["weights", "dynamic", "static"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_round_trip_and_the_library_decodes_the_same(
    bits: int,
    sym: bool,
    layout: str,
    activation: Int | None,
    q_of: Callable[..., QTensor],
    spec_of: Callable[..., LinearSpec],
    equal: Callable[..., None],
) -> None:
    form, q, spec = case_of(bits, sym, layout, activation, q_of, spec_of)
    tensors, meta = form.pack(q, spec), form.layout(spec)
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {k: (t.dtype, t.shape) for k, t in meta.items()}
    assert all(t.is_contiguous() for t in tensors.values())
    equal(form.unpack(tensors, spec), q)

    config = form.config([spec], ["lm_head"])
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    library = BaseCompressor.get_value_from_registry(config["format"])
    weight = library.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(weight, q.dequantize())

    state = {k: t for k, t in tensors.items() if k.endswith("_scale")} | {"weight": q.dequantize()}
    if not sym:
        zero = q.params.zero - 2 ** (bits - 1)
        state["weight_zero_point"] = (zero[:1, 0] if layout == "tensor" else zero).to(torch.int8)
    packed = library.compress(state, scheme)
    assert packed.keys() == tensors.keys()
    assert all(packed[k].dtype == t.dtype and torch.equal(packed[k], t) for k, t in tensors.items())


def test_input_scale_and_dtypes(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    form, q, spec = case_of(8, True, "channel", STATIC, q_of, spec_of)
    q = replace(q, params=q.params.map(lambda p: p.bfloat16() if p.is_floating_point() else p))
    tensors = form.pack(q, spec)
    assert tensors["weight_scale"].dtype == torch.bfloat16 and tensors["input_scale"].tolist() == [0.25]
    back = form.unpack(tensors, spec)
    assert back.params.scale.dtype == torch.bfloat16 and back.input.zero.tolist() == [128]
    assert form.scale_dtype(torch.bfloat16) == torch.bfloat16


def test_dequantized_by_hand(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    form, q, spec = case_of(3, False, "group", None, q_of, spec_of)
    W = form.unpack(form.pack(q, spec), spec).dequantize()
    for n, k in ((0, 0), (7, 40), (39, 95)):
        assert W[n, k] == q.params.scale[n, k // 32] * (int(q.codes[n, k]) - int(q.params.zero[n, k // 32]))


MIX = {  # leaf: scheme
    "self_attn.o_proj": (Int(8, True, "channel", scale_dtype=torch.bfloat16), DYNAMIC),
    "mlp.down_proj": (Int(8, False, 32, scale_dtype=torch.bfloat16), None),
}


def mixed(model_of: Callable[..., list[LinearSpec]]) -> list[LinearSpec]:
    def scheme(spec: LinearSpec) -> LinearSpec:
        leaf = ".".join(spec.name.split(".")[-2:])
        grid, activation = MIX.get(leaf, (spec.scheme.weight, None))
        return replace(spec, scheme=replace(spec.scheme, weight=grid, activation=activation))

    return [scheme(s) for s in model_of(Int(4, True, 32, scale_dtype=torch.bfloat16))]


def test_mixed_config_as_the_library_matches_it(model_of: Callable[..., list[LinearSpec]]) -> None:
    linears = mixed(model_of)
    skipped = [linears.pop(5).name, "lm_head"]
    form = CompressedTensors()
    form.check(linears)
    config = form.config(linears, skipped)
    assert config["format"] == "mixed-precision"
    assert [g["format"] for g in config["config_groups"].values()] == [
        "pack-quantized",
        "int-quantized",
        "pack-quantized",
    ]
    library = QuantizationConfig.model_validate(config)
    schemes = {target: group for group in library.config_groups.values() for target in group.targets}
    assert "Linear" not in schemes
    form, scheme_of = CompressedTensors.read(config)
    module = torch.nn.Linear(1, 1)
    for spec in linears:
        weights = schemes[match_targets(spec.name, module, schemes)[0]].weights
        grid = spec.scheme.weight
        assert (weights.num_bits, weights.symmetric, weights.group_size) == (
            grid.bits,
            grid.sym,
            grid.granularity.group_size,
        )
        assert scheme_of(spec.name) == spec.scheme
    for name in skipped:
        assert is_match(name, module, library.ignore) and scheme_of(name) is None
    assert form.config(linears, skipped) == config


def test_mixed_linears_are_packed_each_in_its_way(
    model_of: Callable[..., list[LinearSpec]], q_of: Callable[..., QTensor]
) -> None:
    linears = mixed(model_of)
    form = CompressedTensors()
    form.check(linears)
    for spec in linears[:7]:
        tensors = form.pack(q_of(spec.scheme.weight, spec.N, spec.K), spec)
        assert tensors.keys() == form.layout(spec).keys()


def test_uniform_config(model_of: Callable[..., list[LinearSpec]]) -> None:
    linears = model_of(Int(4, True, 32))
    config = CompressedTensors().config(linears, ["lm_head"])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    assert config == {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {"group_0": group | {"format": "pack-quantized"}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }
    inputs = CompressedTensors().config(model_of(Int(8, True, "channel"), activation=STATIC), [])["config_groups"][
        "group_0"
    ]
    assert inputs["format"] == "int-quantized" and inputs["input_activations"]["strategy"] == "tensor"
    assert inputs["weights"]["strategy"] == "channel" and inputs["weights"]["group_size"] is None


def test_a_quantized_head_is_targeted_by_name(model_of: Callable[..., list[LinearSpec]]) -> None:
    """vLLM's head is no "Linear"; the library and llmq take both spellings for the same scheme."""
    grid = Int(4, True, 32)
    linears = [*model_of(grid), LinearSpec("lm_head", 320, 64, Scheme(grid))]
    config = CompressedTensors().config(linears, [])
    targets = config["config_groups"]["group_0"]["targets"]
    assert targets == ["Linear", "lm_head"]
    _, scheme_of = CompressedTensors.read(config)
    for spec in linears:
        assert match_targets(spec.name, torch.nn.Linear(1, 1), targets)
        assert scheme_of(spec.name) == spec.scheme
    mixed_ = [*linears[:-1], LinearSpec("lm_head", 320, 64, Scheme(Int(8, True, 32)))]
    groups = CompressedTensors().config(mixed_, [])["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["Linear"], ["lm_head"]]


def test_targets_by_name_pattern_and_class(spec_of: Callable[..., LinearSpec]) -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}

    config = {
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {
            "all": group(2, "Linear"),
            "up": group(4, r"re:.*up_proj$"),
            "one": group(8, "model.layers.0.mlp.up_proj"),
        },
        "ignore": ["lm_head", r"re:.*layers\.1\."],
    }
    form, scheme_of = CompressedTensors.read(config)
    names = ["model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    schemes = [scheme_of(n) for n in names]
    assert [s.weight for s in schemes] == [Int(8, True, "channel"), Int(4, True, "channel"), Int(2, True, "channel")]
    assert scheme_of("lm_head") is None and scheme_of("model.layers.1.mlp.up_proj") is None
    targets = ["Linear", r"re:.*up_proj$", "model.layers.0.mlp.up_proj"]
    chosen = [match_targets(n, torch.nn.Linear(1, 1), targets)[0] for n in names]
    assert chosen == [targets[2], targets[1], targets[0]]

    linears = [spec_of(s.weight, name=n) for n, s in zip(names, schemes, strict=True)]
    again = form.config(linears, ["lm_head", "model.layers.1.mlp.up_proj"])
    assert again == config | {"quant_method": "compressed-tensors"}
    anew = form.config(linears, ["model.layers.3.mlp.up_proj"])  # which the pattern would quantize
    assert anew["ignore"] == ["model.layers.3.mlp.up_proj"]
    assert [g["targets"] for g in anew["config_groups"].values()] == [[n] for n in names]


def test_the_zero_points_of_tokens_are_in_the_config_alone(model_of: Callable[..., list[LinearSpec]]) -> None:
    configs = [
        CompressedTensors().config(model_of(Int(8, True, "channel"), activation=a), []) for a in (DYNAMIC, ASYMMETRIC)
    ]
    symmetric, asymmetric = (c["config_groups"]["group_0"]["input_activations"] for c in configs)
    assert symmetric | {"symmetric": False} == asymmetric and symmetric["symmetric"] is True
    QuantizationScheme(**configs[1]["config_groups"]["group_0"])  # the library takes it
    scheme = CompressedTensors.read(configs[1])[1]("model.layers.0.mlp.up_proj")
    assert scheme is not None and scheme.activation == ASYMMETRIC


def test_other_keys_are_kept(model_of: Callable[..., list[LinearSpec]]) -> None:
    config = CompressedTensors().config(model_of(Int(8, True, "channel"), activation=DYNAMIC), ["lm_head"])
    config |= {"kv_cache_scheme": {"num_bits": 8}, "version": "0.15.0"}
    group = config["config_groups"]["group_0"]
    group["weights"] |= {"observer": "mse", "group_size": -1, "actorder": "static"}
    group["input_activations"] |= {"observer": None}
    form, _ = CompressedTensors.read(copy.deepcopy(config))
    assert form.extra["kv_cache_scheme"] == {"num_bits": 8}
    assert form.config(model_of(Int(8, True, "channel"), activation=DYNAMIC), ["lm_head"]) == config
    changed = form.config(model_of(Int(4, True, 32)), ["lm_head"])["config_groups"]["group_0"]
    assert changed["weights"]["num_bits"] == 4 and changed["format"] == "pack-quantized"


@pytest.mark.parametrize(
    ("grid", "K", "activation", "message"),
    [
        (
            Int(4, True, 128),
            576,
            None,
            "K = 576; --group-size takes 32, 64, 96, 192, 288, 576 there, or leave",
        ),
        (Int(4, True, 128), 40, None, "K = 40; say --group-size channel, or leave"),
        (Q4_0(), 64, None, "compressed-tensors holds integer grids, not Q4_0; use --format gguf"),
        (Int(8, True, "channel"), 64, Int(4, True, "channel"), "activations have 8 bits in compressed-tensors, not 4"),
    ],
)
def test_refusals(grid: Any, K: int, activation: Int | None, message: str, spec_of: Callable[..., LinearSpec]) -> None:
    with pytest.raises(LlmqError, match=re.escape(message)) as e:
        CompressedTensors().check([spec_of(grid, 64, K, name="model.layers.3.mlp.down_proj", activation=activation)])
    assert str(e.value).startswith("model.layers.3.mlp.down_proj: ") and "\n" not in str(e.value)


def test_one_grid_may_be_used_with_and_without_activations(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    form, grid = CompressedTensors(), Int(8, True, "channel")
    linears = [spec_of(grid, name="a", activation=DYNAMIC), spec_of(grid, name="b")]
    form.check(linears)
    q = q_of(grid, 64, 64)
    assert "weight" in form.pack(q, linears[0]) and "weight_packed" in form.pack(q, linears[1])
    with pytest.raises(LlmqError, match="no linear"):
        form.check([])


def test_refuses_activation_order(q_of: Callable[..., QTensor]) -> None:
    q = replace(q_of(Int(4, True, 32), 32, 64), g_idx=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(LlmqError, match="gptq:desc_act=true"):
        CompressedTensors().pack(q, spec_like(q))


def test_warnings(model_of: Callable[..., list[LinearSpec]]) -> None:
    def plan(*args: Any, **kwargs: Any) -> list[str]:
        return CompressedTensors().check(model_of(*args, **kwargs))

    assert plan(Int(4, True, 32)) == plan(Int(8, True, "channel"), activation=DYNAMIC) == []
    (eight,) = plan(Int(8, True, "channel"))
    assert "8-bit weights" in eight and "not on CPUs" in eight
    (asym,) = plan(Int(4, False, 32))
    assert "CompressedTensorsConfig(dequantize=True)" in asym
    (three,) = plan(Int(3, True, 32))
    assert "weights of 3 bits on NVIDIA GPUs alone" in three
    (tensor,) = plan(Int(4, True, "tensor"))
    assert "not per tensor" in tensor
    (w8a8,) = plan(Int(8, False, "channel"), activation=DYNAMIC)
    assert "symmetric weights only" in w8a8
    zeros, sglang = plan(Int(8, True, "channel"), activation=ASYMMETRIC)
    assert "CPUs with VNNI" in zeros and "saturates" in zeros and "SGLang" in sglang
    (static,) = plan(Int(8, True, "channel"), activation=STATIC)
    assert static == sglang
    linears = model_of(Int(4, True, 32))
    linears[0] = replace(linears[0], scheme=replace(linears[0].scheme, weight=Int(8, True, 32)))
    fused, _ = CompressedTensors().check(linears)
    assert fused.startswith("model.layers.0.self_attn: q_proj, k_proj, v_proj are not quantized alike")
    beside, eight = CompressedTensors().check(mixed(model_of))[:2]
    assert "cannot load asymmetric pack-quantized weights beside another scheme" in beside and "8-bit" in eight
    assert "refuses to load" in CompressedTensors(kv="tensor", kv_dtype="int8").check(model_of(Int(4, True, 32)))[0]


BASE = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "format": "pack-quantized",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}},
}


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ((), {"format": "float-quantized"}, "format is 'float-quantized'; llmq reads pack-quantized"),
        ((), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ((), {"transform_config": {"config_groups": {}}}, "transforms"),
        (("g",), {"targets": []}, "config_groups.g lacks targets"),
        (("g",), {"weights": None}, "config_groups.g lacks targets or weight arguments"),
        (("g",), {"targets": ["Conv1d"]}, "config_groups.g targets Conv1d modules"),
        (("g",), {"targets": ["re:("]}, "not a regular expression"),
        (("g",), {"output_activations": {"num_bits": 8}}, "quantizes outputs"),
        (("g",), {"format": "marlin-24"}, "format is 'marlin-24'"),
        (("g", "weights"), {"type": "float"}, "holds float weights stored as 'pack-quantized'"),
        (("g",), {"weights": {"type": "float", "num_bits": 6}, "format": "mxfp6-pack-quantized"}, "'mxfp6-pack-quant"),
        (("g",), {"weights": {"type": "float", "num_bits": 4}, "format": "float-quantized"}, "num_bits is 4; llmq"),
        ((), {"ignore": 5}, "ignore is 5; it must be of type list"),
        ((), {"ignore": [5]}, "ignore must be a list of strings"),
        ((), {"config_groups": [1]}, "config_groups is [1]; it must be of type dict"),
        ((), {"format": 5}, "format is 5; it must be of type str"),
        ((), {"sparsity_config": "x"}, "sparsity_config is 'x'"),
        ((), {"kv_cache_scheme": 8}, "kv_cache_scheme is 8"),
        (("g",), {"targets": [5]}, "targets must be a list of strings"),
        (("g",), {"weights": "x"}, "weights is 'x'"),
        (("g",), {"input_activations": [1]}, "input_activations is [1]"),
        (("g", "weights"), {"num_bits": 4.0}, "weights.num_bits is 4.0"),
        (("g", "weights"), {"symmetric": "no"}, "weights.symmetric is 'no'"),
        (("g", "weights"), {"strategy": ["group"]}, "weights.strategy is ['group']"),
        (("g", "weights"), {"group_size": "32"}, "group_size is '32'"),
        (("g", "weights"), {"actorder": "group"}, "weights.actorder is 'group'"),
        (("g", "weights"), {"strategy": "block"}, "weights.strategy is 'block'"),
        (("g", "weights"), {"num_bits": 1}, "weights.num_bits is 1"),
        (("g",), {"input_activations": {"num_bits": 4, "dynamic": True}}, "input_activations.num_bits is 4"),
        (("g",), {"input_activations": {"symmetric": False, "dynamic": False}}, "input_activations.symmetric is False"),
        (
            ("g",),
            {"input_activations": {"strategy": "tensor", "dynamic": True}},
            "input_activations.strategy is 'tensor'",
        ),
        (("g",), {"input_activations": {"dynamic": True}}, "format is 'pack-quantized'; llmq reads int-quantized"),
    ],
)
def test_read_refuses(where: tuple[str, ...], change: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(BASE)
    CompressedTensors.read(config)
    target: Any = config if not where else config["config_groups"]
    for key in where:
        target = target[key]
    target |= change
    with pytest.raises(LlmqError, match=re.escape(message)) as e:
        CompressedTensors.read(config)
    assert "\n" not in str(e.value)


def test_unpack_names_the_tensor(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    form, q, spec = case_of(3, False, "group", None, q_of, spec_of)
    tensors = form.pack(q, spec)
    with pytest.raises(LlmqError, match=r"down_proj\.weight_zero_point is missing"):
        form.unpack({k: t for k, t in tensors.items() if k != "weight_zero_point"}, spec)
    ten_a_word = torch.zeros(40, 10, dtype=torch.int32)  # compressed-tensors 0.17
    with pytest.raises(LlmqError, match=r"down_proj\.weight_packed is .* packs in another way"):
        form.unpack(tensors | {"weight_packed": ten_a_word}, spec)
    with pytest.raises(LlmqError, match=r"down_proj\.weight_shape is \[96, 40\], not \[40, 96\]"):
        form.unpack(tensors | {"weight_shape": torch.tensor([96, 40])}, spec)
