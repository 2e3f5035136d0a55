"""Experts multiplied together on CPU tensors, where the operators are their references; and which slot is whose."""

import pytest
import torch
import torch.nn.functional as F
from torch import library

from llmq_kernels import activation, e2m1, fp8, grouped, grouped_int8, int8, layout, routing, tune, weight_only
from llmq_kernels.errors import KernelError

GEN = torch.Generator().manual_seed(0)
E, TOP, T, K = 5, 2, 7, 128


def weight(N=40, bits=4, G=2, **how):
    codes = torch.randint(0, 2**bits, (N, K), generator=GEN, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (N, G), generator=GEN)
    return layout.pack(codes, (torch.rand(N, G, generator=GEN) * 0.1).half(), zeros, bits, **how)


def tokens():
    index = torch.stack([torch.randperm(E, generator=GEN)[:TOP] for _ in range(T)])
    index[2, 1] = E
    return torch.randn(T, K, generator=GEN), index


def check(op, *args):
    library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_every_pair_has_the_product_of_its_expert():
    rows = [[weight(), weight(30)] for _ in range(E)]
    w, parts = grouped.stack(rows)
    x, index = tokens()
    bias = torch.randn(E + 1, w.one.N, generator=GEN)
    bias[E] = 0
    plan = routing.plan(index, E)
    y = grouped.linear(x, w, plan, bias)
    assert y.shape == (T, TOP, 128 + 30) and not y[2, 1].any()
    for t in range(T):
        for j, e in enumerate(index[t].tolist()):
            for begin, of_one in zip((0, 128), rows[e], strict=True) if e < E else ():
                own = bias[e, begin : begin + of_one.N]
                torch.testing.assert_close(y[t, j, begin : begin + of_one.N], weight_only.linear(x[t], of_one, own))
    pairs = grouped.linear(x.repeat_interleave(TOP, 0), w, plan.of_pairs, bias)
    torch.testing.assert_close(pairs.view_as(y), y)
    for row, of_one in zip(rows, parts, strict=True):
        for each, part in zip(row, of_one, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(layout.unpack(part), layout.unpack(each), strict=True))
            assert part.words.untyped_storage().data_ptr() == w.words.untyped_storage().data_ptr()
    given = w.words, w.params, plan.order, plan.begin, bias, *w.one.shape, TOP
    check(torch.ops.llmq.grouped_weight_only, x, *given)
    check(torch.ops.llmq.expert_plan, index, E)


def test_small_floats_of_an_expert_have_factors_of_their_own():
    def floats(N, factor):
        codes = torch.randint(0, 16, (N, K), generator=GEN, dtype=torch.uint8)
        scales = torch.randint(1, 127, (N, K // 16), generator=GEN).to(torch.uint8)
        return e2m1.pack(codes, scales, e8m0=False, factor=factor)

    rows = [[floats(40, 0.01 * (e + 1)), floats(30, 0.02)] for e in range(E)]
    w, parts = grouped.stack(rows)
    x, index = tokens()
    plan = routing.plan(index, E)
    y = grouped.linear(x, w, plan)
    for e, (row, of_one) in enumerate(zip(rows, parts, strict=True)):
        t, j = (index == e).nonzero(as_tuple=True)
        for begin, each, part in zip((0, 128), row, of_one, strict=True):
            torch.testing.assert_close(y[t, j, begin : begin + each.N], e2m1.linear(x[t], each), rtol=1e-4, atol=1e-3)
            assert part.factor == each.factor
            assert all(torch.equal(a, b) for a, b in zip(e2m1.unpack(part), e2m1.unpack(each), strict=True))
    given = w.words, w.params, w.factors, plan.order, plan.begin, None, *w.one.shape, TOP
    check(torch.ops.llmq.grouped_e2m1, x, *given)


def routed(K, N):
    """Return tokens, their experts, a bias of each expert and of none, and the plan."""
    x, index = torch.randn(T, K, generator=GEN), tokens()[1]
    bias = torch.randn(E + 1, N, generator=GEN)
    bias[E] = 0
    return x, index, bias, routing.plan(index, E)


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["token", "static"])
@pytest.mark.parametrize("K", [128, 200])
def test_w8a8_of_an_expert_is_what_it_is_alone(K, static):
    def ints(N):
        return int8.pack(torch.randint(-128, 128, (N, K), generator=GEN).to(torch.int8), torch.rand(N, generator=GEN))

    rows = [[ints(40), ints(30)] for _ in range(E)]
    w, parts = grouped_int8.stack(rows)
    x, index, bias, plan = routed(K, w.one.N)
    y = grouped_int8.linear(x, w, plan, static, bias)
    assert y.shape == (T, TOP, 128 + 30) and not y[2, 1].any()
    for e, (row, of_one) in enumerate(zip(rows, parts, strict=True)):
        t, j = (index == e).nonzero(as_tuple=True)
        for begin, each, part in zip((0, 128), row, of_one, strict=True):
            own = bias[e, begin : begin + each.N]
            assert torch.equal(y[t, j, begin : begin + each.N], int8.linear(x[t], each, static, own))
            assert torch.equal(part.q, each.q) and torch.equal(part.scale, each.scale)
            assert part.q.untyped_storage().data_ptr() == w.q.untyped_storage().data_ptr()
    compiled = torch.compile(
        lambda x, i: grouped_int8.linear(x, w, routing.plan(i, E), static, bias), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, index), y)
    pairs = grouped_int8.linear(x.repeat_interleave(TOP, 0), w, plan.of_pairs, static, bias)
    assert torch.equal(pairs.view_as(y), y)
    q, x_scale = activation.quantize_reference(F.pad(x, (0, w.q.size(2) - K)), static)
    check(torch.ops.llmq.grouped_int8, q, x_scale, w.q, w.scale, plan.order, plan.begin, bias, w.one.N, TOP, x.dtype)
    with pytest.raises(KernelError, match="the plan is of 6 experts and 14 pairs, 2 of a row; there are 5 experts"):
        grouped_int8.linear(x, w, routing.plan(index, 6))
    with pytest.raises(KernelError, match=r"bias is \[2, 158\], not \[6, 158\]"):
        grouped_int8.linear(x, w, plan, static, bias[:2])
    with pytest.raises(KernelError, match="differ in shape"):
        grouped_int8.stack([[ints(40)], [ints(30)]])


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["token", "static"])
@pytest.mark.parametrize("K", [128, 208])
def test_fp8_of_an_expert_is_what_it_is_alone(K, static):
    """But for the order of float32 sums, which the library has for itself."""

    def floats(N):
        codes = torch.randint(0, 0x7F, (N, K), generator=GEN, dtype=torch.uint8)
        return fp8.pack(codes + 128 * torch.randint(0, 2, (N, K), generator=GEN).byte(), torch.rand(N, generator=GEN))

    rows = [[floats(48), floats(32)] for _ in range(E)]
    w, parts = grouped_int8.stack(rows)
    x, index, bias, plan = routed(K, w.one.N)
    y = grouped_int8.linear(x, w, plan, static, bias)
    assert y.shape == (T, TOP, 80) and not y[2, 1].any() and w.q.shape == (E, 128, -(-K // 128) * 128)
    for e, (row, of_one) in enumerate(zip(rows, parts, strict=True)):
        t, j = (index == e).nonzero(as_tuple=True)
        for begin, each, part in zip((0, 48), row, of_one, strict=True):
            alone = fp8.linear(x[t], each, static, bias[e, begin : begin + each.N])
            assert torch.allclose(y[t, j, begin : begin + each.N], alone, rtol=1e-5, atol=1e-5 * y.abs().max())
            assert torch.equal(part.q, each.q) and torch.equal(part.scale, each.scale)
            assert torch.equal(fp8.linear(x, part, static), fp8.linear(x, each, static))
            assert part.q.untyped_storage().data_ptr() == w.q.untyped_storage().data_ptr()
    compiled = torch.compile(
        lambda x, i: grouped_int8.linear(x, w, routing.plan(i, E), static, bias), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, index), y)


def test_torch_compile_traces_through():
    w, _ = grouped.stack([[weight()] for _ in range(E)])
    x, index = tokens()

    def model(x, index):
        plan = routing.plan(index, E)
        y = F.silu(grouped.linear(x * 2, w, plan))
        return grouped.linear(F.pad(y.flatten(0, 1), (0, K - 40)), w, plan.of_pairs).view(T, TOP, -1).sum(1)

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, index), model(x, index))


