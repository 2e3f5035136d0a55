"""Every instruction against a reference of its own: Python integers, and exact fractions rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_snippets import kernel, module, per_thread
from ptxsim import PtxError, simulate

THREADS = 128
EDGES = [0, 1, 2, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
INTEGERS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def integers(dtype, seed, count=THREADS):
    """Random bit patterns, edges first and in every pairing of small and large magnitude."""
    bits = np.dtype(dtype).itemsize * 8
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 1 << 64, count, dtype=np.uint64)
    values >>= draw.integers(0, 64, count, dtype=np.uint64)
    edges = np.roll(np.array(EDGES, np.uint64), seed)
    values[: len(edges)] = edges
    return (values & np.uint64((1 << bits) - 1)).astype(f"u{bits // 8}").view(dtype)


def wrap(value, dtype):
    bits = np.dtype(dtype).itemsize * 8
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: towards_zero(a, b) if b else -1,
    "rem": lambda a, b: a - b * towards_zero(a, b) if b else a,
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("op", BINARY)
def test_integer_arithmetic(op, kind):
    dtype = INTEGERS[kind]
    a, b = integers(dtype, 1), integers(dtype, 2)
    got = per_thread(f"{op}.{kind} d, a, b;", a, b, out=dtype)
    assert got.tolist() == [wrap(BINARY[op](int(x), int(y)), dtype) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind):
    dtype = INTEGERS[kind]
    double = np.dtype(f"{np.dtype(dtype).kind}{np.dtype(dtype).itemsize * 2}").type
    a, b, c = integers(dtype, 1), integers(dtype, 2), integers(double, 3)
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    sums = [wrap(p + int(z), double) for p, z in zip(products, c, strict=True)]
    shift = np.dtype(dtype).itemsize * 8
    assert per_thread(f"mul.wide.{kind} d, a, b;", a, b, out=double).tolist() == products
    assert per_thread(f"mad.wide.{kind} d, a, b, c;", a, b, c, out=double).tolist() == sums
    assert per_thread(f"mul.hi.{kind} d, a, b;", a, b, out=dtype).tolist() == [p >> shift for p in products]
    low = [wrap(p + int(z), dtype) for p, z in zip(products, a, strict=True)]
    assert per_thread(f"mad.lo.{kind} d, a, b, a;", a, b, out=dtype).tolist() == low


@pytest.mark.parametrize("op", ["and", "or", "xor"])
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(op, bits):
    dtype = np.dtype(f"u{bits // 8}").type
    a, b = integers(dtype, 1), integers(dtype, 2)
    f = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}[op]
    assert per_thread(f"{op}.b{bits} d, a, b;", a, b, out=dtype).tolist() == [
        f(int(x), int(y)) for x, y in zip(a, b, strict=True)
    ]
    assert per_thread(f"not.b{bits} d, a;", a, out=dtype).tolist() == [wrap(~int(x), dtype) for x in a]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_past_the_width(kind):
    bits = int(kind[1:])
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}").type
    a, n = integers(dtype, 1), np.arange(THREADS, dtype=np.uint32)
    right = [int(x) >> int(k) for x, k in zip(a, n, strict=True)]
    assert per_thread(f"shr.{kind} d, a, b;", a, n, out=dtype).tolist() == right
    if kind[0] == "b":
        left = [wrap(int(x) << int(k), dtype) for x, k in zip(a, n, strict=True)]
        assert per_thread(f"shl.{kind} d, a, b;", a, n, out=dtype).tolist() == left


def test_funnel_shift():
    a, b, n = integers(np.uint32, 1), integers(np.uint32, 2), np.arange(THREADS, dtype=np.uint32)
    for clamp, amount in (("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))):
        words = [(int(y) << 32 | int(x), amount(int(k))) for x, y, k in zip(a, b, n, strict=True)]
        left = per_thread(f"shf.l.{clamp}.b32 d, a, b, c;", a, b, n, out=np.uint32)
        right = per_thread(f"shf.r.{clamp}.b32 d, a, b, c;", a, b, n, out=np.uint32)
        assert left.tolist() == [(w << k) >> 32 & 0xFFFFFFFF for w, k in words]
        assert right.tolist() == [w >> k & 0xFFFFFFFF for w, k in words]


def reference_bfe(a, position, length, signed):
    """The PTX ISA's own pseudocode, bit by bit."""
    msb = 31
    bit = lambda i: a >> i & 1  # noqa: E731
    sign = 0 if not signed or length == 0 else bit(min(position + length - 1, msb))
    return sum((bit(position + i) if i < length and position + i <= msb else sign) << i for i in range(32))


