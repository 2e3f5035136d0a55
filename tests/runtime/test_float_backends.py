"""Weights of small floats in their back-ends: exact decoding, products, inputs that are rounded, lossless both ways."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.runtime import reference
from llmq.runtime.backends import backends, choose, floatloop
from llmq.types import FloatParams, LinearSpec, QTensor, Scheme

CPU = torch.device("cpu")
ROWS = [1, 3, 9, 65]
WEIGHTS = {  # grid, N, K
    "nvfp4": (Nvfp4(), 40, 192),
    "nvfp4 odd": (Nvfp4(), 33, 80),
    "mxfp4": (Mxfp4(), 24, 128),
    "mxfp4 odd": (Mxfp4(), 7, 96),
    "fp8 channel": (Fp8(), 33, 70),
    "fp8 tensor": (Fp8("tensor"), 16, 64),
    "fp8 block": (Fp8("128x128", scale_dtype=torch.bfloat16), 140, 256),
    "fp8 group": (Fp8("64"), 12, 192),
    "mxfp8": (Mxfp8(), 24, 96),
}
every_weight = pytest.mark.parametrize("name", WEIGHTS)


def solved(name, activation=None, static=None):
    """A weight with values of every size, a group of zeros, and its spec."""
    grid, N, K = WEIGHTS[name]
    torch.manual_seed(0)
    W = torch.randn(N, K) * torch.logspace(-2, 1, N)[:, None]
    W[3, :64] = 0
    q = dataclasses.replace(QTensor.rounded(W, grid), input=static)
    return q, LinearSpec("model.layers.0.mlp.up_proj", N, K, Scheme(grid, activation))


def floatloop_of(q, spec):
    assert floatloop.FloatLoop.refuses(spec, CPU) is None
    assert floatloop.FloatLoop.holds(q)
    return floatloop.FloatLoop(q, spec)


def same(a: QTensor, b: QTensor) -> bool:
    """Whether two weights have equal tensors of equal dtypes."""
    ours, theirs = ({"codes": q.codes} | q.params.tensors() for q in (a, b))
    alike = all(torch.equal(t, theirs[n]) and t.dtype == theirs[n].dtype for n, t in ours.items())
    return alike and ours.keys() == theirs.keys() and a.grid == b.grid


@every_weight
def test_it_is_the_one_that_is_chosen(name):
    q, spec = solved(name)
    assert choose(spec, q) is floatloop.FloatLoop


@every_weight
def test_prepacking_loses_nothing(name):
    q, spec = solved(name)
    back = floatloop_of(q, spec).restore()
    assert same(back, q)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8 channel", "mxfp8"])
def test_what_is_kept_is_as_small_as_the_file(name):
    grid = WEIGHTS[name][0]
    q = QTensor.rounded(torch.randn(64, 1024), grid)
    w = floatloop_of(q, LinearSpec("x", 64, 1024, Scheme(grid)))
    per_weight = grid.bits + (8 if q.params.stored is not None else 32) / grid.granularity.columns(1024)
    assert sum(t.nbytes for t in w.buffers()) * 8 <= per_weight * q.codes.numel() + 8 * 1032  # and the table


@every_weight
def test_many_rows_meet_the_very_weight_of_the_file(name):
    q, spec = solved(name)
    x = torch.eye(spec.K)[: floatloop.FEW[4] + 1]
    x = torch.cat([x, torch.zeros(max(0, 65 - spec.K), spec.K)])
    assert torch.equal(floatloop_of(q, spec)(x)[: spec.K], q.dequantize().T[: len(x)])


@every_weight
def test_every_code_is_decoded(name):
    grid, N, K = WEIGHTS[name]
    q, spec = solved(name)
    codes = torch.arange(N * K).reshape(N, K) % 2**grid.bits
    codes[codes & 0x7F == 0x7F] = 1  # the NaN of E4M3
    q = dataclasses.replace(q, codes=codes.to(torch.uint8))
    w, x = floatloop_of(q, spec), torch.cat([torch.eye(K), torch.zeros(65, K)])
    assert torch.equal(w(x)[:K], q.dequantize().T)
    assert same(w.restore(), q)


@pytest.mark.parametrize("rows", ROWS)
@every_weight
def test_product_against_the_exact_one(name, rows, decibel):
    q, spec = solved(name)
    x = torch.randn(rows, spec.K)
    got = decibel(floatloop_of(q, spec)(x), x.double() @ q.dequantize().double().T)
    assert 200 > got > (85 if q.grid.bits == 4 and rows <= floatloop.FEW[4] else 110)  # activations to 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("name", ["nvfp4", "fp8 block"])
def test_dtypes_and_leading_dimensions(name, rows, dtype, decibel):
    q, spec = solved(name)
    x = torch.randn(2, rows, spec.K).to(dtype)
    y = floatloop_of(q, spec)(x)
    assert y.dtype == dtype
    assert y.shape == (2, rows, spec.N)
    assert decibel(y, x.double() @ q.dequantize().double().T) > 44


def test_e2m1_rounds_activations_by_64_columns_and_nothing_else(decibel):
    q, spec = solved("nvfp4")
    x = torch.randn(5, spec.K) * torch.logspace(-3, 3, spec.K)
    x[1, :64] = 0
    parts = x.unflatten(-1, (-1, 64))
    step = parts.abs().amax(-1, keepdim=True) / 32767
    rounded = ((parts * (1 / step)).round().nan_to_num() * step).flatten(-2)
    assert decibel(floatloop_of(q, spec)(x), rounded.double() @ q.dequantize().double().T) > 125


def test_sums_of_e2m1_cannot_overflow(decibel):
    q, spec = solved("nvfp4")
    q.codes.fill_(7)
    x = torch.full((2, spec.K), 3e4)
    assert decibel(floatloop_of(q, spec)(x), x.double() @ q.dequantize().double().T) > 85


def test_of_no_rows_and_of_another_width():
    for name in ("nvfp4", "fp8 channel"):
        q, spec = solved(name)
        w = floatloop_of(q, spec)
        assert w(torch.randn(2, 0, spec.K)).shape == (2, 0, spec.N)
        with pytest.raises(ValueError, match="columns, x 64"):
            w(torch.randn(5, 64))


INPUTS = {
    "fp8 token": ("fp8 channel", Fp8(), None),
    "fp8 group": ("fp8 block", Fp8("128"), None),
    "fp8 tensor": ("fp8 tensor", Fp8("tensor"), FloatParams(torch.tensor([0.01]))),
    "nvfp4": ("nvfp4", Nvfp4(), FloatParams(torch.tensor([1 / 700]), divisor=torch.tensor([700.0]))),
    "mxfp4": ("mxfp4", Mxfp4(), None),
    "mxfp8": ("mxfp8", Mxfp8(), None),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("rows", [2, 65])
def test_inputs_are_rounded_as_the_reference_rounds_them(name, rows, decibel):
    weight, activation, static = INPUTS[name]
    q, spec = solved(weight, activation, static)
    w, x = floatloop_of(q, spec), torch.randn(rows, spec.K)
    assert decibel(w(x), reference.linear(x, q, activation)) > 85
    assert decibel(w(x), reference.linear(x, q, None)) < 60
    back = w.restore().input
    assert (back is None) == (static is None)
    assert back is None or all(torch.equal(t, back.tensors()[n]) for n, t in static.tensors().items())


REFUSED = {
    "cuda": (Scheme(Nvfp4()), 64, torch.device("cuda"), "not on cuda"),
    "integers": (Scheme(Int(4)), 64, CPU, "small floats"),
    "integers for inputs": (Scheme(Fp8(), Int(8, True, "channel")), 64, CPU, "activations that are floats"),
    "columns": (Scheme(Fp8("128x128")), 192, CPU, "128 does not divide K = 192"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_take(case):
    scheme, K, device, reason = REFUSED[case]
    assert reason in (floatloop.FloatLoop.refuses(LinearSpec("x", 64, K, scheme), device) or "")


def test_a_code_that_is_no_number_goes_to_the_reference():
    q, spec = solved("fp8 channel")
    q.codes[2, 5] = 0xFF
    assert choose(spec, q) is None


def test_scales_of_several_divisors_go_to_the_reference():
    q, spec = solved("nvfp4")
    divisor = q.params.divisor.clone()
    divisor[1:] *= 2
    other = dataclasses.replace(q.params, divisor=divisor, scale=q.params.scale * q.params.divisor / divisor)
    assert choose(spec, dataclasses.replace(q, params=other)) is None


@pytest.mark.parametrize("name", ["nvfp4", "fp8 block"])
def test_the_same_bits_in_torchs_threads_as_in_one(name):
    q, spec = solved(name)
    w, x, threads = floatloop_of(q, spec), torch.randn(5, spec.K), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = w(x)
        torch.set_num_threads(3)
        assert torch.equal(w(x), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["nvfp4", "fp8 channel"])
def test_torch_compile(name):
    q, spec = solved(name)
    w = floatloop_of(q, spec)
    torch._dynamo.reset()
    compiled = torch.compile(w, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 65):
        x = torch.randn(rows, spec.K)
        assert torch.equal(compiled(x), w(x))


def test_codes_are_looked_up_or_computed_alike(monkeypatch):
    """CPUs without AVX2 have no table of bytes: the same sums by arithmetic."""
    numba = pytest.importorskip("numba")
    from llmq.runtime.backends import _float_loops

    monkeypatch.setattr(numba.config, "CPU_NAME", "any")
    dots = _float_loops._dots

    @numba.njit
    def dot(words, x, scale, step, out):
        address = words.ctypes.data, x.ctypes.data, scale.ctypes.data, step.ctypes.data
        dots(4, 1, address[0], address[1], address[2], address[3], 1, out.ctypes.data)

    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    words, x = floatloop._packed(codes, 16)[0], torch.randint(-32767, 32768, (1, 4, 16), dtype=torch.int16)
    scale, out = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(1)
    dot(words.numpy(), x.numpy(), scale.numpy(), torch.ones(1).numpy(), out.numpy())
    values = floatloop._in_order_of_words(Nvfp4.value.decode(codes) * scale.repeat_interleave(16), 16)
    assert out[0] == (values.double() * x.double()).sum() * 512


def test_back_ends_of_small_floats_come_after_those_of_integers():
    names = [b.name for b in backends()]
    assert names.index("floatloop") > names.index("fbgemm")
