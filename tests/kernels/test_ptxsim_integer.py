"""Integer, bit and predicate instructions against Python integers; what is not known is refused by name and line."""

import numpy as np
import pytest
from ptx_snippets import integers, kernel, module, per_thread
from ptxsim import PtxError, simulate

THREADS = 128
INTEGERS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


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
