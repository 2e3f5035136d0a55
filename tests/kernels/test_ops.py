"""The public ops on CPU tensors, where they are their references: against torch, torch.compile, refusals."""

import panels
import pytest
import torch
import torch.nn.functional as F

from llmq_kernels import activation, attention, e2m1, fp8, int8, kv, layout, panel, weight_only
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import no_gradient


def weight(bits=4, N=40, K=128, G=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), generator=gen, dtype=torch.uint8)
    scale = (torch.rand(N, G, generator=gen) * 0.1).half()
    zeros = torch.randint(0, 2**bits, (N, G), generator=gen)
    W = (codes - zeros.repeat_interleave(K // G, 1)).float() * scale.float().repeat_interleave(K // G, 1)
    return layout.pack(codes, scale, zeros, bits), W


def check(op, *args):
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_weight_only_is_the_linear_of_its_decoded_weight():
    w, W = weight()
    x, bias = torch.randn(3, 2, 128), torch.randn(40)
    torch.testing.assert_close(weight_only.linear(x, w, bias), F.linear(x, W, bias))
    assert weight_only.linear(x.bfloat16(), w).dtype == torch.bfloat16
    check(torch.ops.llmq.weight_only_linear, x, w.words, w.params, w.order, bias, w.N, w.K, w.bits, w.group, w.has_zero)


@pytest.mark.parametrize("group", [16, 32])
def test_e2m1_is_the_linear_of_its_decoded_weight(group):
    gen = torch.Generator().manual_seed(group)
    codes = torch.randint(0, 16, (40, 160), generator=gen, dtype=torch.uint8)
    bits = torch.randint(1, 127, (40, 160 // group), generator=gen).to(torch.uint8)
    w = e2m1.pack(codes, bits, e8m0=group == 32, factor=0.25)
    assert all(torch.equal(a, b) for a, b in zip(e2m1.unpack(w), (codes, bits), strict=True))
    magnitude = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).int()]
    scale = torch.exp2(bits.float() - 127) if group == 32 else bits.view(torch.float8_e4m3fn).float()
    W = torch.where(codes > 7, -magnitude, magnitude) * scale.repeat_interleave(group, 1) * 0.25
    x, bias = torch.randn(3, 2, 160, generator=gen), torch.randn(40, generator=gen)
    torch.testing.assert_close(e2m1.linear(x, w, bias), F.linear(x, W, bias))
    check(torch.ops.llmq.e2m1_linear, x, w.words, w.params, bias, 40, 160, group, w.e8m0, w.factor)


CODES, SCALES = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("codes", "scales", "e8m0", "message"),
    [
        (CODES, SCALES[:, :1], False, "1 groups over K = 64 are not groups of 16 or 32 columns"),
        (CODES, SCALES.float(), False, "scales uint8"),
        (CODES + 16, SCALES, False, "a code is 16, beyond 4 bits"),
        (CODES, SCALES * 127, False, "negative or not a number"),
        (CODES, SCALES * 255, True, "negative or not a number"),
    ],
)
def test_what_e2m1_cannot_hold_is_refused(codes, scales, e8m0, message):
    with pytest.raises(KernelError, match=message):
        e2m1.pack(codes, scales, e8m0=e8m0)


def test_act_order_is_undone_on_the_activation():
    codes = torch.randint(0, 16, (8, 128), dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0]]).half().expand(8, 2)
    g_idx = torch.arange(128) % 2
    w = layout.pack(codes, scale, None, 4, g_idx=g_idx)
    x = torch.randn(4, 128)
    torch.testing.assert_close(
        weight_only.linear(x, w), x @ ((codes - 8.0) * scale.float()[:, g_idx]).t(), rtol=1e-4, atol=1e-4
    )


def test_int8_is_near_the_float_linear_and_exact_in_its_sums():
    q = torch.randint(-128, 128, (24, 200)).to(torch.int8)
    w = int8.pack(q, torch.rand(24, 1) * 0.01)
    x = torch.randn(5, 200)
    W = q.float() * w.scale[:24, None]
    y, exact = int8.linear(x, w), F.linear(x, W)
    assert 10 * torch.log10(exact.square().mean() / (exact - y).square().mean()) > 35
    x_q, x_scale = activation.quantize_reference(x)
    torch.testing.assert_close(y, (x_q.double() * x_scale[:, None]).float() @ W.t(), rtol=1e-5, atol=1e-4)
    check(torch.ops.llmq.int8_linear, x, w.q, w.scale, None, torch.randn(24), 24, 200)


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["token", "static"])
@pytest.mark.parametrize(("K", "fuses"), [(256, True), (200, False)], ids=["whole", "padded"])
def test_compiled_w8a8_quantizes_where_inductor_fuses_it_and_gives_the_same_bits(K, fuses, static):
    w = int8.pack(torch.randint(-128, 128, (24, K)).to(torch.int8), torch.rand(24) * 0.01)
    x, bias, graphs = torch.randn(3, 2, K).bfloat16(), torch.randn(24).bfloat16(), []
    x[0, 1] = 0

    def kept(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: int8.linear(x, w, static, bias), backend=kept, fullgraph=True)
    assert torch.equal(compiled(x), int8.linear(x, w, static, bias))
    ours = [n.target for n in graphs[0].graph.nodes if "llmq" in str(n.target)]
    assert ours == [torch.ops.llmq.int8_product if fuses else torch.ops.llmq.int8_linear]
    q, x_scale = activation.quantize_reference(F.pad(x, (0, w.q.size(1) - K)), static)
    check(torch.ops.llmq.int8_product, q, x_scale, w.q, w.scale, bias, 24, torch.bfloat16)


