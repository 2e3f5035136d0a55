"""The machine code of intloop.py: integer dot products of packed codes and 16-bit activations. Importing needs numba.

A word of 16 bits holds 16/F codes of F bits; a *segment* is L words side by side, and code q of word i belongs to its
column q L + i. Over a segment, with integers `a` and a scale `t` of the activations,

    sum_k code_k x_k  =  t sum_q sum_i ((word_i >> F q) mod 2^F) a_(q L + i)

whose sums are multiply-adds of neighbours, 16 x 16 bits -> 32 bits, in L/2 lanes. A lane's largest is of 8-bit codes,
2 x 2 x 255 x 32767 < 2^31. Nothing is rounded but the activations, to 2^-16 of the largest of their segment, and sums
in float32.

    words int16 [N, S, L]   scale float32 [N, G]   zero uint8 [N, G], or [1, G] where all rows agree

Not here: packing, threads, which of the two products is taken (intloop.py).
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

_INFINITE, _TINY = np.int32(0x7F800000), np.float32(2**-120)
_LAYOUTS = (2, 4, 8), (8, 16), (1, 4)
"""F, L and rows of x that there is code for, in every combination."""
_PANEL = 16  # rows of W that meet all rows of x before the next: they stay in cache
_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


def _pairs(b, words, x):
    """Return, as L/2 integers of 32 bits, `words[2i] x[2i] + words[2i + 1] x[2i + 1]` of vectors of 16 bits."""
    L = words.type.count
    wide = ir.VectorType(_I32, L // 2)
    features = {} if numba.config.CPU_NAME else llvmlite.binding.get_host_cpu_features()
    for feature, lanes, name in (("avx2", 16, "llvm.x86.avx2.pmadd.wd"), ("sse2", 8, "llvm.x86.sse2.pmadd.wd")):
        if features.get(feature) and lanes == L:
            kind = ir.FunctionType(wide, [words.type, x.type])
            return b.call(cgutils.get_or_insert_function(b.module, kind, name), [words, x])
    products = []
    for first in (0, 1):
        places = ir.Constant(wide, list(range(first, L, 2)))
        products.append(b.mul(*(b.sext(b.shuffle_vector(v, v, places), wide) for v in (words, x))))
    return b.add(*products)


def _fields(b, words, F):
    """Return the 16/F vectors of codes that a vector of words holds."""

    def constant(value):
        return ir.Constant(words.type, [value] * words.type.count)

    shifted = [words, *(b.lshr(words, constant(shift)) for shift in range(F, 16, F))]
    return [*(b.and_(w, constant(2**F - 1)) for w in shifted[:-1]), shifted[-1]]


def _sum(b, terms):
    """Add vectors up as a tree."""
    while len(terms) > 1:
        terms = [b.add(*terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def _load(b, address, index, kind):
    """Return the value of a kind at an index in its units; only its numbers are aligned."""
    value = b.load(b.gep(b.inttoptr(address, kind.as_pointer()), [index]))
    value.align = 2 if isinstance(kind, ir.VectorType) else 4
    return value


def _dots_of(b, layout, words, x, scale, group, x_scale, S, out):
    """Emit `_dots` for one layout."""
    F, L, R = layout
    kind, half, size = ir.VectorType(_I16, L), ir.VectorType(_F32, L // 2), S.type
    totals = [cgutils.alloca_once(b, half) for _ in range(R)]
    for total in totals:
        b.store(ir.Constant(half, [0.0] * (L // 2)), total)
    with cgutils.for_range(b, S) as loop:
        codes = _fields(b, _load(b, words, loop.index, kind), F)
        s = _load(b, scale, b.zext(_load(b, group, loop.index, _I32), size), _F32)
        for r, total in enumerate(totals):
            place = b.add(b.mul(S, ir.Constant(size, r)), loop.index)
            first = b.mul(place, ir.Constant(size, len(codes)))
            near = [_load(b, x, b.add(first, ir.Constant(size, q)), kind) for q in range(len(codes))]
            dot = b.sitofp(_sum(b, [_pairs(b, *pair) for pair in zip(codes, near, strict=True)]), half)
            factor = b.fmul(s, _load(b, x_scale, place, _F32))
            spread = b.insert_element(ir.Constant(half, ir.Undefined), factor, ir.Constant(_I32, 0))
            spread = b.shuffle_vector(spread, spread, ir.Constant(ir.VectorType(_I32, L // 2), None))
            term = b.fmul(dot, spread, flags=("contract",))
            b.store(b.fadd(b.load(total), term, flags=("contract",)), total)
    kind = ir.FunctionType(_F32, [_F32, half])
    add_up = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{L // 2}f32")
    for r, total in enumerate(totals):
        y = b.call(add_up, [ir.Constant(_F32, 0.0), b.load(total)], fastmath=("reassoc",))
        b.store(y, b.gep(b.inttoptr(out, _F32.as_pointer()), [ir.Constant(size, r)]))


@intrinsic
def _dots(_typing, field, lanes, rows, words, x, scale, group, x_scale, S, out):
    """Store at `out`, float32 [rows], the dots of a row of words with rows of x, 1 or 4; addresses are integers.

    x int16 [rows, S, 16/field, lanes], x_scale float32 [rows, S], scale float32 [G], group int32 [S] (whose scale).
    """

    def generate(context, b, _signature, arguments):
        for layout in itertools.product(*_LAYOUTS):
            asked = [b.icmp_signed("==", a, ir.Constant(a.type, n)) for a, n in zip(arguments, layout, strict=False)]
            with b.if_then(b.and_(b.and_(*asked[:2]), asked[2])):
                _dots_of(b, layout, *arguments[3:])
        return context.get_dummy_value()

    sizes, address = types.intp, types.uintp
    return types.void(sizes, sizes, sizes, address, address, address, address, address, sizes, address), generate


def _jit(function):
    return cached(numba.njit, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})(function)


@_jit
def _round(x, group, a, t, sums):
    """Fill a, t and sums `[M, G]` with integers, their scales and the sums over groups of what they stand for."""
    bits = x.view(np.int32)
    for m in range(x.shape[0]):
        for s in range(x.shape[1]):
            top = np.int32(0)  # of the magnitudes as integers, which order them alike and which vectors can compare
            for k in range(x.shape[2]):
                top = np.int32(max(top, np.int32(bits[m, s, k] & np.int32(0x7FFFFFFF))))
            step = np.int32(top).view(np.float32) / np.float32(32767) if top < _INFINITE else np.float32(np.nan)
            inverse = np.float32(1) / step if step > _TINY else np.float32(0)
            total = np.int32(0)
            for k in range(x.shape[2]):
                n = np.int32(np.rint(x[m, s, k] * inverse))
                a[m, s, k] = n
                total = np.int32(total + n)
            t[m, s] = step
            sums[m, group[s]] += step * np.float32(total)


@_jit
def few_rows(field, words, scale, zero, x, y, first, last):
    """Fill `y[:, first:last]` with `x @ W^T`; x float32 `[M, S, columns of a segment]`, y float32 `[M, N]`."""
    M, (S, L), G = x.shape[0], words.shape[1:], scale.shape[1]
    rows = 1 if M == 1 else -(-M // 4) * 4
    a, t = np.zeros((rows, S, x.shape[2]), np.int16), np.zeros((rows, S), np.float32)
    sums, dots = np.zeros((M, G), np.float32), np.empty(4, np.float32)
    group = (np.arange(S) // (S // G)).astype(np.int32)
    _round(x, group, a, t, sums)
    for begin in range(first, last, _PANEL):
        for m in range(0, M, 4):
            for n in range(begin, min(begin + _PANEL, last)):
                w, s = words[n].ctypes.data, scale[n].ctypes.data
                x_near, t_near = a[m].ctypes.data, t[m].ctypes.data
                _dots(field, L, min(rows, 4), w, x_near, s, group.ctypes.data, t_near, S, dots.ctypes.data)
                z = zero[min(n, zero.shape[0] - 1)]
                for r in range(m, min(m + 4, M)):
                    offset = np.float32(0)
                    for g in range(G):
                        offset += scale[n, g] * np.float32(z[g]) * sums[r, g]
                    y[r, n] = dots[r - m] - offset


@_jit
def decode(field, words, scale, zero, W, first, last):
    """Fill rows `first` to `last` of W, float32 `[N, S, 16/F, L]`."""
    P, mask = words.shape[1] // scale.shape[1], np.int32(2**field - 1)
    for n in range(first, last):
        for s in range(words.shape[1]):
            factor = scale[n, s // P]
            z = np.float32(zero[min(n, zero.shape[0] - 1), s // P])
            for q in range(W.shape[2]):
                for i in range(words.shape[2]):
                    W[n, s, q, i] = factor * (np.float32(np.int32(words[n, s, i]) >> (field * q) & mask) - z)


@_jit
def _part(data, thread, threads):
    """Run one thread's share of `decode`, whose array W comes fourth, or of `few_rows`, with x and y."""
    sizes = carray(data[0], 8, np.int64)
    field, N, S, L, G, Z, M = sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]
    words, scale = carray(data[1], (N, S, L), np.int16), carray(data[2], (N, G), np.float32)
    zero, begin, end = carray(data[3], (Z, G), np.uint8), N * thread // threads, N * (thread + 1) // threads
    if sizes[0]:
        decode(field, words, scale, zero, carray(data[4], (N, S, 16 // field, L), np.float32), begin, end)
    else:
        x, y = carray(data[4], (M, S, 16 // field * L), np.float32), carray(data[5], (M, N), np.float32)
        few_rows(field, words, scale, zero, x, y, begin, end)


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
