"""The machine code of floatloop.py: products with packed E2M1 and E4M3 codes. Importing needs numba.

E2M1 (4 bits). Twice a value is an integer of -12 to 12, so the dot products are those of _int_loops.py: a word of 16
bits holds 4 codes, a segment is 16 words, 64 columns, and x is rounded to 16 bits of the largest in its segment. It has
P = 4 scales (for 16 columns each) or 2 (for 32), and the words of a scale are neighbours, so that the lanes of a vector
have theirs side by side. x comes in the order of the words, `[S, 4, 16]` for what a file has as `[S, P, 4, 16 / P]`:

    sum_k value_k x_k  =  t / 2 sum_i scale_i sum_q 2 value((word_i >> 4 q) mod 2^4) a_(16 q + i)

E4M3 (8 bits). Moved up, the bits are those of a float32 2^-120 times as large, which float32 x is multiplied with.

    codes int16 [N, S, 16] or uint8 [N, K]   scale float32 [N, G], or stored uint8 [N, G] into a table float32 [256]

Not here: packing, threads, which of the two products is taken (floatloop.py).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,call-arg,arg-type,attr-defined"
# ruff: noqa: PLR0913, PLR0917  # numba compiles functions, not objects

import itertools
from functools import cache

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmq.jit import cached
from llmq.runtime.backends import _team
from llmq.runtime.backends._int_loops import _load, _pairs, _round, _sum

_LAYOUTS = (2, 4), (1, 4)
"""P and rows of x that there is code for, in every combination."""
_UNIT = np.float32(2.0**-9)  # sums are of twice the values, 2^8 times as large
_SMALL = np.float32(2.0**120)
_PANEL = 16  # rows of W that meet all rows of x before the next: they stay in cache
_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_WORDS, _BYTES, _HALF = ir.VectorType(_I16, 16), ir.VectorType(_I8, 32), ir.VectorType(_F32, 8)
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)


def _doubled(b, words, q):
    """Return 2^9 times the values of field q of a vector of words, as integers of 16 bits."""

    def constant(value):
        return ir.Constant(_WORDS, [value] * 16)

    up = 8 - 4 * q
    moved = b.shl(words, constant(up)) if up >= 0 else b.lshr(words, constant(-up))
    features = {} if numba.config.CPU_NAME else llvmlite.binding.get_host_cpu_features()
    if features.get("avx2"):  # a table looked up byte by byte, where the lower of a word finds 0
        index = b.bitcast(b.and_(moved, constant(0x0F00)), _BYTES)
        table = ir.Constant(_BYTES, [*_TWICE, *(-v for v in _TWICE)] * 2)
        look = cgutils.get_or_insert_function(b.module, ir.FunctionType(_BYTES, [_BYTES] * 2), "llvm.x86.avx2.pshuf.b")
        return b.bitcast(b.call(look, [table, index]), _WORDS)
    code, total = b.and_(moved, constant(0x0700)), ir.Constant(_WORDS, [0] * 16)
    for threshold, slope in ((0, 1), (0x400, 1), (0x600, 2)):  # the table, as a sum of ramps
        above = b.sub(code, constant(threshold))
        positive = b.select(b.icmp_signed(">", above, constant(0)), above, constant(0))
        total = b.add(total, b.mul(positive, constant(slope)))
    negative = b.icmp_signed("!=", b.and_(moved, constant(0x0800)), constant(0))
    return b.select(negative, b.neg(total), total)


def _dots_of(b, layout, words, x, scale, x_scale, S, out):
    """Emit `_dots` for one layout."""
    P, R = layout
    size, scales = S.type, ir.VectorType(_F32, P)
    wide = ir.Constant(ir.VectorType(_I32, 8), [i * P // 8 for i in range(8)])
    totals = [cgutils.alloca_once(b, _HALF) for _ in range(R)]
    for total in totals:
        b.store(ir.Constant(_HALF, [0.0] * 8), total)
    with cgutils.for_range(b, S) as loop:
        packed = _load(b, words, loop.index, _WORDS)
        values = [_doubled(b, packed, q) for q in range(4)]
        s = _load(b, scale, loop.index, scales)
        s = b.shuffle_vector(s, s, wide)
        for r, total in enumerate(totals):
            place = b.add(b.mul(S, ir.Constant(size, r)), loop.index)
            first = b.mul(place, ir.Constant(size, 4))
            near = [_load(b, x, b.add(first, ir.Constant(size, q)), _WORDS) for q in range(4)]
            dot = b.sitofp(_sum(b, [_pairs(b, *pair) for pair in zip(values, near, strict=True)]), _HALF)
            step = b.insert_element(ir.Constant(_HALF, ir.Undefined), _load(b, x_scale, place, _F32), _I32(0))
            step = b.shuffle_vector(step, step, ir.Constant(ir.VectorType(_I32, 8), None))
            term = b.fmul(dot, b.fmul(s, step), flags=("contract",))
            b.store(b.fadd(b.load(total), term, flags=("contract",)), total)
    kind = ir.FunctionType(_F32, [_F32, _HALF])
    add_up = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v8f32")
    for r, total in enumerate(totals):
        y = b.call(add_up, [ir.Constant(_F32, 0.0), b.load(total)], fastmath=("reassoc",))
        b.store(y, b.gep(b.inttoptr(out, _F32.as_pointer()), [ir.Constant(size, r)]))


@intrinsic
def _dots(_typing, per_segment, rows, words, x, scale, x_scale, S, out):
    """Store at `out`, float32 [rows], 2^9 times the dots of a row of words with rows of x, 1 or 4.

    Addresses are integers: x int16 [rows, S, 4, 16], x_scale float32 [rows, S], scale float32 [S, per_segment].
    """

    def generate(context, b, _signature, arguments):
        for layout in itertools.product(*_LAYOUTS):
            asked = [b.icmp_signed("==", a, ir.Constant(a.type, n)) for a, n in zip(arguments, layout, strict=False)]
            with b.if_then(b.and_(*asked)):
                _dots_of(b, layout, *arguments[2:])
        return context.get_dummy_value()

    sizes, address = types.intp, types.uintp
    return types.void(sizes, sizes, address, address, address, address, sizes, address), generate


def _jit(function):
    return cached(numba.njit, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(function)


@_jit
def _scales(n, scale, stored, out):
    """Fill `out` with the scales of row n; `scale` is the table where some are stored."""
    for g in range(len(out)):
        out[g] = scale[0, stored[n, g]] if stored.shape[1] else scale[n, g]


@_jit
def few_e2m1(words, scale, stored, x, y, first, last):
    """Fill `y[:, first:last]` with `x @ W^T`; x float32 `[M, S, 64]`, y float32 `[M, N]`."""
    M, S = x.shape[:2]
    rows = 1 if M == 1 else -(-M // 4) * 4
    a, t = np.zeros((rows, S, 64), np.int16), np.zeros((rows, S), np.float32)
    _round(x, np.zeros(S, np.int32), a, t, np.zeros((M, 1), np.float32))
    s, dots = np.empty((_PANEL, stored.shape[1]), np.float32), np.empty(4, np.float32)
    for begin in range(first, last, _PANEL):
        end = min(begin + _PANEL, last)
        for n in range(begin, end):
            _scales(n, scale, stored, s[n - begin])
        for m in range(0, M, 4):
            a_near, t_near = a[m].ctypes.data, t[m].ctypes.data
            for n in range(begin, end):
                w, s_near = words[n].ctypes.data, s[n - begin].ctypes.data
                _dots(stored.shape[1] // S, min(rows, 4), w, a_near, s_near, t_near, S, dots.ctypes.data)
                for r in range(m, min(m + 4, M)):
                    y[r, n] = dots[r - m] * _UNIT


@_jit
def decode_e2m1(words, scale, stored, W, first, last):
    """Fill rows `first` to `last` of W, float32 `[N, S, 4, 16]`."""
    S = words.shape[1]
    P = stored.shape[1] // S
    s, spread = np.empty(stored.shape[1], np.float32), np.empty(16, np.float32)
    for n in range(first, last):
        _scales(n, scale, stored, s)
        for segment in range(S):
            for i in range(16):
                spread[i] = s[segment * P + i * P // 16] * np.float32(0.5)
            for q in range(4):
                for i in range(16):
                    code = np.int32(words[n, segment, i]) >> (4 * q)
                    m = np.int32(code & 7)
                    twice = np.int32(m + max(m - np.int32(4), np.int32(0)) + 2 * max(m - np.int32(6), np.int32(0)))
                    W[n, segment, q, i] = np.float32(-twice if code & 8 else twice) * spread[i]


@_jit
def _e4m3(code):
    """Return 2^-120 times the value of a byte with its sign."""
    return np.int32((np.int32(code) << 20) & np.int32(-0x78000001)).view(np.float32)


@_jit
def few_e4m3(codes, scale, stored, x, y, first, last):
    """Fill `y[:, first:last]` with `x @ W^T`; x float32 `[M, G, columns of a scale]`, y float32 `[M, N]`."""
    M, G, width = x.shape
    s, w = np.empty(G, np.float32), np.empty((G, width), np.float32)
    for n in range(first, last):
        _scales(n, scale, stored, s)
        for g in range(G):
            for k in range(width):
                w[g, k] = _e4m3(codes[n, g, k]) * _SMALL
        for m in range(M):
            total = np.float32(0)
            for g in range(G):
                part = np.float32(0)
                for k in range(width):
                    part += w[g, k] * x[m, g, k]
                total += s[g] * part
            y[m, n] = total


@_jit
def decode_e4m3(codes, scale, stored, W, first, last):
    """Fill rows `first` to `last` of W, float32 `[N, G, columns of a scale]`."""
    s = np.empty(codes.shape[1], np.float32)
    for n in range(first, last):
        _scales(n, scale, stored, s)
        for g in range(codes.shape[1]):
            for k in range(codes.shape[2]):
                W[n, g, k] = _e4m3(codes[n, g, k]) * _SMALL * s[g]


@_jit
def _part(data, thread, threads):
    """Run one thread's share of a loop; W comes fourth where it decodes, else x and y."""
    sizes = carray(data[0], 8, np.int64)
    bits, N, K, G, kept, stride, M = sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]
    begin, end = N * thread // threads, N * (thread + 1) // threads
    scale, stored = carray(data[2], (N if kept == 0 else 1, stride), np.float32), carray(data[3], (N, kept), np.uint8)
    if bits == 4:
        words = carray(data[1], (N, K // 64, 16), np.int16)
        if sizes[0]:
            decode_e2m1(words, scale, stored, carray(data[4], (N, K // 64, 4, 16), np.float32), begin, end)
        else:
            x, y = carray(data[4], (M, K // 64, 64), np.float32), carray(data[5], (M, N), np.float32)
            few_e2m1(words, scale, stored, x, y, begin, end)
    else:
        codes = carray(data[1], (N, G, K // G), np.int8)
        if sizes[0]:
            decode_e4m3(codes, scale, stored, carray(data[4], (N, G, K // G), np.float32), begin, end)
        else:
            x, y = carray(data[4], (M, G, K // G), np.float32), carray(data[5], (M, N), np.float32)
            few_e4m3(codes, scale, stored, x, y, begin, end)


@cached(numba.cfunc, _team.ENTRY)
def _one_thread(data):
    _part(data, np.int64(0), np.int64(1))


def one_thread() -> int:
    """See _team.py."""
    return int(_one_thread.address)


@cache
def of_many() -> int:
    """See _team.py."""

    @cached(numba.cfunc, _team.ENTRY)
    def _of_many(data):
        _part(data, np.int64(_team.thread()), np.int64(_team.threads()))

    return int(_of_many.address)