@pytest.mark.parametrize("static", [None, torch.tensor([0.02])], ids=["token", "static"])
def test_fp8_is_the_product_of_what_is_rounded_and_compiled_the_same(static):
    codes = torch.randint(0, 0x7F, (32, 64), dtype=torch.uint8)
    w, x, bias = fp8.pack(codes, torch.rand(32, 1) * 0.01), torch.randn(3, 2, 64), torch.randn(32)
    x_fp8, x_scale = fp8.quantize_reference(x, static)
    W = codes.view(fp8.E4M3).double() * w.scale[:, None].double()
    exact = (x_fp8.double() * x_scale.double().view(*(x_scale.shape if static is not None else (3, 2, 1)))) @ W.t()
    y = fp8.linear(x, w, static, bias)
    torch.testing.assert_close(y, (exact + bias.double()).float(), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda x: fp8.linear(x, w, static, bias), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    assert fp8.linear(x[:0], w, static, bias).shape == (0, 2, 32)
    whole, parts = fp8.join([w, w])
    assert whole.N == 64 and all(torch.equal(fp8.linear(x, p, static), fp8.linear(x, w, static)) for p in parts)


@pytest.mark.parametrize(("bits", "bound"), [(8, 38), (4, 15)])
@pytest.mark.parametrize("sym", [True, False])
def test_attention_over_the_cache_is_near_attention_over_floats(bits, bound, sym):
    torch.manual_seed(0)
    B, H, GQ, T, D = 2, 2, 3, 33, 64
    k, v, q = torch.randn(B, H, T, D), torch.randn(B, H, T, D), torch.randn(B, H * GQ, 1, D)
    cache = kv.empty(B, H, T, D, bits, sym=sym, device="cpu")
    kv.append(cache, k, v, torch.zeros(B, dtype=torch.int32))
    lengths = torch.full((B,), T, dtype=torch.int32)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    found = attention.attend(q, cache, lengths)
    assert 10 * torch.log10(wanted.square().mean() / (wanted - found).square().mean()) > bound
    tensors = (cache.k_words, cache.k_params, cache.v_words, cache.v_params)
    check(torch.ops.llmq.kv_attend, q, *tensors, lengths, None, None, D**-0.5, bits, sym)
    check(torch.ops.llmq.kv_attend, q, *tensors, lengths, k[:, :, :5], v[:, :, :5], D**-0.5, bits, sym)
    check(torch.ops.llmq.kv_append, k[:, :, :1], cache.k_words, cache.k_params, lengths - 2, None, bits, sym)


def test_new_tokens_see_themselves_and_the_past_only():
    torch.manual_seed(0)
    k, v, q = (torch.randn(1, 1, 9, 64) for _ in range(3))
    cache = kv.empty(1, 1, 9, 64, 8, sym=True, device="cpu")
    kv.append(cache, k, v, torch.zeros(1, dtype=torch.int32))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, 4:]
    for packed in (9, 6, 2):  # the rest is a window
        window = (k[:, :, packed:], v[:, :, packed:])
        lengths = torch.tensor([packed], dtype=torch.int32)
        found = attention.attend(q[:, :, 4:], cache, lengths, window=window if packed < 9 else None)
        assert (found - wanted).abs().max() < 0.05, packed


def test_torch_compile_traces_through():
    w, _ = weight()
    x = torch.randn(2, 128)

    def model(x):
        return F.silu(weight_only.linear(x * 2, w)) + 1

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: weight_only.linear(torch.randn(2, 64), w), "64 features, the packed weight 128"),
        (lambda w: weight_only.linear(torch.randn(2, 128), w, torch.randn(3)), r"bias is \[3\]"),
        (lambda w: int8.pack(torch.zeros(2, 2), torch.ones(2)), "int8 codes"),
        (lambda w: int8.pack(torch.zeros(1, 200_000, dtype=torch.int8), torch.ones(1)), "overflow"),
        (lambda w: fp8.pack(torch.zeros(16, 16), torch.ones(16)), "FP8 takes uint8 codes"),
        (lambda w: fp8.pack(torch.zeros(24, 16).byte(), torch.ones(1)), "16 does not divide N = 24"),
        (lambda w: fp8.join([fp8.pack(torch.zeros(16, K).byte(), torch.ones(1)) for K in (16, 32)]), "differ in K"),
        (lambda w: kv.empty(1, 1, 8, 64, 2, sym=True, device="cpu"), "2 bits"),
        (lambda w: kv.empty(1, 1, 8, 512, 8, sym=True, device="cpu"), "512 channels"),
    ],
)
def test_what_an_op_cannot_take_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call(weight()[0])