@pytest.mark.parametrize("signed", [False, True])
def test_bit_fields(signed):
    a = integers(np.uint32, 4)
    draw = np.random.default_rng(0)
    position, length = draw.integers(0, 40, (2, THREADS)).astype(np.uint32)
    cases = list(zip(a.tolist(), position.tolist(), length.tolist(), strict=True))
    got = per_thread(f"bfe.{'s' if signed else 'u'}32 d, a, b, c;", a, position, length, out=np.uint32)
    assert got.tolist() == [reference_bfe(x, p, n, signed) for x, p, n in cases]
    got = per_thread("bfi.b32 d, a, 0x5A5AA5A5, b, c;", a, position, length, out=np.uint32)
    field = [((1 << n) - 1) << p & 0xFFFFFFFF for _, p, n in cases]
    assert got.tolist() == [0x5A5AA5A5 & ~f | (x << p & f) for (x, p, _), f in zip(cases, field, strict=True)]


def test_lop3_is_its_table():
    a, b, c = (integers(np.uint32, s, 32) for s in (1, 2, 3))
    for table in [0xEA, 0xF8, 0x80, 0x96, 0xE2, 0x1B, 0x00, 0xFF, 0x40, 0x08]:
        got = per_thread(f"lop3.b32 d, a, b, c, {table:#x};", a, b, c, out=np.uint32)
        for d, x, y, z in zip(got.tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
            for i in range(32):
                assert d >> i & 1 == table >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1


def test_prmt():
    a, b, s = (integers(np.uint32, seed) for seed in (1, 2, 3))
    got = per_thread("prmt.b32 d, a, b, c;", a, b, s, out=np.uint32)
    for d, x, y, sel in zip(got.tolist(), a.tolist(), b.tolist(), s.tolist(), strict=True):
        pool = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        for i in range(4):
            nibble = sel >> 4 * i & 15
            byte = pool[nibble & 7]
            assert d >> 8 * i & 255 == (255 * (byte >> 7) if nibble & 8 else byte)


def test_count_bits():
    a = integers(np.uint32, 5)
    assert per_thread("popc.b32 d, a;", a, out=np.uint32).tolist() == [int(x).bit_count() for x in a]
    assert per_thread("clz.b32 d, a;", a, out=np.uint32).tolist() == [32 - int(x).bit_length() for x in a]


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("op", COMPARE)
def test_compare_and_select(op):
    for kind, dtype in INTEGERS.items():
        a, b = integers(dtype, 1), integers(dtype, 2)
        b[::3] = a[::3]
        got = per_thread(f"setp.{op}.{kind} %p1, a, b; selp.b32 d, 7, 9, %p1;", a, b, out=np.uint32)
        assert got.tolist() == [7 if COMPARE[op](x, y) else 9 for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def test_float_comparison_knows_nan():
    a = np.array([1, 2, np.nan, np.nan] * 8, np.float32)
    b = np.array([2, 1, 0, np.nan] * 8, np.float32)
    for op, want in {"lt": [1, 0, 0, 0], "ltu": [1, 0, 1, 1], "ne": [1, 1, 0, 0], "neu": [1, 1, 1, 1]}.items():
        got = per_thread(f"setp.{op}.f32 %p1, a, b; selp.b32 d, 1, 0, %p1;", a, b, out=np.uint32)
        assert got.tolist() == want * 8, op


def test_predicates_combine():
    a = np.arange(32, dtype=np.uint32)
    got = per_thread(
        "setp.lt.u32 %p1, a, 20; setp.gt.and.u32 %p2, a, 10, %p1; not.pred %p3, %p2; setp.lo.or.u32 %p4, a, 3, %p2;"
        "xor.pred %p5, %p3, %p4; @%p5 mov.b32 d, 1; @!%p5 mov.b32 d, 0;",
        a,
        out=np.uint32,
    )
    inner = [10 < x < 20 for x in range(32)]
    assert got.tolist() == [int((not i) != (x < 3 or i)) for x, i in enumerate(inner)]


def test_mov_takes_apart_and_puts_together():
    a = integers(np.uint64, 6)
    statement = (
        "mov.b64 {%r1, %r2}, a; mov.b32 {%rs1, %rs2}, %r1; mov.b32 {%rs3, %rs4}, %r2;"
        "mov.b32 %r3, {%rs4, %rs1}; mov.b32 %r4, {%rs3, %rs2}; mov.b64 d, {%r3, %r4};"
    )
    want = []
    for x in a.tolist():
        h = [x >> 16 * i & 0xFFFF for i in range(4)]
        want.append(h[3] | h[0] << 16 | h[2] << 32 | h[1] << 48)
    assert per_thread(statement, a, out=np.uint64).tolist() == want


# Floats: (precision in bits, exponent of the smallest normal), rounded by hand from exact fractions.

FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126)}


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


