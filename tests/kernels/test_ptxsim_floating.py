"""Floating point and conversions, every result against an exact fraction rounded once by hand."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_snippets import integers, per_thread

THREADS = 128
FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126)}
"""Precision in bits, exponent of the smallest normal."""


def value_of(bits, name):
    """Decode a float's bits to a Fraction."""
    p, low = FORMATS[name]
    width = 32 if name == "f32" else 16
    sign, exponent, fraction = (
        bits >> (width - 1),
        bits >> (p - 1) & ((1 << (width - p)) - 1),
        bits & ((1 << (p - 1)) - 1),
    )
    assert exponent != (1 << (width - p)) - 1
    magnitude = Fraction(fraction + (1 << (p - 1) if exponent else 0)) * Fraction(2) ** (
        low + max(exponent - 1, 0) - p + 1
    )
    return -magnitude if sign else magnitude


def bits_of(value, name):
    """Round a Fraction to the nearest float, ties to even; return its bits without the sign of a zero."""
    p, low = FORMATS[name]
    width = 32 if name == "f32" else 16
    magnitude = abs(value)
    if magnitude == 0:
        return 0
    exponent = max(math.floor(math.log2(magnitude)) if magnitude > Fraction(1, 10**300) else low, low) + 1
    while exponent > low and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - p + 1)
    count = round(magnitude / unit)  # Python rounds halves to even
    top = 1 << p
    if count == top:
        count, exponent = count // 2, exponent + 1
    normal = count >= 1 << (p - 1)
    bits = ((exponent - low + 1) << (p - 1) | (count - (1 << (p - 1)))) if normal else count
    infinity = ((1 << (width - p)) - 1) << (p - 1)
    return min(bits, infinity) | ((1 << (width - 1)) if value < 0 else 0)