def test_a_backward_pass_through_a_kernel_is_refused():
    x, y = torch.ones(2, 3, requires_grad=True), torch.ones(2, 4)
    with pytest.raises(KernelError, match="the kernels have no gradients"):
        (x.sum() + no_gradient(x, y).sum()).backward()
    with torch.no_grad():
        assert no_gradient(x, y) is y


def test_panels_fit_and_have_a_group_for_each_column():
    w, H, group, *values = panels.problem(65, 8, 1, 4)
    out = torch.empty_like(w), torch.empty(65, 8, dtype=torch.uint8)
    with pytest.raises(KernelError, match="at most 64 columns, not 65"):
        panel.round_panel(w, w, H, group, *values, 0.0, 15.0, *out)
    with pytest.raises(KernelError, match="5 columns has the groups of 65"):
        values.pop(2)
        panel.walk_panel(H, w[:5], w[0], out[1][:5], group, *values, 0.0, 15.0, out[0][:5], out[1][5:10])
    with pytest.raises(KernelError, match="power of two of values, up to 256, not 15 with 16 edges"):
        panel.walk_panel(H, w, w[0], out[1], group, *values[:2], w[0].new_ones(15), w[0].new_ones(16), 0.0, 15.0, *out)


def test_a_panel_is_rounded_and_walked_as_the_formulas_say():
    """In float64, column by column, with the products written out."""
    w, H, group, scale, zero, offset, *no_table = panels.problem(12, 6, 3, 3)
    scale[0, 0] = 0.3
    F, s, z, o = H.double() / H.diagonal().double(), *(p[group].double() for p in (scale, zero, offset))
    error, codes = panel.round_reference(w, w, F.float(), group, (scale, zero, offset, *no_table, 0.0, 7.0))
    E = torch.zeros_like(w, dtype=torch.float64)
    for j in range(12):
        q = ((w[j].double() + F[:j, j] @ E[:j] - o[j]) / s[j] + z[j]).round().clamp(0, 7)
        E[j] = w[j] - s[j] * (q - z[j]) - o[j]
        assert torch.equal(q.to(torch.uint8), codes[j])
    torch.testing.assert_close(error.double(), E, rtol=0, atol=1e-5)
    W, Q = w.double(), s * (codes - z) + o
    loss = ((W - Q) * (H.double() @ (W - Q))).sum(0)
    g, found = (H.double() @ (W - Q)).float(), loss.float()
    steps, new = panel.walk_reference(H, g, found, codes, group, (scale, zero, *no_table, 0.0, 7.0))
    Q += steps.double()
    torch.testing.assert_close(Q, s * (new - z) + o, rtol=0, atol=1e-5)
    torch.testing.assert_close(g.double(), H.double() @ (W - Q), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.double(), ((W - Q) * (H.double() @ (W - Q))).sum(0), rtol=1e-4, atol=1e-4)
    assert (found <= loss).all() and found.sum() < 0.95 * loss.sum()
    check(torch.ops.llmq.round_panel, w, w, H, group, scale, zero, offset, *no_table, 0.0, 7.0, error, codes)
    check(torch.ops.llmq.walk_panel, H, g, found, codes, group, scale, zero, *no_table, 0.0, 7.0, steps, new)


def test_a_panel_on_a_table_takes_the_nearest_value():
    """And a walk takes no step between two zeros."""
    w, H, group, scale, zero, offset, value, edge = panels.problem(8, 6, 2, 4, values=16)
    scale[0, 0] = 0.3
    error, ranks = panel.round_reference(w, w, 0 * H, group, (scale, zero, offset, value, edge, 0.0, 15.0))
    far = (w[..., None] - scale[group, :, None] * value - offset[group, :, None]).abs()
    torch.testing.assert_close(far.gather(2, ranks.long()[..., None])[..., 0], far.amin(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(error.abs(), far.amin(2), rtol=1e-4, atol=1e-6)
    zeros, g, loss = torch.full_like(ranks, 7), torch.full_like(w, 1e-9), torch.ones(6)
    steps, new = panel.walk_reference(H, g, loss, zeros, group, (scale, zero, value, edge, 0.0, 15.0))
    assert value[7] == value[8] == 0 and torch.equal(new, zeros) and not steps.any()
