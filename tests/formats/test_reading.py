"""A peer's checkpoint: what follows from the rest may be missing, what changes a weight is checked, nothing hangs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmq.formats import _reading
from llmq.formats.awq import AWQ
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.guard import patterns
from llmq.types import LinearSpec, LlmqError, Params, QTensor

NAME = "model.layers.0.mlp.down_proj"
BASE = {"bits": 4, "group_size": 32}
BOMBS = [r"(?:[a-z]|[a-z._0-9]|\w\w)+!", r"^(?:(\w)|(\w\w)|(\W|\w{3}))*[^\w.]", "(?R)", "(" * 5000, "a" * 200_000]


def readers(pattern: str) -> dict[str, Callable[[], Any]]:
    """Each key of a config that holds patterns, with one that is read and matched."""
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}
    targets = {"g": groups["g"] | {"targets": ["re:" + pattern]}}
    ct = {"format": "pack-quantized", "config_groups": groups}
    return {
        "dynamic": lambda: GPTQ.read(BASE | {"dynamic": {"-:" + pattern: {}}})[1](NAME),
        "awq dynamic": lambda: AWQ.read(BASE | {"dynamic": {"-:" + pattern: {}}})[1](NAME),
        "modules_to_not_convert": lambda: AWQ.read(BASE | {"modules_to_not_convert": [pattern]})[1](NAME),
        "ignore": lambda: CompressedTensors.read(ct | {"ignore": ["re:" + pattern]})[1](NAME),
        "targets": lambda: CompressedTensors.read(ct | {"config_groups": targets})[1](NAME),
    }


@pytest.mark.parametrize("key", readers(""))
@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_no_pattern_of_a_checkpoint_hangs(bomb: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    start = time.thread_time()
    try:
        readers(bomb)[key]()
    except LlmqError as e:
        assert str(e).startswith("quantization_config: ") and len(str(e)) < 500
    assert time.thread_time() - start < 2


def test_a_pattern_may_look_around() -> None:
    """As files of MXFP4 experts and of Quark have them; an engine without lookarounds could not read those."""
    found = _reading.Patterns({"not experts": r"^(?!.*experts).*$", "all": ".*"})
    assert found.first("model.layers.0.mlp.up_proj") == "not experts"
    assert found.first("model.layers.0.mlp.experts.1.up_proj") == "all"
    assert _reading.Patterns({"b": "b"}).first("ab") is None  # from the start


@pytest.mark.parametrize(
    ("rules", "quantized"),
    [
        ({}, True),
        ({"-:.*down": {}}, False),
        ({"-:.*down": {"bits": 8}}, False),
        ({"+:.*down": {}, "-:.*": {}}, True),  # the first that matches decides
        ({".*down": {"bits": 4, "group_size": 32}, "-:.*": {}}, True),
        ({"lm_head": {}}, True),
        ({".*": {"damp_percent": 0.1}}, True),
        ({".*": None}, True),
    ],
)
def test_rules_that_change_nothing_are_read(rules: dict[str, Any], quantized: bool) -> None:
    assert (GPTQ.read(BASE | {"dynamic": rules})[1](NAME) is not None) is quantized


MALFORMED = {
    GPTQ: [
        *({"bits": b} for b in (4.0, "4", True, [4], {}, 10**30)),
        *({"group_size": g} for g in (32.0, "32", True, [], {}, -2)),
        *({"desc_act": d} for d in (0, "false", [])),
        *({"sym": s} for s in (1, "yes")),
        *({"lm_head": s} for s in (1, "yes", ["lm_head"])),
        *({"dynamic": d} for d in (5, "x", ["-:x"], {"x": 5}, {"+:x": [1]}, {"-:[": {}})),
        *({"modules_in_block_to_quantize": m} for m in (5, "mlp", [5], [["a"], [5]], [[["a"]]], {"a": 1})),
        *({"checkpoint_format": c} for c in (5, ["gptq"], {"a": 1})),
        *({"format": c} for c in (5, ["gptq"])),
        *({"pack_dtype": c} for c in (32, ["int32"])),
    ],
    AWQ: [
        *({"bits": b} for b in (4.0, "4", True, [4])),
        *({"zero_point": z} for z in (1, "true", [])),
        *({"version": v} for v in (2, ["gemm"], {})),
        *({"modules_to_not_convert": m} for m in (5, "lm_head", [5], [["a"]], {"a": 1}, ["("])),
        *({"dynamic": d} for d in (5, ["-:x"])),
    ],
}


@pytest.mark.parametrize(
    ("form", "change"), [(f, c) for f, changes in MALFORMED.items() for c in changes], ids=lambda x: str(x)[:40]
)
def test_a_field_of_another_type_is_named(form: type, change: dict[str, Any]) -> None:
    form.read(BASE)  # type: ignore[attr-defined]
    (key,) = change
    with pytest.raises(LlmqError, match="quantization_config") as e:
        form.read(BASE | change)  # type: ignore[attr-defined]
    assert "\n" not in str(e.value)
    assert key in str(e.value) or "is not a regular expression" in str(e.value) or key == "format"


@pytest.mark.parametrize("form", MALFORMED)
def test_null_is_as_good_as_missing(form: type) -> None:
    keys = {key for change in MALFORMED[form] for key in change} - {"bits", "group_size"}
    assert form.read(BASE | dict.fromkeys(keys))[1](NAME) == form.read(BASE)[1](NAME)  # type: ignore[attr-defined]


# What is redundant


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_group_ids_may_be_missing_or_of_any_width(
    dtype: torch.dtype, q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec], equal: Callable[..., None]
) -> None:
    grid = Int(4, True, 32)
    q, spec = q_of(grid, 64, 64), spec_of(grid)
    tensors = GPTQ().pack(q, spec)
    equal(GPTQ().unpack(tensors | {"g_idx": tensors["g_idx"].to(dtype)}, spec), q)
    del tensors["g_idx"]
    equal(GPTQ().unpack(tensors, spec), q)
    with pytest.raises(LlmqError, match=r"down_proj\.g_idx is missing"):
        GPTQ(desc_act=True).unpack(tensors, spec)


def test_a_short_last_group_is_read(q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]) -> None:
    """AutoGPTQ wrote K = 80 in groups of 32 as three groups, the last of 16 columns."""
    even, spec = q_of(Int(4, True, 32), 64, 96), spec_of(Int(4, True, 32), 64, 80)
    g_idx = torch.arange(80, dtype=torch.int32) // 32
    q = QTensor(even.codes[:, :80].contiguous(), even.params, even.grid, g_idx)
    tensors = GPTQ().pack(q, spec)
    back = GPTQ().unpack({k: t for k, t in tensors.items() if k != "g_idx"}, spec)
    scale = q.params.scale.float()[:, g_idx.long()]
    assert torch.equal(back.dequantize(), scale * (q.codes.int() - 8))
    assert all(torch.equal(t, tensors[k]) for k, t in GPTQ().pack(back, spec).items())
    with pytest.raises(LlmqError, match="does not divide K"):
        GPTQ().check([spec])  # ours have none


def test_shapes_and_zero_points_may_have_any_width(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec], equal: Callable[..., None]
) -> None:
    form = CompressedTensors()
    sym = Int(4, True, 32)
    q, spec = q_of(sym, 64, 64), spec_of(sym)
    tensors = form.pack(q, spec)
    equal(form.unpack(tensors | {"weight_shape": tensors["weight_shape"].int()}, spec), q)
    equal(form.unpack({k: t for k, t in tensors.items() if k != "weight_shape"}, spec), q)
    asym = Int(8, False, "channel")
    q, spec = q_of(asym, 64, 64), spec_of(asym, activation=Int(8, True, "channel"))
    tensors = form.pack(q, spec)
    equal(form.unpack(tensors | {"weight_zero_point": tensors["weight_zero_point"].long()}, spec), q)
    whole = Int(8, True, "tensor")
    q, spec = q_of(whole, 64, 64), spec_of(whole, activation=Int(8, True, "tensor"))
    q = replace(q, input=Params(torch.tensor([0.5]), torch.tensor([128], dtype=torch.int32)))
    tensors = form.pack(q, spec)
    scalars = {k: tensors[k].reshape(()) for k in ("weight_scale", "input_scale")}
    equal(form.unpack(tensors | scalars, spec), replace(q, input=q.input))
    with pytest.raises(LlmqError, match=r"weight_packed is torch\.int64"):
        q, spec = q_of(sym, 64, 64), spec_of(sym)
        form.unpack(form.pack(q, spec) | {"weight_packed": form.pack(q, spec)["weight_packed"].long()}, spec)


def test_the_label_of_a_stage_decides_nothing() -> None:
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}
    config = {"format": "pack-quantized", "config_groups": groups}
    for label in ({}, {"quantization_status": "frozen"}, {"quantization_status": None}):
        scheme = CompressedTensors.read(config | label)[1](NAME)
        assert scheme is not None and scheme.weight == Int(4, True, 32)


# What matters


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({5: 2}, "column 5 is in group 2, of groups 0 to 1"),
        ({5: 99999}, "column 5 is in group 99999"),
        ({5: -1}, "column 5 is in group -1"),
        ({5: 1}, "group 0 has 31 columns, not 32"),
    ],
)
def test_group_ids_are_checked(
    ids: dict[int, int], message: str, q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    grid = Int(4, True, 32)
    spec, form = spec_of(grid), GPTQ(desc_act=True)
    tensors = form.pack(q_of(grid, 64, 64), spec)
    tensors["g_idx"][next(iter(ids))] = next(iter(ids.values()))
    with pytest.raises(LlmqError, match=re.escape(f"down_proj.g_idx: {message}")):
        form.unpack(tensors, spec)


def test_an_order_that_the_config_does_not_tell_of(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    grid = Int(4, True, 32)
    tensors = GPTQ().pack(q_of(grid, 64, 64), spec_of(grid))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(LlmqError, match=r"down_proj\.g_idx is in activation order, but .*desc_act is false"):
        GPTQ().unpack(tensors, spec_of(grid))


SCALES = {GPTQ: "scales", AWQ: "scales", CompressedTensors: "weight_scale"}


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", SCALES)
def test_a_scale_that_no_weight_can_have_is_named(
    form: Any, bad: float, q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    grid = Int(4, True, 32)
    tensors, spec = form().pack(q_of(grid, 64, 64), spec_of(grid)), spec_of(grid)
    at = (1, 3) if form is not CompressedTensors else (3, 1)
    tensors[SCALES[form]][at] = bad
    message = rf"^model\.layers\.0\.mlp\.down_proj\.{SCALES[form]}: row 3, group 1 is {re.escape(str(bad))}"
    with pytest.raises(LlmqError, match=message):
        form().unpack(tensors, spec)
    tensors[SCALES[form]][at] = -0.5  # a symmetric grid may fall
    assert form().unpack(tensors, spec).params.scale[3, 1] == -0.5


def test_static_scales_and_zero_points_are_checked(
    q_of: Callable[..., QTensor], spec_of: Callable[..., LinearSpec]
) -> None:
    form, grid = CompressedTensors(), Int(8, True, "channel")
    spec = spec_of(grid, activation=Int(8, True, "tensor"))
    q = replace(q_of(grid, 64, 64), input=Params(torch.zeros(1), torch.tensor([128], dtype=torch.int32)))
    with pytest.raises(LlmqError, match=r"down_proj\.input_scale is \[0\.0\]"):
        form.unpack(form.pack(q, spec), spec)
    whole = Int(4, False, "tensor")
    tensors = form.pack(q_of(whole, 64, 64), spec_of(whole))
    tensors["weight_zero_point"][0] = 100
    with pytest.raises(LlmqError, match=r"down_proj\.weight_zero_point: row 0, group 0 is 108"):
        form.unpack(tensors, spec_of(whole))
