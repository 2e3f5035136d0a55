"""Every back-end against the reference: SQNR over shapes, groups, dtypes and rows; lossless both ways; compiled."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from llmq.formats.awq import AWQ
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.runtime import backends
from llmq.runtime.backends import _team, choose, fbgemm, int4pack, intloop
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Scheme

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 3, 17, 33, 65]  # few rows take a packed product, many a decoded one, whatever the CPU
W8A8 = next((b.name for b in backends.backends() if b.name in ("int_mm", "fbgemm") and not b.refuses(
    LinearSpec("x", 32, 64, Scheme(Int(8, True, "channel"), Int(8, True, "channel"))), CPU)), "reference")  # fmt: skip

WEIGHT_ONLY = {  # bits, sym, group, N, K, scale dtype, act order
    "w4g32": (4, True, 32, 64, 96, torch.float16, False),
    "w4g64": (4, True, 64, 128, 320, torch.bfloat16, False),
    "w4g96": (4, True, 96, 64, 192, torch.float16, False),
    "w4g128_asym": (4, False, 128, 192, 256, torch.float16, False),
    "w4_channel": (4, True, "channel", 64, 320, torch.float32, False),
    "w4g32_asym_act_order": (4, False, 32, 64, 128, torch.float16, True),
    "w2g64": (2, False, 64, 48, 192, torch.float16, False),
    "w2g128_act_order": (2, True, 128, 40, 256, torch.bfloat16, True),
    "w3g32": (3, True, 32, 64, 96, torch.float16, False),
    "w3g64_asym": (3, False, 64, 33, 128, torch.float32, False),
    "w5g32": (5, True, 32, 64, 96, torch.float16, False),
    "w6g64_asym_act_order": (6, False, 64, 33, 128, torch.bfloat16, True),
    "w7_channel": (7, True, "channel", 24, 80, torch.float32, False),
    "w8g64_asym": (8, False, 64, 24, 128, torch.float16, False),
    "w8_channel": (8, True, "channel", 40, 48, torch.float16, False),
    "w8g32": (8, True, 32, 56, 160, torch.bfloat16, False),
    "w8g128_act_order": (8, True, 128, 64, 256, torch.float32, True),
}


def make(name, solved):
    bits, sym, group, N, K, dtype, act_order = WEIGHT_ONLY[name]
    return solved(N, K, Int(bits, sym, group, scale_dtype=dtype), act_order=act_order)


WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def takers(name):
    """The back-ends for a weight, in the order of a CPU without AVX-512."""
    bits, sym, *_ = WEIGHT_ONLY[name]
    return ["intloop", *(["int4pack"] if bits == 4 else ["int8pack"] if bits == 8 and sym else [])]


def prepacked(q, spec, name=None):
    """The weight in the back-end of that name, else in the one that is chosen."""
    backend = choose(spec, q) if name is None else next(b for b in backends.backends() if b.name == name)
    assert backend is not None
    return backend(q, spec)


def of_back_ends(*names):
    """Every weight-only case with every back-end for its bits."""
    cases = [(n, b) for n in names or WEIGHT_ONLY for b in takers(n)]
    return pytest.mark.parametrize(("name", "backend"), cases)


def test_the_order_of_back_ends_is_as_documented(solved):
    weight_only = ["int4pack", "int8pack", "intloop"] if WIDE else ["intloop", "int4pack", "int8pack"]
    assert [b.name for b in backends.backends()] == [
        "triton_weight_only",
        "triton_w8a8",
        *weight_only,
        "int_mm",
        "fbgemm",
        "floatloop",
        "scaled_mm",
        "triton_e2m1",
        "e4m3",
    ]
    for name in WEIGHT_ONLY:
        assert prepacked(*make(name, solved)).name == takers(name)[-1 if WIDE else 0]


@pytest.mark.parametrize("rows", ROWS)
@of_back_ends()
def test_weight_only_product_against_the_exact_one(name, backend, rows, solved, decibel):
    q, spec = make(name, solved)
    x = torch.randn(rows, spec.K)
    want = x.double() @ q.dequantize().double().T
    got = decibel(prepacked(q, spec, backend)(x), want)
    if backend == "intloop":
        assert got > (85 if rows <= intloop.FEW else 110)  # activations to 16 bits, or nothing
    else:
        assert got > (42 if rows <= backends.many_rows() else 110)  # much to bfloat16, or nothing
    assert got < 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 65])
@of_back_ends("w4g64", "w4g128_asym", "w8g32")
def test_dtypes_and_leading_dimensions(name, backend, rows, dtype, solved, decibel):
    q, spec = make(name, solved)
    x = torch.randn(2, rows, spec.K).to(dtype)
    before = x.clone()
    y = prepacked(q, spec, backend)(x)
    assert y.dtype == dtype
    assert y.shape == (2, rows, spec.N)
    assert torch.equal(x, before)
    assert decibel(y, x.double() @ q.dequantize().double().T) > 42


@of_back_ends()
def test_prepacking_loses_nothing(name, backend, solved):
    q, spec = make(name, solved)
    back = prepacked(q, spec, backend).restore()
    assert back.codes.dtype == torch.uint8
    for a, b in ((back.codes, q.codes), (back.params.scale, q.params.scale), (back.params.zero, q.params.zero)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert (back.g_idx is None) == (q.g_idx is None)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("name", ["w4g64", "w4g128_asym", "w2g64", "w8_channel"])
def test_intloop_gives_the_same_bits_in_torchs_threads_as_in_one(name, rows, solved, decibel):
    q, spec = make(name, solved)
    w, x, threads = prepacked(q, spec, "intloop"), torch.randn(rows, spec.K), torch.get_num_threads()
    assert _team.omp_fork() is not None, "the torch of these tests brings GNU OpenMP"
    try:
        torch.set_num_threads(1)
        alone = w(x)
        torch.set_num_threads(3)
        together = w(x)
    finally:
        torch.set_num_threads(threads)
    assert decibel(together, alone) > 110 if rows > intloop.FEW else torch.equal(alone, together)


def exact(q, x, segment):
    """The integers of x, their scales, and the product that intloop is to compute, in float64."""
    parts = x.unflatten(-1, (-1, segment))
    step = parts.abs().amax(-1, keepdim=True) / 32767
    whole = (parts * (1 / step)).round().nan_to_num() * step
    return whole.flatten(-2).double() @ q.dequantize().double().T


@pytest.mark.parametrize(
    ("name", "segment"), [("w4g64", 64), ("w4g32", 32), ("w2g64", 64), ("w3g64_asym", 64), ("w8g32", 32)]
)
def test_intloop_rounds_activations_by_segment_and_nothing_else(name, segment, solved, decibel):
    q, spec = make(name, solved)
    x = torch.randn(5, spec.K) * torch.logspace(-3, 3, spec.K)  # as outlying channels do
    x[1, :segment] = 0
    x[2] = 0
    y = prepacked(q, spec, "intloop")(x)
    assert decibel(y, exact(q, x, segment)) > 125
    assert torch.equal(y[2], torch.zeros(spec.N))


@pytest.mark.parametrize("name", ["w4g64", "w2g64", "w8_channel", "w4g32"])
def test_intloop_sums_cannot_overflow(name, solved, decibel):
    """All codes at the top and x at its largest, of one sign: the worst that a lane can add up."""
    q, spec = make(name, solved)
    q.codes.fill_(2**q.grid.bits - 1)
    x = torch.full((2, spec.K), 3e4)
    assert decibel(prepacked(q, spec, "intloop")(x), x.double() @ q.dequantize().double().T) > 85


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_intloop_hides_no_broken_activation(bad, rows, solved):
    q, spec = make("w4g64", solved)
    x = torch.randn(rows, spec.K)
    x[0, 70] = bad
    y = prepacked(q, spec, "intloop")(x)
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()


def test_intloop_refuses_activations_of_another_width(solved):
    q, spec = make("w4g64", solved)
    with pytest.raises(ValueError, match="320 columns, x 64"):
        prepacked(q, spec, "intloop")(torch.randn(5, 64))


def test_intloop_of_no_rows(solved):
    q, spec = make("w4g64", solved)
    assert prepacked(q, spec, "intloop")(torch.randn(2, 0, spec.K)).shape == (2, 0, spec.N)


@pytest.mark.parametrize("rows", [1, 65])
def test_intloop_minds_no_default_dtype(rows, solved):
    q, spec = make("w4g64", solved)
    w, x = prepacked(q, spec, "intloop"), torch.randn(rows, spec.K)
    want = w(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(w(x), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_intloop_takes_activations_near_the_ends_of_float32(solved, decibel):
    q, spec = make("w4g64", solved)
    w, x = prepacked(q, spec, "intloop"), torch.randn(3, spec.K)
    want = x.double() @ q.dequantize().double().T
    for power in (-100, 60):
        assert decibel(w(x * 2.0**power).double() * 2.0**-power, want) > 85
    assert torch.equal(w(x * 1e-42), torch.zeros(3, spec.N))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_scale_comes_back_and_the_decoded_product_uses_it(dtype):
    bits = torch.arange(1, 0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16)  # all positive finite ones
    scale = bits.to(dtype) * (1.000123 if dtype == torch.float32 else 1)
    scale = torch.cat([scale, -scale, scale[-1:].expand(-2 * len(scale) % 64)])[:, None]
    N = len(scale)
    codes = torch.randint(0, 16, (N, 32), dtype=torch.uint8)
    zero = torch.randint(0, 16, (N, 1), dtype=torch.int32)
    q = QTensor(codes, Params(scale, zero), Int(4, False, 32, scale_dtype=dtype))
    back = int4pack.Int4Pack(q, LinearSpec("x", N, 32, Scheme(q.grid))).restore()
    assert torch.equal(back.params.scale, scale)
    assert torch.equal(back.params.zero, zero)


def test_the_product_of_few_rows_is_of_the_rounded_weight(solved, decibel):
    """The documented rounding, and no other: bfloat16 scales, offsets and activations, summed in float32."""
    q, spec = make("w4g128_asym", solved)
    w = prepacked(q, spec, "int4pack")
    x = torch.randn(5, spec.K)
    s, z = (t.double().T.repeat_interleave(w.group, dim=1) for t in w.sz.unbind(-1))
    want = x.bfloat16().double() @ ((q.codes.double() - 8) * s + z).T
    assert torch.allclose(w(x).double(), want, rtol=2**-8, atol=1e-4 * float(want.abs().max()))


ACTIVATIONS = [Int(8, True, "channel"), Int(8, False, "channel"), Int(8, True, "tensor")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 65])
def test_w8a8_is_exact(rows, activation, dtype, solved, layer, decibel):
    grid = Int(8, True, "channel", restricted=True, scale_dtype=torch.bfloat16)
    q, spec = solved(48, 130, grid, activation)
    fast = layer(q, spec)
    fast.prepack()
    assert fast.backend == W8A8
    x = torch.randn(3, rows, 130) * torch.logspace(-2, 1, rows)[:, None]
    x[0, 0], x[1, 0] = 0, x[1, 0].abs()
    x = x.to(dtype)
    reference = layer(q, spec)
    y = fast(x)
    assert y.dtype == dtype
    want = reference(x.float()) if dtype == torch.float32 else reference(x)
    assert decibel(y, want) > {torch.float32: 120, torch.bfloat16: 44, torch.float16: 62}[dtype]


@pytest.mark.parametrize("extreme", ["weights", "activations", "both"])
def test_w8a8_never_saturates(extreme, layer, decibel):
    torch.manual_seed(0)
    N, K = 32, 256
    w = torch.randint(-128, 128, (N, K))
    x = torch.randn(4, K)
    if extreme != "activations":
        w = torch.where(torch.rand(N, K) < 0.5, 127, -128)
        w[0], w[1] = 127, -128
    if extreme != "weights":
        x = x.sign()
        x[0], x[1] = 1, -1
    grid = Int(8, True, "channel", scale_dtype=torch.float32)
    params = Params(torch.ones(N, 1), torch.full((N, 1), 128, dtype=torch.int32))
    spec = LinearSpec("x", N, K, Scheme(grid, Int(8, True, "channel")))
    q = QTensor((w + 128).to(torch.uint8), params, grid)
    fast = layer(q, spec)
    fast.prepack()
    x_int = (x / (x.abs().amax(-1, keepdim=True) / 127.5)).clamp(-128, 127).round()
    want = (x_int.double() @ w.double().T) * (x.abs().amax(-1, keepdim=True) / 127.5).double()
    assert decibel(fast(x), want) > 120


def test_the_split_weight_is_safe_and_whole():
    w = torch.randint(-128, 128, (64, 128)).to(torch.int8)
    A, index, offset, value = fbgemm.split(w)
    pairs = A.to(torch.int32).unflatten(1, (-1, 2))
    for x in ([255, 255], [255, 0], [0, 255]):
        sums = (pairs * torch.tensor(x)).sum(-1)
        assert int(sums.max()) < 2**15
        assert int(sums.min()) >= -(2**15)
    R = torch.zeros(64, 128, dtype=torch.int32)
    ends = [*offset[1:].tolist(), len(value)]
    for n, (a, b) in enumerate(zip(offset.tolist(), ends, strict=True)):
        R[n, index[a:b].long()] = value[a:b].int()
    assert torch.equal(A.int() + R, w.int())


@pytest.mark.skipif(W8A8 != "fbgemm", reason="fbgemm is for CPUs without VNNI")
def test_without_the_split_fbgemm_is_wrong():
    """Shows that the split is needed here, so that the tests above can fail."""
    w = torch.full((32, 64), 127, dtype=torch.int8)
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        torch.full((1, 64), 127.0), 1.0, 128, fbgemm._prepack(w)
    )
    assert float(y[0, 0]) < 127 * 127 * 64


def test_int_mm_equals_the_reference_on_any_cpu(solved, layer, decibel):
    from llmq.runtime.backends.int_mm import IntMM

    for activation in ACTIVATIONS:
        grid = Int(8, True, "channel", scale_dtype=torch.bfloat16)
        q, spec = solved(33, 70, grid, activation)
        w, x = IntMM(q, spec), torch.randn(2, 5, 70)
        assert decibel(w(x), layer(q, spec)(x)) > 120
        assert torch.equal(w.restore().codes, q.codes)


REFUSED = {
    "cuda": (Int(4, True, 32), None, 64, 64, torch.device("cuda"), "not on cuda"),
    "group 8": (Int(4, True, 8), None, 64, 64, CPU, "32 does not divide"),
    "2 bits, group 32": (Int(2, True, 32), None, 64, 64, CPU, "64 does not divide"),
    "8-bit K 40": (Int(8, True, "channel"), None, 64, 40, CPU, "16 does not divide"),
    "4-bit per tensor": (Int(4, True, "tensor"), None, 64, 64, CPU, "per group or channel"),
    "asymmetric W8A8": (Int(8, False, "channel"), Int(8, True, "channel"), 64, 64, CPU, "symmetric"),
}


def test_torch_packs_blocks_of_rows_only():
    spec = LinearSpec("x", 72, 64, Scheme(Int(4, True, 32)))
    assert "does not divide N" in int4pack.Int4Pack.refuses(spec, CPU)


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_back_end_takes_goes_to_the_reference(case, solved, layer, decibel):
    grid, activation, N, K, device, reason = REFUSED[case]
    spec = LinearSpec("x", N, K, Scheme(grid, activation))
    refusals = [b.refuses(spec, device) for b in backends.backends() if "cpu" in b.devices]
    assert all(refusals)
    assert any(reason in str(r) for r in refusals)
    if device.type == "cpu":
        q, spec = solved(N, K, grid, activation)
        linear = layer(q, spec)
        before = {k: v.clone() for k, v in linear.state_dict().items()}
        linear.prepack()
        assert linear.backend == "reference"
        assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())
        assert linear(torch.randn(3, K)).shape == (3, N)


def test_an_8_bit_weight_with_another_zero_goes_where_it_can_be_held(solved, layer, decibel):
    """A symmetric config may come with zeros that are not in the middle; only the values tell."""
    q, spec = solved(32, 64, Int(8, True, 32))
    q.params.zero[3, 1] = 100
    linear = layer(q, spec, GPTQ())
    linear.prepack()
    assert linear.backend == "intloop"
    x = torch.randn(3, 64)
    assert decibel(linear(x), x.double() @ q.dequantize().double().T) > 85


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_broken_scale_is_refused_by_name(bad, solved, layer):
    q, spec = solved(32, 64, Int(4, True, 32))
    q.params.scale[5, 1] = bad
    with pytest.raises(LlmqError, match=r"up_proj.*row 5, group 1"):
        layer(q, spec).prepack()


FORMATS = {
    "gptq": (GPTQ(), Int(4, True, 32), False),
    "gptq_desc_act": (GPTQ(desc_act=True), Int(4, False, 32), True),
    "gptq_8": (GPTQ(), Int(8, True, 64), False),
    "awq": (AWQ(), Int(4, False, 64), False),
    "compressed": (None, Int(4, True, 64), False),
    "compressed_asym": (None, Int(4, False, 32), False),
}


@pytest.mark.parametrize("name", FORMATS)
def test_state_dict_is_the_file_whatever_the_back_end(name, solved, layer):
    fmt, grid, act_order = FORMATS[name]
    q, spec = solved(64, 128, grid, act_order=act_order)
    linear = layer(q, spec, fmt, bias=True)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    W, bytes_ = linear.dequantize(), sum(t.nbytes for t in linear.buffers())
    linear.prepack()
    assert linear.backend != "reference"
    assert sum(t.nbytes for t in linear.buffers()) < 1.35 * bytes_  # one copy, not two
    for other in (linear, copy.deepcopy(linear), copy.deepcopy(linear).to(torch.float16)):
        after = other.state_dict()
        assert list(sorted(after)) == sorted(before)
        assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items() if k != "bias")
        assert torch.equal(other.dequantize(), W)
    linear.undo_prepack()
    assert linear.backend == "reference"
    assert all(torch.equal(t, before[k]) for k, t in linear.state_dict().items())


def test_loading_another_weight_into_a_prepacked_layer(solved, layer):
    spec = solved(64, 64, Int(4, True, 32))[1]
    one, two = (layer(solved(64, 64, Int(4, True, 32), seed=s)[0], spec) for s in (0, 1))
    one.prepack()
    one.load_state_dict(two.state_dict())
    assert torch.equal(one.dequantize(), two.dequantize())
    x = torch.randn(2, 64)
    assert torch.equal(one(x), two(x))


def test_moving_to_another_device_undoes_prepacking(solved, layer):
    linear = layer(*solved(64, 64, Int(4, True, 32)))
    linear.prepack()
    before = linear.backend
    assert linear.to("cpu").backend == before != "reference"
    moved = linear.to("meta")
    assert moved.backend == "reference"
    assert {b.device.type for b in moved.buffers()} == {"meta"}
    moved.prepack()
    assert moved.backend == "reference"


@pytest.mark.parametrize("kind", ["w4g64", "w4g32_asym_act_order", "w8g32", "w8a8", "w8a8_zeros", "reference"])
def test_torch_compile(kind, solved, layer):
    if kind in WEIGHT_ONLY:
        q, spec = make(kind, solved)
        linear = layer(q, spec, GPTQ(desc_act=q.g_idx is not None))
    elif kind.startswith("w8a8"):
        linear = layer(*solved(64, 96, Int(8, True, "channel"), Int(8, kind == "w8a8", "channel")))
    else:
        linear = layer(*solved(24, 96, Int(3, True, 8)))
    linear.prepack()
    torch._dynamo.reset()
    whole = linear.backend != "reference"  # whose unpacking breaks the graph
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=whole, dynamic=True)
    with torch.no_grad():
        for rows in (2, 65):
            x = torch.randn(rows, linear.in_features)
            assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uneven_groups_are_the_references(bits, solved):
    """A last group may be short, as AutoGPTQ wrote them; columns of like groups cannot be laid side by side then."""
    q, spec = solved(64, 192, Int(bits, True, 64))
    uneven = dataclasses.replace(q, g_idx=(torch.arange(192) // 80).to(torch.int32))
    assert choose(spec, uneven) is None
    scale = q.params.scale.float()[:, uneven.g_idx.long()]
    assert torch.equal(uneven.dequantize(), scale * (q.codes.int() - 2 ** (bits - 1)))
    shuffled = dataclasses.replace(q, g_idx=(torch.randperm(192) // 64).to(torch.int32))
    assert choose(spec, shuffled) is not None