def same(got, exact, name):
    """Compare bits with rounded fractions; the two zeros are one."""
    sign = 1 << (31 if name == "f32" else 15)
    want = [bits_of(e, name) for e in exact]
    assert [g if g != sign else 0 for g in got.tolist()] == [w if w != sign else 0 for w in want]


@pytest.mark.parametrize("name", FORMATS)
def test_float_arithmetic_rounds_once(name):
    a, b, c = floats(name, 1), floats(name, 2), floats(name, 3)
    dtype = a.dtype.type
    A, B, C = ([value_of(int(x), name) for x in v] for v in (a, b, c))
    products = [x * y for x, y in zip(A, B, strict=True)]
    same(per_thread(f"add.rn.{name} d, a, b;", a, b, out=dtype), [x + y for x, y in zip(A, B, strict=True)], name)
    same(per_thread(f"sub.{name} d, a, b;", a, b, out=dtype), [x - y for x, y in zip(A, B, strict=True)], name)
    same(per_thread(f"mul.{name} d, a, b;", a, b, out=dtype), products, name)
    fused = [p + z for p, z in zip(products, C, strict=True)]
    same(per_thread(f"fma.rn.{name} d, a, b, c;", a, b, c, out=dtype), fused, name)
    same(per_thread(f"min.{name} d, a, b;", a, b, out=dtype), [min(x, y) for x, y in zip(A, B, strict=True)], name)
    same(per_thread(f"max.{name} d, a, b;", a, b, out=dtype), [max(x, y) for x, y in zip(A, B, strict=True)], name)
    same(per_thread(f"neg.{name} d, a;", a, out=dtype), [-x for x in A], name)
    same(per_thread(f"abs.{name} d, a;", a, out=dtype), [abs(x) for x in A], name)


def test_fused_multiply_add_sees_what_a_float64_sum_loses():
    """a * b = 2**-24 - 2**-70: beside 1 + 2**-23 a float64 keeps the tie and drops what breaks it."""
    a, b, c = (np.full(32, v, np.float32) for v in (2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23))
    for sign in (1, -1):
        rounded_twice = (a.astype(np.float64) * b * sign + c * sign).astype(np.float32)
        got = per_thread("fma.rn.f32 d, a, b, c;", a, sign * b, sign * c, out=np.uint32)
        exact = sign * (Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0])))
        same(got, [exact] * 32, "f32")
        assert (got.view(np.float32) == sign * c).all() and (rounded_twice != sign * c).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_pairs_are_two_halves(name):
    a, b, c = (np.stack([floats(name, s), floats(name, s + 9)], 1) for s in (1, 2, 3))
    packed = [v.view(np.uint32).reshape(-1) for v in (a, b, c)]
    for op, f in {"add": Fraction.__add__, "sub": Fraction.__sub__, "mul": Fraction.__mul__}.items():
        got = per_thread(f"{op}.rn.{name}x2 d, a, b;", *packed[:2], out=np.uint32).view(np.uint16)
        exact = [f(value_of(int(x), name), value_of(int(y), name)) for x, y in zip(a.flat, b.flat, strict=True)]
        same(got, exact, name)
    got = per_thread(f"fma.rn.{name}x2 d, a, b, c;", *packed, out=np.uint32).view(np.uint16)
    triples = zip(a.flat, b.flat, c.flat, strict=True)
    same(got, [value_of(int(x), name) * value_of(int(y), name) + value_of(int(z), name) for x, y, z in triples], name)


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
    same(per_thread("cvt.rn.f16.f32 d, a;", a, out=np.uint16), exact, "f16")
    same(per_thread("cvt.rn.bf16.f32 d, a;", a, out=np.uint16), exact, "bf16")
    for name in ("f16", "bf16"):
        h = floats(name, 2)
        same(per_thread(f"cvt.f32.{name} d, a;", h, out=np.uint32), [value_of(int(x), name) for x in h], "f32")
        pair = per_thread(f"cvt.rn.{name}x2.f32 d, a, b;", a, floats("f32", 3), out=np.uint32).view(np.uint16)
        same(pair[1::2], exact, name)
        same(pair[::2], [value_of(int(x), "f32") for x in floats("f32", 3)], name)
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
    same(per_thread("cvt.rn.f16.s32 d, a;", a, out=np.uint16), [Fraction(int(x)) for x in a], "f16")
    same(per_thread("cvt.rn.bf16.s32 d, a;", a, out=np.uint16), [Fraction(int(x)) for x in a], "bf16")


