"""GPTQ: bytes against the definition, refusals, and what each reader makes of the config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.grids.q4_0 import Q4_0
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Scheme


def spec_like(q: QTensor, activation: Int | None = None) -> LinearSpec:
    return LinearSpec("model.layers.0.mlp.down_proj", *q.codes.shape, Scheme(q.grid, activation))


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}


def field_of(words: list[int], i: int, bits: int) -> int:
    """Code `i` of a row of words, by shifting one long integer."""
    string = sum((w & 0xFFFFFFFF) << (32 * r) for r, w in enumerate(words))
    return string >> (i * bits) & (2**bits - 1)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "auto"])
@pytest.mark.parametrize("group", [32, 64, "channel"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip(
    bits: int,
    sym: bool,
    group: int | str,
    checkpoint_format: str,
    q_of: Callable[..., QTensor],
    spec_of: Callable[..., LinearSpec],
    equal: Callable[..., None],
) -> None:
    form, grid = GPTQ(checkpoint_format), Int(bits, sym, group)
    q, spec = q_of(grid, 96, 192), spec_of(grid, 96, 192)
    tensors = form.pack(q, spec)
    layout = form.layout(spec)
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {k: (t.dtype, t.shape) for k, t in layout.items()}
    assert all(t.is_contiguous() for t in tensors.values())
    equal(form.unpack(tensors, spec), q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fields_are_where_the_definition_puts_them(bits: int, q_of: Callable[..., QTensor]) -> None:
    q = q_of(Int(bits, False, 32), 32, 64)
    t = GPTQ("gptq_v2").pack(q, spec_like(q))
    for n, k in ((0, 0), (5, 10), (31, 63), (7, 21)):
        assert field_of(t["qweight"][:, n].tolist(), k, bits) == q.codes[n, k]
    for n, g in ((0, 0), (10, 1), (21, 0), (31, 1)):
        assert field_of(t["qzeros"][g].tolist(), n, bits) == q.params.zero[n, g]
    assert torch.equal(t["scales"], q.params.scale.t()) and t["scales"].dtype == torch.float16
    assert t["g_idx"].tolist() == [k // 32 for k in range(64)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized_by_hand(bits: int, q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    q, spec = q_of(Int(bits, False, 32), 32, 64), spec_of(Int(bits, False, 32), 32, 64)
    W = GPTQ().unpack(GPTQ().pack(q, spec), spec).dequantize()
    for n, k in ((0, 0), (5, 40), (31, 63)):
        expected = q.params.scale[n, k // 32].float() * (int(q.codes[n, k]) - int(q.params.zero[n, k // 32]))
        assert W[n, k] == expected


@pytest.mark.parametrize(("bits", "word"), [(2, 0x55555555), (3, 0xDB6DB6DB - 2**32), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_v1_stores_zero_minus_one(bits: int, word: int, q_of: Callable[..., QTensor]) -> None:
    assert (
        GPTQ().pack(q_of(Int(bits, True, 32), 32, 32), spec_like(q_of(Int(bits, True, 32), 32, 32)))["qzeros"][0, 0]
        == word
    )


def test_v1_zero_of_zero_borrows_from_its_neighbour(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    q = q_of(Int(4, False, 32), 8, 32)
    q.params.zero[:, 0] = torch.tensor([0, 5, 1, 15, 0, 0, 3, 0])
    t = GPTQ("gptq").pack(q, spec_like(q))
    assert t["qzeros"].item() == (0x03_00_F1_50 - 0x11111111)
    spec = spec_of(Int(4, False, 32), 8, 32)
    assert torch.equal(GPTQ("gptq").unpack(t, spec).params.zero, q.params.zero)


def test_activation_order(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec], equal: Callable[..., None]
) -> None:
    grid = Int(4, True, 32)
    g_idx = (torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32).to(torch.int32)
    q = replace(q_of(grid, 32, 64), g_idx=g_idx)
    with pytest.raises(LlmqError, match="gptq:desc_act=true"):
        GPTQ().pack(q, spec_like(q))
    form, spec = GPTQ(desc_act=True), spec_of(grid, 32, 64)
    tensors = form.pack(q, spec)
    assert torch.equal(tensors["g_idx"], g_idx)
    back = form.unpack(tensors, spec)
    equal(back, q)
    scale, zero = q.params.scale[:, g_idx.long()].float(), q.params.zero[:, g_idx.long()]
    assert torch.equal(back.dequantize(), scale * (q.codes.int() - zero))
    assert form.config([spec], [])["desc_act"] is True


def test_scales_keep_the_dtype_of_the_file(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    grid = Int(4, True, 32, scale_dtype=torch.bfloat16)
    tensors = GPTQ().pack(q_of(grid, 32, 32), spec_like(q_of(grid, 32, 32)))
    assert tensors["scales"].dtype == torch.bfloat16
    assert GPTQ().unpack(tensors, spec_of(Int(4, True, 32), 32, 32)).params.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("form", "grid", "shape", "message"),
    [
        (
            GPTQ(),
            Int(4, True, 128),
            (64, 576),
            "K = 576; --group-size takes 32, 64, 96, 192, 288, 576 there, or leave",
        ),
        (GPTQ(), Int(5, True, 32), (64, 64), "not 5; use --format compressed-tensors"),
        (GPTQ(), Int(4, True, "channel"), (64, 52), "K = 52 codes of 4 bits do not fill 32-bit words"),
        (GPTQ(), Int(3, True, 32), (40, 64), "N = 40 codes of 3 bits do not fill 32-bit words"),
        (GPTQ("gptq"), Int(4, False, 32), (64, 64), "checkpoint_format=gptq_v2, awq or compressed-tensors"),
        (GPTQ(), Q4_0(), (64, 64), "gptq holds integer grids, not Q4_0; use --format gguf"),
    ],
)
def test_refusals(form: GPTQ, grid: Any, shape: tuple[int, int], message: str, spec_of: Callable[..., Any]) -> None:
    with pytest.raises(LlmqError, match=re.escape(message)) as e:
        form.check([spec_of(grid, *shape, name="model.layers.3.mlp.down_proj")])
    assert str(e.value).startswith("model.layers.3.mlp.down_proj: ") and "\n" not in str(e.value)


def test_refuses_mixes_activations_and_nothing(spec_of: Callable[..., LinearSpec]) -> None:
    a = spec_of(Int(4, True, 32), name="a")
    for other in (Int(8, True, 32), Int(4, True, 64), Int(4, False, 32), Int(4, True, "channel")):
        with pytest.raises(LlmqError, match=r"^b: .*but a: 4-bit symmetric, group size 32.*compressed-tensors$"):
            GPTQ().check([a, spec_of(other, name="b")])
    with pytest.raises(LlmqError, match=r"^b: gptq holds no quantized activations; use --format compressed-tensors$"):
        GPTQ().check([a, spec_of(Int(4, True, 32), name="b", activation=Int(8, True, "channel"))])
    with pytest.raises(LlmqError, match="no linear"):
        GPTQ().check([])


def test_warnings(model_of: Callable[..., list[LinearSpec]], spec_of: Callable[..., LinearSpec]) -> None:
    assert GPTQ().check(model_of(Int(4, True, 32))) == []
    assert GPTQ().check(model_of(Int(4, True, "channel"))) == []  # K = 64, a group that torch's product takes
    assert "fail at the first token" in GPTQ().check([spec_of(Int(4, True, "channel"), 64, 576)])[0]
    (eight,) = GPTQ().check(model_of(Int(8, True, "channel")))
    assert eight.startswith("8-bit") and "not on CPUs" in eight
    (order,) = GPTQ(desc_act=True).check(model_of(Int(4, True, 32)))
    assert order.startswith("vLLM 0.32 refuses desc_act")
    (asym,) = GPTQ().check(model_of(Int(4, False, 32)))
    assert "written as gptq_v2" in asym
    (three,) = GPTQ().check(model_of(Int(3, True, 32)))
    assert three.startswith("3-bit gptq") and "not by vLLM" in three
    keys = [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    fused = GPTQ().check(model_of(Int(4, True, 32), skip=("k_proj",)), keys)
    assert len(fused) == 1 and fused[0].startswith("model.layers.0.self_attn: q_proj, k_proj, v_proj (and 1 more)")
    parts = ("q_proj", "k_proj", "v_proj")
    whole = [f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in parts]
    assert GPTQ().check(model_of(Int(4, True, 32), skip=("down_proj", *parts)), whole) == []


def test_no_warning_of_parts_that_a_family_does_not_have(model_of: Callable[..., list[LinearSpec]]) -> None:
    ungated = model_of(Int(4, True, 32), skip=("gate_proj", "k_proj", "v_proj"))
    assert GPTQ().check(ungated, ["lm_head", "model.layers.1.mlp.router"]) == []


@pytest.mark.parametrize(
    "parts", ["q_a_proj kv_a_proj_with_mqa", "in_proj_qkv in_proj_z", "in_proj_b in_proj_a", "w1 w3"]
)
def test_a_warning_of_whatever_vllm_fuses(spec_of: Callable[..., LinearSpec], parts: str) -> None:
    one, other = (f"model.layers.0.mixer.{part}" for part in parts.split())
    (said,) = GPTQ().check([spec_of(Int(4, True, 32), name=one)], [other])
    assert said.startswith(f"model.layers.0.mixer: {', '.join(parts.split())} are not quantized alike")


def test_warns_of_group_sizes_by_reader(spec_of: Callable[..., LinearSpec]) -> None:
    (vllm,) = GPTQ().check([spec_of(Int(4, True, 16))])
    assert "group size 16 is not read by vLLM" in vllm
    assert len(GPTQ().check([spec_of(Int(4, True, 96), 64, 192)])) == 2


def test_config_of_a_new_checkpoint(model_of: Callable[..., list[LinearSpec]]) -> None:
    assert GPTQ().config(model_of(Int(4, True, 32)), ["lm_head"]) == CONFIG | {"checkpoint_format": "gptq"}
    asym = GPTQ().config(model_of(Int(2, False, "channel")), ["lm_head"])
    assert asym == CONFIG | {"bits": 2, "sym": False, "group_size": -1, "checkpoint_format": "gptq_v2"}
    assert GPTQ("gptq_v2").config(model_of(Int(4, True, 32)), [])["checkpoint_format"] == "gptq_v2"


def readers_of(config: dict[str, Any]) -> dict[str, Callable[[str], bool]]:
    """Which linears of the blocks each peer quantizes, transcribed from its source."""
    listed = [name for part in config.get("modules_in_block_to_quantize") or [] for name in part]

    def optimum(name: str) -> bool:  # GPTQQuantizer.convert_model
        return not listed or any(name.endswith(layer) for layer in listed)

    def gptqmodel(name: str) -> bool:  # create_quant_module: overrides == False
        return not any(re.match(rule.removeprefix("-:"), name) for rule in config.get("dynamic", {}))

    def vllm(name: str) -> bool:  # gptq_utils.get_linear_quant_method, is_layer_gptq_quantized
        return gptqmodel(name) and (not listed or any(layer in name for layer in listed))

    def llmq(name: str) -> bool:
        return GPTQ.read(config)[1](name) is not None

    return {"optimum": optimum, "gptqmodel": gptqmodel, "vllm": vllm, "llmq": llmq}


@pytest.mark.parametrize(
    "skip",
    [("down_proj",), ("1.mlp.up_proj",), ("0.mlp.down_proj", "self_attn.o_proj"), ("model.layers.1.mlp.up_proj",)],
)
def test_every_reader_skips_what_was_skipped(skip: tuple[str, ...], model_of: Callable[..., list[LinearSpec]]) -> None:
    grid = Int(4, True, 32)
    linears = model_of(grid, blocks=12, skip=skip)
    quantized = [s.name for s in linears]
    skipped = [s.name for s in model_of(grid, blocks=12) if s.name not in quantized]
    config = GPTQ().config(linears, [*skipped, "lm_head"])
    for reader, takes in readers_of(config).items():
        assert [n for n in quantized + skipped if takes(n)] == quantized, reader
    form, scheme_of = GPTQ.read(config)
    assert scheme_of("lm_head") is None
    assert form.config(linears, [*skipped, "lm_head"]) == config


def test_short_names_where_blocks_are_alike(model_of: Callable[..., list[LinearSpec]]) -> None:
    linears = model_of(Int(4, True, 32), skip=("down_proj",))
    config = GPTQ().config(linears, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"])
    assert config["dynamic"] == {r"-:.*\.mlp\.down_proj$": {}}
    assert len(config["modules_in_block_to_quantize"][0]) == 6


def test_quantized_head(spec_of: Callable[..., LinearSpec]) -> None:
    linears = [spec_of(Int(4, True, 32)), spec_of(Int(4, True, 32), name="lm_head")]
    assert any("output head" in w for w in GPTQ().check(linears))
    config = GPTQ().config(linears, [])
    assert config["lm_head"] is True
    assert GPTQ.read(config)[1]("lm_head") == linears[1].scheme


def test_read_keeps_what_it_does_not_interpret(model_of: Callable[..., list[LinearSpec]]) -> None:
    config = CONFIG | {"format": "gptq", "pack_dtype": "int32", "meta": {"damp_percent": 0.05}, "provider": "x"}
    form, scheme_of = GPTQ.read(config)
    assert form.extra == {"meta": {"damp_percent": 0.05}, "provider": "x"}
    assert form.config(model_of(Int(4, True, 32)), ["lm_head"]) == config
    other = form.config(model_of(Int(8, True, 64)), ["lm_head"])
    assert other == config | {"bits": 8, "group_size": 64}
    assert scheme_of("model.layers.0.mlp.up_proj").weight == Int(4, True, 32)


@pytest.mark.parametrize("listed", [[["self_attn.q_proj"], ["mlp.up_proj"]], ["self_attn.q_proj", "mlp.up_proj"]])
def test_read_only_the_listed_modules(listed: list[Any], model_of: Callable[..., list[LinearSpec]]) -> None:
    config = CONFIG | {"modules_in_block_to_quantize": listed}
    form, scheme_of = GPTQ.read(config)
    linears = model_of(Int(4, True, 32))
    kept = [s for s in linears if s.name.endswith(("q_proj", "up_proj"))]
    assert [s for s in linears if scheme_of(s.name)] == kept
    assert form.config(kept, [s.name for s in linears if s not in kept]) == config


def test_read_rules_give_way_when_they_say_something_else(model_of: Callable[..., list[LinearSpec]]) -> None:
    form, _ = GPTQ.read(CONFIG | {"dynamic": {r"-:.*down": {}}})
    grid = Int(4, True, 32)
    left = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert form.config(model_of(grid, skip=("down_proj",)), left)["dynamic"] == {r"-:.*down": {}}
    other = form.config(model_of(grid), [])
    assert not other["dynamic"] and "modules_in_block_to_quantize" not in other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits is 5; llmq reads 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": None}, "group_size is None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"is_marlin_format": True}, "is_marlin_format is set"),
        ({"rotation": "hadamard"}, "rotation is set"),
        ({"activation": {"format": "nvfp4"}}, "activation is set"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "another scheme"),
        ({"dynamic": {"-:(": {}}}, "not a regular expression"),
        ({"sym": "yes"}, "sym is 'yes'"),
    ],
)
def test_read_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=re.escape(message)) as e:
        GPTQ.read(CONFIG | change)
    assert "\n" not in str(e.value)


def test_read_without_bits() -> None:
    with pytest.raises(LlmqError, match="bits is missing"):
        GPTQ.read({"quant_method": "gptq", "group_size": 32})


def test_unpack_names_the_tensor(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    grid = Int(4, True, 32)
    tensors, spec = GPTQ().pack(q_of(grid, 64, 64), spec_like(q_of(grid, 64, 64))), spec_of(grid)
    with pytest.raises(LlmqError, match=r"model\.layers\.0\.mlp\.down_proj\.qzeros is missing"):
        GPTQ().unpack({k: t for k, t in tensors.items() if k != "qzeros"}, spec)
    with pytest.raises(LlmqError, match=r"down_proj\.qweight is torch\.int32 \[8, 32\], not torch\.int32 \[8, 64\]"):
        GPTQ().unpack(tensors | {"qweight": tensors["qweight"][:, :32]}, spec)
    with pytest.raises(LlmqError, match=r"down_proj\.g_idx is torch\.float32"):
        GPTQ().unpack(tensors | {"g_idx": tensors["g_idx"].float()}, spec)
    with pytest.raises(LlmqError, match=r"down_proj\.scales is torch\.float8_e5m2"):
        GPTQ().unpack(tensors | {"scales": tensors["scales"].to(torch.float8_e5m2)}, spec)


def test_bad_option() -> None:
    with pytest.raises(ValueError, match="checkpoint_format is auto, gptq or gptq_v2"):
        GPTQ("gptq_v3")


def test_params_of_one_group_stay_two_dimensional(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    grid = Int(8, True, "channel")
    params: Params = (
        GPTQ().unpack(GPTQ().pack(q_of(grid, 32, 64), spec_like(q_of(grid, 32, 64))), spec_of(grid, 32, 64)).params
    )
    assert params.scale.shape == params.zero.shape == (32, 1)