@pytest.mark.parametrize("BM", [8, 16, 64])
def test_slots_hold_the_tiles_of_every_expert(BM):
    """What a program computes of `begin`, for all slots of a grid: each pair is in one tile."""
    for experts, pairs in ((1, 1), (3, 200), (128, 8), (128, 4096), (40, 641)):
        index = (torch.rand(pairs, 1, generator=GEN) ** 3 * (experts + 1)).long()
        begin = routing.reference(index, experts)[1].long()
        edges = torch.arange(experts + 1)
        first_slot = begin[:-1] // BM + torch.minimum(edges, begin[:-1])
        seen = []
        for slot in range(routing.slots(pairs, experts, BM)):
            e = int((first_slot <= slot).sum()) - 1
            first = int(begin[e]) + (slot - int(first_slot[e])) * BM
            seen += range(first, min(first + BM, int(begin[e + 1])))
        assert seen == list(range(pairs))


def test_configurations_are_those_of_an_expert_s_part_of_the_tokens():
    w = grouped.stack([[weight()] for _ in range(128)])[0]

    def found(T, asm=True):
        pairs = torch.empty(T * 8, dtype=torch.int32)
        plan = routing.Plan(pairs, torch.empty(130, dtype=torch.int32), 8)
        return grouped.configs(T, grouped.Routed(w, plan), asm=asm)

    for T, BM in ((1, 8), (16, 8), (256, 16), (4096, 64)):
        assert found(T)[0].BM == BM and tune.LIBRARY not in found(T)
        assert {c.split_k for c in found(T)} == {1}  # of one tile of K
    assert found(1, asm=False)[0].BM == 16


def test_what_cannot_be_one_weight_is_refused():
    for other in ([weight(bits=8)], [weight(48)], [weight(G=4)]):
        with pytest.raises(KernelError, match="differ in shape, bits, groups, zeros or scales"):
            grouped.stack([[weight()], other])
    ordered = weight(g_idx=torch.arange(K) % 2)
    with pytest.raises(KernelError, match=r"orders of their own \(g_idx\)"):
        grouped.stack([[ordered], [ordered]])


def test_what_is_not_of_these_experts_is_refused():
    w, _ = grouped.stack([[weight()] for _ in range(E)])
    x, index = tokens()
    plan = routing.plan(index, E)
    for call, said in (
        (lambda: grouped.linear(x[:, :64], w, plan), "64 features, the packed weight 128"),
        (lambda: grouped.linear(x[:3], w, plan), "14 pairs, 2 of a row; there are 5 experts and 3 rows"),
        (lambda: grouped.linear(x, w, routing.plan(index, 6)), "the plan is of 6 experts"),
        (lambda: grouped.linear(x, w, plan, torch.zeros(E, 40)), r"bias is \[5, 40\], not \[6, 40\]"),
    ):
        with pytest.raises(KernelError, match=said):
            call()