@pytest.mark.parametrize(
    ("mode", "offset", "clamp", "origin"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("idx", 9, 31, lambda i: 9),
        ("down", 4, 31, lambda i: i + 4 if i + 4 < 32 else i),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("bfly", 1, 0x1C1F, lambda i: i ^ 1),  # segments of four lanes
        ("idx", 2, 0x1C1F, lambda i: i // 4 * 4 + 2),
        ("down", 2, 0x1803, lambda i: i + 2 if i % 8 + 2 <= 3 else i),
    ],
)
def test_shuffle(mode, offset, clamp, origin):
    a = np.arange(64, dtype=np.uint32) * 10
    got = per_thread(f"shfl.sync.{mode}.b32 d, a, {offset}, {clamp}, -1;", a, out=np.uint32)
    assert got.tolist() == [(w * 32 + origin(i)) * 10 for w in range(2) for i in range(32)]


# What is not known stops the run before it starts, with its line.


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("frob.b32 %r1, %r0;", "unknown instruction"),
        ("add.s32.sat %r1, %r0, 1;", "unknown instruction"),
        ("add.f64 %rd1, %rd1, %rd1;", "unknown instruction"),
        ("atom.global.add.u32 %r1, [%rd1], 1;", "unknown instruction"),
        ("add.s32 %r1, %r0, %q1;", "no declared register"),
        ("add.s32 %r1, %rs0, 1;", "has 16 bits"),
        ("add.s32 %r1, %r0;", "2 operands"),
        ("add.f32 %r1, %r0, 1;", "no constant of this type"),
        ("ld.global.frob.b32 %r1, [%rd1];", "unknown modifier frob"),
        ("ld.global.v2.b32 %r1, [%rd1];", "registers for v2"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 0x8, %r1;", "cp-size"),
        ("bar.sync 1;", "only `bar.sync 0`"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "not an mma"),
        ("cvt.rn.s32.f32 %r1, %r0;", "float to integer"),
        ("setp.lt.b32 %p1, %r0, 1;", "bits have no order"),
        ("bra $nowhere;", "unknown branch"),
        (".frob %r1;", "unknown directive"),
        ("add.s32 %r1, %r50, 1;", "before anything was written"),
    ],
)
def test_what_is_not_known_is_named(statement, message):
    body = "    mov.b32 %r2, 1;\n    " + statement
    line = module(body, 0, 32).splitlines().index("    " + statement) + 1
    with pytest.raises(PtxError, match=message) as caught:
        simulate(module(body, 0, 32), (1,), {}, 16)
    assert f"PTX line {line}" in str(caught.value)


def test_an_unknown_instruction_is_refused_even_where_nothing_runs_it():
    with pytest.raises(PtxError, match="unknown instruction"):
        kernel("    setp.eq.u32 %p1, %r0, 999;\n    @%p1 frob.b32 %r1, %r0;")


def test_a_register_never_written_is_poison_not_zero():
    a = np.arange(32, dtype=np.uint32)
    got = per_thread("setp.lt.u32 %p1, a, 4; @%p1 mov.b32 %r9, 5; mov.b32 d, %r9;", a, out=np.uint32)
    assert got.tolist() == [5] * 4 + [0xCDCDCDCD] * 28


def test_scopes_of_inline_assembly_do_not_share_registers():
    a = np.arange(32, dtype=np.uint32)
    statement = "{ .reg .b32 t; mov.b32 t, 5; { .reg .b32 t; mov.b32 t, 7; } add.u32 d, a, t; }"
    assert per_thread(statement, a, out=np.uint32).tolist() == list(range(5, 37))


# Matrices: each lane's registers are filled one element at a time from the PTX ISA's fragment formulas.


