"""AWQ: the interleaved nibbles, refusals, and what transformers makes of the config."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from llmq.formats.awq import AWQ
from llmq.grids.int import Int
from llmq.grids.q4_0 import Q4_0
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme


def spec_like(q: QTensor, activation: Int | None = None) -> LinearSpec:
    return LinearSpec("model.layers.0.mlp.down_proj", *q.codes.shape, Scheme(q.grid, activation))


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble, lowest first (AutoAWQ, WQLinear_GEMM.from_linear)
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("shape", [(8, 32), (64, 192), (40, 64)])
@pytest.mark.parametrize("group", [32, "channel"])
@pytest.mark.parametrize("sym", [True, False])
def test_round_trip(
    sym: bool,
    group: int | str,
    shape: tuple[int, int],
    q_of: Callable[..., QTensor],
    spec_of: Callable[..., LinearSpec],
    equal: Callable[..., None],
) -> None:
    grid = Int(4, sym, group)
    q, spec = q_of(grid, *shape), spec_of(grid, *shape)
    tensors, layout = AWQ().pack(q, spec), AWQ().layout(spec)
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {k: (t.dtype, t.shape) for k, t in layout.items()}
    assert all(t.is_contiguous() for t in tensors.values())
    equal(AWQ().unpack(tensors, spec), q)


def test_nibbles_are_where_the_definition_puts_them(q_of: Callable[..., QTensor]) -> None:
    q = q_of(Int(4, False, 32), 24, 64)
    t = AWQ().pack(q, spec_like(q))
    for k, c in ((0, 0), (13, 2), (63, 1)):
        word = t["qweight"][k, c].item() & 0xFFFFFFFF
        assert [word >> (4 * j) & 15 for j in range(8)] == [q.codes[8 * c + ORDER[j], k] for j in range(8)]
    for g, c in ((0, 0), (1, 2)):
        word = t["qzeros"][g, c].item() & 0xFFFFFFFF
        assert [word >> (4 * j) & 15 for j in range(8)] == [q.params.zero[8 * c + ORDER[j], g] for j in range(8)]
    assert torch.equal(t["scales"], q.params.scale.t())


def test_dequantized_by_hand(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    q, spec = q_of(Int(4, False, 32), 16, 64), spec_of(Int(4, False, 32), 16, 64)
    W = AWQ().unpack(AWQ().pack(q, spec), spec).dequantize()
    for n, k in ((0, 0), (5, 40), (15, 63)):
        expected = q.params.scale[n, k // 32].float() * (int(q.codes[n, k]) - int(q.params.zero[n, k // 32]))
        assert W[n, k] == expected


def test_symmetric_is_written_with_true_zeros(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    q, spec = q_of(Int(4, True, 32), 16, 64), spec_of(Int(4, True, 32), 16, 64)
    tensors = AWQ().pack(q, spec)
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    config = AWQ().config([spec], [])
    assert config["zero_point"] is True
    form, scheme_of = AWQ.read(config)
    back = form.unpack(tensors, replace(spec, scheme=scheme_of(spec.name)))
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("grid", "shape", "message"),
    [
        (Int(3, True, 32), (64, 64), "awq holds 4 bits, not 3; use --format gptq or compressed-tensors"),
        (Int(8, True, 32), (64, 64), "awq holds 4 bits, not 8; use --format gptq or compressed-tensors"),
        (Int(5, True, 32), (64, 64), "awq holds 4 bits, not 5; use --format compressed-tensors"),
        (
            Int(4, True, 128),
            (64, 576),
            "K = 576; --group-size takes 32, 64, 96, 192, 288, 576 there, or leave what does not fit float",
        ),
        (Int(4, True, 32), (60, 64), "N = 60 is no multiple of 8"),
        (Q4_0(), (64, 64), "awq holds integer grids, not Q4_0; use --format gguf"),
    ],
)
def test_refusals(grid: Any, shape: tuple[int, int], message: str, spec_of: Callable[..., LinearSpec]) -> None:
    with pytest.raises(LlmqError, match=re.escape(message)) as e:
        AWQ().check([spec_of(grid, *shape, name="model.layers.3.mlp.down_proj")])
    assert str(e.value).startswith("model.layers.3.mlp.down_proj: ") and "\n" not in str(e.value)


def test_refuses_mixes_activations_and_order(spec_of: Callable[..., LinearSpec], q_of: Callable[..., QTensor]) -> None:
    a = spec_of(Int(4, True, 32), name="a")
    with pytest.raises(LlmqError, match=r"^b: 4-bit symmetric, group size 64, but a: .*compressed-tensors$"):
        AWQ().check([a, spec_of(Int(4, True, 64), name="b")])
    with pytest.raises(LlmqError, match=r"^b: awq holds no quantized activations"):
        AWQ().check([a, spec_of(Int(4, True, 32), name="b", activation=Int(8, True, "channel"))])
    q = q_of(Int(4, True, 32), 16, 64)
    with pytest.raises(LlmqError, match="awq has no g_idx"):
        AWQ().pack(
            replace(q, g_idx=torch.zeros(64, dtype=torch.int32)),
            spec_like(replace(q, g_idx=torch.zeros(64, dtype=torch.int32))),
        )


def test_warnings(model_of: Callable[..., list[LinearSpec]], spec_of: Callable[..., LinearSpec]) -> None:
    assert AWQ().check(model_of(Int(4, False, 32))) == []
    assert len(AWQ().check([spec_of(Int(4, False, 96), 64, 192)])) == 2
    (fused,) = AWQ().check(model_of(Int(4, False, 32), skip=("gate_proj",)), ["model.layers.0.mlp.gate_proj"])
    assert "gate_proj, up_proj" in fused and "vLLM" in fused
    (head,) = AWQ().check([spec_of(Int(4, False, 32), name="lm_head")])
    assert "output head" in head


@pytest.mark.parametrize("skip", [(), ("down_proj",), ("1.mlp.up_proj",), ("0.mlp.down_proj", "o_proj")])
def test_every_reader_skips_what_was_skipped(skip: tuple[str, ...], model_of: Callable[..., list[LinearSpec]]) -> None:
    grid = Int(4, False, 32)
    linears = model_of(grid, blocks=12, skip=skip)
    quantized = [s.name for s in linears]
    skipped = [s.name for s in model_of(grid, blocks=12) if s.name not in quantized]
    config = AWQ().config(linears, [*skipped, "lm_head"])
    left, rules = config["modules_to_not_convert"], config.get("dynamic", {})
    _, scheme_of = AWQ.read(config)
    for name in [*quantized, *skipped, "lm_head"]:
        taken = name in quantized
        assert should_convert_module(name, left) is taken  # transformers
        assert (not any(key in name for key in left)) is taken  # vLLM, AutoAWQ
        assert (scheme_of(name) is not None) is taken
        if name != "lm_head":
            assert (not any(re.match(r.removeprefix("-:"), name) for r in rules)) is taken  # GPTQModel
    assert AWQ.read(config)[0].config(linears, [*skipped, "lm_head"]) == config


def test_config(model_of: Callable[..., list[LinearSpec]], spec_of: Callable[..., LinearSpec]) -> None:
    linears = model_of(Int(4, False, 32))
    assert AWQ().config(linears, ["lm_head"]) == CONFIG | {"modules_to_not_convert": ["lm_head"]}
    assert AWQ().config(model_of(Int(4, True, "channel")), [])["group_size"] == -1
    assert AWQ().config([*linears, spec_of(Int(4, False, 32), name="lm_head")], [])["lm_head"] is True


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG | {"modules_to_not_convert": None},
        CONFIG | {"modules_to_not_convert": ["lm_head"], "provider": "x"},
        CONFIG | {"zero_point": False, "lm_head": False, "desc_act": False, "format": "gemm", "pack_dtype": "int32"},
        {k: v for k, v in CONFIG.items() if k != "version"} | {"checkpoint_format": "gemm"},
    ],
)
def test_read_round_trip(config: dict[str, Any], model_of: Callable[..., list[LinearSpec]]) -> None:
    form, scheme_of = AWQ.read(config)
    grid = scheme_of("model.layers.0.mlp.up_proj").weight
    assert grid == Int(4, not config["zero_point"], 32)
    assert scheme_of("lm_head") is None
    assert form.config(model_of(grid), ["lm_head"]) == config
    changed = form.config(model_of(Int(4, grid.sym, 64), skip=("o_proj",)), ["model.layers.0.self_attn.o_proj"])
    assert changed["group_size"] == 64
    assert changed["modules_to_not_convert"] == ["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits is 8; llmq reads 4"),
        ({"version": "gemv"}, "version is 'gemv'; llmq reads gemm"),
        ({"version": "marlin"}, "version is 'marlin'"),
        ({"format": "gemv_fast"}, "format is 'gemv_fast'"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"desc_act": True}, "desc_act is True"),
        ({"group_size": "32"}, "group_size is '32'"),
        ({"dynamic": {".*": {"bits": 3}}}, "another scheme"),
    ],
)
def test_read_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=re.escape(message)):
        AWQ.read(CONFIG | change)


def test_unpack_names_the_tensor(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    grid = Int(4, False, 32)
    tensors = AWQ().pack(q_of(grid, 64, 64), spec_like(q_of(grid, 64, 64)))
    with pytest.raises(LlmqError, match=r"down_proj\.scales is missing"):
        AWQ().unpack({k: t for k, t in tensors.items() if k != "scales"}, spec_of(grid))
    with pytest.raises(LlmqError, match=r"down_proj\.qweight is torch\.int32 \[64, 8\]"):
        AWQ().unpack(tensors, spec_of(grid, 64, 128))
