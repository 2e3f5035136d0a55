"""How much is launched for a linear: kernels of ours, and whatever else torch would launch around them."""

from collections import Counter

import pytest
import torch
from _launches import TorchLaunches, counted

from llmq_kernels import e2m1, fp8, grouped, grouped_int8, int8, routing, tune, weight_only
from llmq_kernels.layout import pack

GEN = torch.Generator().manual_seed(0)


def integers(K=512, bits=4, **how):
    codes = torch.randint(0, 2**bits, (128, K), generator=GEN, dtype=torch.uint8)
    return pack(codes, torch.rand(128, K // 64, generator=GEN).half(), None, bits, **how)


def floats():
    codes = torch.randint(0, 16, (128, 256), generator=GEN, dtype=torch.uint8)
    return e2m1.pack(codes, torch.ones(128, 8, dtype=torch.uint8), e8m0=True)


W4, W4_LONG, MXFP4 = integers(), integers(4096), floats()
W8 = int8.pack(torch.randint(-128, 128, (128, 256), generator=GEN).to(torch.int8), torch.ones(128))
F8 = fp8.pack(torch.randint(0, 0x7F, (128, 256), generator=GEN, dtype=torch.uint8), torch.ones(128))
FP8 = {"quantize_kernel": 1, "torch _scaled_mm": 1, "sum_int32_kernel": 1}
STATIC, BIAS = torch.tensor([0.1]), torch.zeros(128).half()
ONE, SPLIT = {"weight_only_kernel": 1}, {"weight_only_kernel": 1, "sum_splits_kernel": 1}
INT8 = {"quantize_kernel": 1, "int8_kernel": 1}
CODES, ONES = torch.ones(1, 2, 256, dtype=torch.int8), torch.ones(2)
CALLS = {  # the call, K, rows, and what it launches
    "W4": (lambda x: weight_only.linear(x, W4), 512, 1, ONE),
    "W4, bias": (lambda x: weight_only.linear(x, W4, BIAS), 512, 3, ONE),
    "W4, K split, bias": (lambda x: weight_only.linear(x, W4_LONG, BIAS), 4096, 1, SPLIT),
    "W4, many tokens": (lambda x: weight_only.linear(x, W4), 512, 600, {"decode_kernel": 1, "torch mm": 1}),
    "MXFP4": (lambda x: e2m1.linear(x, MXFP4), 256, 1, {"e2m1_kernel": 1}),
    "MXFP4, many, bias": (
        lambda x: e2m1.linear(x, MXFP4, BIAS),
        256,
        33,
        {"decode_kernel": 1, "torch addmm": 1},
    ),
    "W8A8": (lambda x: int8.linear(x, W8), 256, 1, INT8),
    "W8A8 static, bias": (lambda x: int8.linear(x, W8, STATIC, BIAS), 256, 2, INT8),
    "FP8": (lambda x: fp8.compute(x, F8), 256, 1, FP8),
    "FP8 static, bias": (lambda x: fp8.compute(x, F8, STATIC, BIAS), 256, 2, FP8),
    "W8A8 of codes": (lambda x: int8.product(CODES, ONES, W8, BIAS, x.dtype), 256, 2, {"int8_kernel": 1}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_launches_its_kernels_and_nothing_else(name):
    """The first call, which looks its configuration up, and the second, where it is settled."""
    call, K, rows, wanted = CALLS[name]
    x = torch.randn(1, rows, K).half()
    with counted() as counts, TorchLaunches(counts):
        for turn in (1, 2):
            assert call(x).shape == (1, rows, 128)
            assert counts == {k: turn * n for k, n in wanted.items()}


@pytest.mark.parametrize(("linear", "w"), [(weight_only.linear, W4), (e2m1.linear, MXFP4)], ids=["W4", "MXFP4"])
def test_no_rows_launch_nothing_but_an_empty_tensor(linear, w):
    x = torch.empty(0, w.K).half()
    with counted() as counts, TorchLaunches(counts):
        assert linear(x, w).shape == (0, 128)
        assert set(counts) <= {"torch new_zeros"}


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layer_of_experts_launches_one_product_each_for_its_gates_and_downs(tokens):
    """And a plan; whatever the number of experts."""
    for E in (4, 64):
        enter, leave = (grouped.stack([[integers() for _ in range(n)] for _ in range(E)])[0] for n in (2, 1))
        x, index = torch.randn(tokens, 512).half(), torch.randint(0, E, (tokens, 2))
        with counted() as counts, TorchLaunches(counts):
            for turn in (1, 2):
                plan = routing.plan(index, E)
                both = grouped.linear(x, enter, plan)
                assert both.shape == (tokens, 2, 256)
                inner = both.flatten(0, 1).repeat(1, 2)
                assert grouped.linear(inner, leave, plan.of_pairs).shape == (2 * tokens, 1, 128)
                assert counts == {"plan_kernel": turn, "grouped_kernel": 2 * turn, "torch repeat": turn}


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("one", [W8, F8], ids=["W8A8", "FP8"])
def test_experts_of_quantized_tokens_quantize_each_once(one, tokens):
    w = grouped_int8.stack([[one, one] for _ in range(16)])[0]
    x, index = torch.randn(tokens, 256).half(), torch.randint(0, 16, (tokens, 2))
    with counted() as counts, TorchLaunches(counts):
        for turn in (1, 2):
            plan = routing.plan(index, 16)
            assert grouped_int8.compute(x, w, plan).shape == (tokens, 2, 256)
            assert counts == {"plan_kernel": turn, "quantize_kernel": turn, "grouped_int8_kernel": turn}
        q, scale = grouped_int8.quantize_reference(x, w, None)
        counts.clear()
        packed = w.q, w.scale, plan.order, plan.begin
        torch.ops.llmq.grouped_int8(q, scale, *packed, None, w.one.N, 2, x.dtype)
        assert counts == {"grouped_int8_kernel": 1}


def test_a_settled_call_is_of_what_it_was_settled_for():
    """Another shape, dtype, bias or weight is looked up anew; a choice that is forgotten, too."""
    w, x = integers(), torch.randn(1, 512).half()
    with counted():
        weight_only.linear(x, w)
        assert len(tune.settled) == 1
        weight_only.linear(x, integers())  # alike
        assert len(tune.settled) == 1
        for other in (x.repeat(2, 1), x[None], x.bfloat16()):
            weight_only.linear(other, w)
        weight_only.linear(x, w, BIAS)
        weight_only.linear(x, integers(bits=8))
        assert len(tune.settled) == 6
        for wrong in (torch.randn(1, 500).half(), torch.randn(1, 512).half().to("meta")):
            with pytest.raises(ValueError, match="the packed weight"):
                weight_only.compute(wrong, w)
        tune.measuring(True)
        assert not tune.settled


def test_calls_of_many_shapes_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(tune, "_MOST_SETTLED", 3)
    w = integers()
    with counted():
        for rows in range(1, 9):
            weight_only.linear(torch.randn(rows, 512).half(), w)
            assert len(tune.settled) <= 3


def test_the_choice_of_a_capture_is_not_settled(monkeypatch):
    w, x = integers(), torch.randn(1, 512).half()
    monkeypatch.setattr(tune, "choose", lambda op, device, key, candidates, run: candidates()[0])
    with counted() as counts:
        weight_only.linear(x, w)
        assert counts["weight_only_kernel"] == 1 and not tune.settled


def test_modes_and_traces_see_an_operator():
    from llmq_kernels.launch import direct

    x = torch.randn(2, 512).half()
    assert direct(x)
    assert not direct(torch.nn.Parameter(x))
    with TorchLaunches(Counter()):
        assert not direct(x)
    seen = []
    torch.jit.trace(lambda y: (seen.append(direct(y)), y + 1)[1], x)
    assert not seen[0]  # what follows are checks of the trace