def fragments(A, B, C, per):
    """Return the registers of a warp, uint32: A `[32, 4]`, B `[32, 2]`, C `[32, 4]`."""
    k, bits = 8 * per, 32 // per
    a, b, c = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.uint32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * per):  # ISA: a_i for i = 0 .. 4 * per - 1
            r, e = i // per, i % per
            row = group if r in (0, 2) else group + 8
            column = thread * per + e + (k // 2 if r >= 2 else 0)
            a[lane, r] |= np.uint32(int(A[row, column]) << (bits * e))
        for i in range(2 * per):
            r, e = i // per, i % per
            b[lane, r] |= np.uint32(int(B[thread * per + e + (k // 2 if r else 0), group]) << (bits * e))
        for i in range(4):
            c[lane, i] = C[group + (8 if i >= 2 else 0), thread * 2 + (i & 1)]
    return a, b, c


@pytest.mark.parametrize(
    ("shape", "types", "per"),
    [
        ("m16n8k16", "f32.f16.f16.f32", 2),
        ("m16n8k16", "f32.bf16.bf16.f32", 2),
        ("m16n8k8", "f32.tf32.tf32.f32", 1),
        ("m16n8k32", "satfinite.s32.s8.s8.s32", 4),
        ("m16n8k32", "s32.s8.s8.s32", 4),
    ],
)
def test_mma(shape, types, per):
    draw = np.random.default_rng(3)
    k, width = 8 * per, 32 // per
    a, b = draw.integers(-100, 100, (16, k)), draw.integers(-100, 100, (k, 8))
    c = draw.integers(-1000, 1000, (16, 8))
    if "s8" in types:
        c[0] = 2**31 - 5
        a[0], b[:, 0] = 100, 100
    kind = types.split(".")[-2]
    if kind == "s8":
        A, B, C = a & 255, b & 255, c.astype(np.int32).view(np.uint32)
    elif kind == "f16":
        A, B = (m.astype(np.float16).view(np.uint16) for m in (a, b))
    else:  # small integers are exact in bfloat16 and tf32: the upper bits of their float32
        A, B = (m.astype(np.float32).view(np.uint32) >> (32 - width) for m in (a, b))
    if kind != "s8":
        C = c.astype(np.float32).view(np.uint32)
    registers = np.concatenate(fragments(A, B, C, per), axis=1)
    loads = "".join(f"    ld.global.b32 %r{10 + i}, [%rd9+{4 * i}];\n" for i in range(10))
    body = f"    mad.wide.u32 %rd9, %r0, 40, %rd0;\n{loads}"
    body += f"    mma.sync.aligned.{shape}.row.col.{types} {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, "
    body += "{%r14, %r15}, {%r16, %r17, %r18, %r19};\n    mad.wide.u32 %rd8, %r0, 16, %rd1;\n"
    body += "    st.global.v4.b32 [%rd8], {%r20, %r21, %r22, %r23};\n"
    got = kernel(body, registers, np.zeros((32, 4), np.uint32)).array("p1")
    want = a @ b + c
    if kind == "s8":
        wrapped = (want & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        want = np.clip(want, -(2**31), 2**31 - 1) if "satfinite" in types else wrapped
        expected = want.astype(np.int32).view(np.uint32)
    else:
        expected = want.astype(np.float32).view(np.uint32)
    assert np.array_equal(got, fragments(A, B, expected, per)[2])


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans):
    """Lane l of matrix i gets elements 2 (l % 4) and the next of row l // 4; transposed, of column l // 4."""
    words = np.arange(4 * 8 * 8, dtype=np.uint16)
    body = """
    mov.b32 %r90, global_smem;
    mad.lo.u32 %r91, %r0, 16, %r90;
    mad.wide.u32 %rd9, %r0, 16, %rd0;
    cp.async.cg.shared.global [%r91], [%rd9], 0x10;
    cp.async.wait_all;
    ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r91];
    mad.wide.u32 %rd8, %r0, 16, %rd1;
    st.global.v4.b32 [%rd8], {{%r1, %r2, %r3, %r4}};
"""
    run = kernel(body.format(".trans" if trans else ""), words, np.zeros((32, 8), np.uint16), shared=512)
    got = run.array("p1").reshape(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            for e in range(2):
                row, column = lane // 4, lane % 4 * 2 + e
                assert got[lane, i, e] == i * 64 + (column * 8 + row if trans else row * 8 + column)
    assert not run.faults
