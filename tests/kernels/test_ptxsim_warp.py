"""Shuffles, redux, ldmatrix and mma against the PTX ISA's formulas, lane by lane."""

import numpy as np
import pytest
from ptx_snippets import integers, kernel, per_thread
from ptxsim import PtxError


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


@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize(("op", "over"), [("add", sum), ("min", min), ("max", max)])
def test_redux(op, over, kind):
    a = integers(np.int32 if kind == "s32" else np.uint32, seed=1, count=64)
    got = per_thread(f"redux.sync.{op}.{kind} d, a, 0xffffffff;", a, out=np.uint32)
    for warp in (slice(0, 32), slice(32, 64)):
        assert got[warp].tolist() == [over(a[warp].tolist()) & 0xFFFFFFFF] * 32
    with pytest.raises(PtxError, match="whole warp"):
        per_thread(f"redux.sync.{op}.{kind} d, a, 0xffff;", a, out=np.uint32)


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