def floats(name, seed):
    """Random finite bit patterns, exponents near one another so that sums cancel and ties occur."""
    p, low = FORMATS[name]
    width = 32 if name == "f32" else 16
    draw = np.random.default_rng(seed)
    bias = 1 - low
    exponents = np.where(
        draw.random(THREADS) < 0.8, bias + draw.integers(-6, 7, THREADS), draw.integers(0, 20, THREADS)
    )
    fractions = draw.integers(0, 1 << (p - 1), THREADS)
    fractions[draw.random(THREADS) < 0.5] &= ~((1 << (p // 2)) - 1)
    bits = draw.integers(0, 2, THREADS) << (width - 1) | exponents << (p - 1) | fractions
    return bits.astype(np.uint32 if width == 32 else np.uint16)


def differing(got, exact, name):
    """Bits and rounded fractions, as bits, where they are not the same; the two zeros are one."""
    sign = 1 << (31 if name == "f32" else 15)
    pairs = zip(got.tolist(), (bits_of(e, name) for e in exact), strict=True)
    return [(g, w) for g, w in pairs if (0 if g == sign else g) != (0 if w == sign else w)]


@pytest.mark.parametrize("name", FORMATS)
def test_float_arithmetic_rounds_once(name):
    a, b, c = floats(name, 1), floats(name, 2), floats(name, 3)
    dtype = a.dtype.type
    A, B, C = ([value_of(int(x), name) for x in v] for v in (a, b, c))
    products = [x * y for x, y in zip(A, B, strict=True)]
    assert not differing(
        per_thread(f"add.rn.{name} d, a, b;", a, b, out=dtype), [x + y for x, y in zip(A, B, strict=True)], name
    )
    assert not differing(
        per_thread(f"sub.{name} d, a, b;", a, b, out=dtype), [x - y for x, y in zip(A, B, strict=True)], name
    )
    assert not differing(per_thread(f"mul.{name} d, a, b;", a, b, out=dtype), products, name)
    fused = [p + z for p, z in zip(products, C, strict=True)]
    assert not differing(per_thread(f"fma.rn.{name} d, a, b, c;", a, b, c, out=dtype), fused, name)
    assert not differing(
        per_thread(f"min.{name} d, a, b;", a, b, out=dtype), [min(x, y) for x, y in zip(A, B, strict=True)], name
    )
    assert not differing(
        per_thread(f"max.{name} d, a, b;", a, b, out=dtype), [max(x, y) for x, y in zip(A, B, strict=True)], name
    )
    assert not differing(per_thread(f"neg.{name} d, a;", a, out=dtype), [-x for x in A], name)
    assert not differing(per_thread(f"abs.{name} d, a;", a, out=dtype), [abs(x) for x in A], name)


def test_fused_multiply_add_sees_what_a_float64_sum_loses():
    """a * b = 2**-24 - 2**-70: beside 1 + 2**-23 a float64 keeps the tie and drops what breaks it."""
    a, b, c = (np.full(32, v, np.float32) for v in (2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23))
    for sign in (1, -1):
        rounded_twice = (a.astype(np.float64) * b * sign + c * sign).astype(np.float32)
        got = per_thread("fma.rn.f32 d, a, b, c;", a, sign * b, sign * c, out=np.uint32)
        exact = sign * (Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0])))
        assert not differing(got, [exact] * 32, "f32")
        assert (got.view(np.float32) == sign * c).all() and (rounded_twice != sign * c).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_are_two_halves(name):
    a, b, c = (np.stack([floats(name, s), floats(name, s + 9)], 1) for s in (1, 2, 3))
    packed = [v.view(np.uint32).reshape(-1) for v in (a, b, c)]
    for op, f in {"add": Fraction.__add__, "sub": Fraction.__sub__, "mul": Fraction.__mul__}.items():
        got = per_thread(f"{op}.rn.{name}x2 d, a, b;", *packed[:2], out=np.uint32).view(np.uint16)
        exact = [f(value_of(int(x), name), value_of(int(y), name)) for x, y in zip(a.flat, b.flat, strict=True)]
        assert not differing(got, exact, name)
    got = per_thread(f"fma.rn.{name}x2 d, a, b, c;", *packed, out=np.uint32).view(np.uint16)
    triples = zip(a.flat, b.flat, c.flat, strict=True)
    assert not differing(
        got, [value_of(int(x), name) * value_of(int(y), name) + value_of(int(z), name) for x, y, z in triples], name
    )


def test_special_values_and_flushing():
    a = np.array([np.nan, 1, np.inf, -0.0, 1e-40, -1e-40, 2, -3] * 4, np.float32)
    b = np.array([1, np.nan, -np.inf, 0.0, 1, 1, -2, -3] * 4, np.float32)
    assert per_thread("max.f32 d, a, b;", a, b, out=np.float32)[:3].tolist() == [1, 1, np.inf]
    assert np.isnan(per_thread("max.NaN.f32 d, a, b;", a, b, out=np.float32)[:2]).all()
    assert per_thread("mul.ftz.f32 d, a, b;", a, b, out=np.float32)[4:6].tolist() == [0, 0]
    assert per_thread("mul.f32 d, a, b;", a, b, out=np.float32)[4] == np.float32(1e-40)
    assert np.isnan(per_thread("add.f32 d, a, b;", a, b, out=np.float32)[2])


def test_functions():
    a = np.linspace(0.01, 30, THREADS).astype(np.float32)
    wide = a.astype(np.float64)
    for op, f in {
        "ex2.approx.ftz": np.exp2, "lg2.approx": np.log2, "sqrt.rn": np.sqrt, "rsqrt.approx": lambda x: x**-0.5,
        "rcp.rn": lambda x: 1 / x, "tanh.approx": np.tanh, "sin.approx": np.sin, "cos.approx": np.cos,
    }.items():  # fmt: skip
        assert np.array_equal(per_thread(f"{op}.f32 d, a;", a, out=np.float32), f(wide).astype(np.float32)), op
    for op in ("rn", "full", "approx"):
        got = per_thread(f"div.{op}.f32 d, b, a;", a, a[::-1].copy(), out=np.float32)
        assert np.array_equal(got, a[::-1] / a)


def test_convert_between_floats():
    a = floats("f32", 1)
    exact = [value_of(int(x), "f32") for x in a]
    assert not differing(per_thread("cvt.rn.f16.f32 d, a;", a, out=np.uint16), exact, "f16")
    assert not differing(per_thread("cvt.rn.bf16.f32 d, a;", a, out=np.uint16), exact, "bf16")
    for name in ("f16", "bf16"):
        h = floats(name, 2)
        assert not differing(
            per_thread(f"cvt.f32.{name} d, a;", h, out=np.uint32), [value_of(int(x), name) for x in h], "f32"
        )
        pair = per_thread(f"cvt.rn.{name}x2.f32 d, a, b;", a, floats("f32", 3), out=np.uint32).view(np.uint16)
        assert not differing(pair[1::2], exact, name)
        assert not differing(pair[::2], [value_of(int(x), "f32") for x in floats("f32", 3)], name)
    assert per_thread("cvt.rn.bf16.f32 d, a;", np.full(32, np.inf, np.float32), out=np.uint16)[0] == 0x7F80


def test_convert_float_to_integer():
    a = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 2.4, -2.6, 1e10, -1e10, np.nan, np.inf, -np.inf, 300, -300, 127.9] * 2
    )
    a = a.astype(np.float32)
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for kind, dtype in {"s32": np.int32, "u32": np.uint32, "s16": np.int16, "s64": np.int64, "u64": np.uint64}.items():
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        for mode, f in rounding.items():
            want = [
                0 if math.isnan(x) else (high if x > 0 else low) if math.isinf(x) else min(max(f(x), low), high)
                for x in a.tolist()
            ]
            got = per_thread(f"cvt.{mode}.{kind}.f32 d, a;", a, out=dtype)
            assert got.tolist() == want, (kind, mode)
    floor = per_thread("cvt.rmi.ftz.f32.f32 d, a;", a, out=np.float32)
    assert np.array_equal(floor, np.floor(a), equal_nan=True)


def test_convert_integers():
    a = integers(np.int32, 7)
    assert np.array_equal(per_thread("cvt.s64.s32 d, a;", a, out=np.int64), a.astype(np.int64))
    assert np.array_equal(per_thread("cvt.u64.u32 d, a;", a, out=np.int64), a.view(np.uint32).astype(np.int64))
    assert np.array_equal(per_thread("cvt.s8.s32 d, a;", a, out=np.int32), a.astype(np.int8).astype(np.int32))
    assert np.array_equal(per_thread("cvt.u8.s32 d, a;", a, out=np.int32), a.astype(np.uint8).astype(np.int32))
    assert np.array_equal(per_thread("cvt.s16.s8 d, a;", a, out=np.int32), a.astype(np.int8).astype(np.int32))
    assert np.array_equal(per_thread("cvt.u16.u32 d, a;", a, out=np.int32), a.astype(np.uint16).astype(np.int32))
    assert np.array_equal(per_thread("cvt.sat.s8.s32 d, a;", a, out=np.int32), np.clip(a, -128, 127))
    assert np.array_equal(per_thread("cvt.rn.f32.s32 d, a;", a, out=np.float32), a.astype(np.float32))
    assert not differing(per_thread("cvt.rn.f16.s32 d, a;", a, out=np.uint16), [Fraction(int(x)) for x in a], "f16")
    assert not differing(per_thread("cvt.rn.bf16.s32 d, a;", a, out=np.uint16), [Fraction(int(x)) for x in a], "bf16")


def test_float_comparison_knows_nan():
    a = np.array([1, 2, np.nan, np.nan] * 8, np.float32)
    b = np.array([2, 1, 0, np.nan] * 8, np.float32)
    for op, want in {"lt": [1, 0, 0, 0], "ltu": [1, 0, 1, 1], "ne": [1, 1, 0, 0], "neu": [1, 1, 1, 1]}.items():
        got = per_thread(f"setp.{op}.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", a, b, out=np.uint32)
        assert got.tolist() == want * 8, op
