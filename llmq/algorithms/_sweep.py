"""The column loop that GPTQ and coordinate descent share: round in order, feeding what each column lost to later ones.

For each column j of a weight, in order:   q_j = nearest(t_j + sum_(i<j) e_i F_ij),   e_j = w_j - decode(q_j).

Column by column that is one thin update for each column, which is bound by memory. So the columns are halved: of 8,
round 0 to 3, add their errors to columns 4 to 7 by one product, round 4 to 7; and 0 to 3 in the same way. What is left
when a part is small (a leaf) is rounded one by one, in a loop that numba compiles where the weight is on the CPU and
the values of its grid are evenly spaced; elsewhere the same loop runs in torch.
Not here: what t, w and F are (gptq.py, descent.py).
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmq.jit import compiled
from llmq.params import ROUNDER
from llmq.types import Grid, Parameters

_LEAF_TORCH = 16  # columns rounded one by one; their rank-1 updates stay in the L2 cache
_LEAF_COMPILED = 48  # measured best of 16 to 96 at N = 3072
_CHUNK = 256  # rows of W that a compiled leaf works on at a time: its columns stay in the L1 cache


def round_columns(W_KN: Tensor, T_KN: Tensor, F_KK: Tensor, grid: Grid, params: Parameters, group_K: Tensor) -> Tensor:
    """Round the rows of `T_KN` in order; return the codes, uint8 `[K, N]`.

    W_KN: float32, what the decoded codes are compared with. T_KN: float32, the targets before any feedback, consumed
    (it may not be `W_KN` itself). F_KK: float32, read above its diagonal. params: `[N, G]`. group_K: int64 `[K]`, the
    group of each row. All contiguous but F.
    """
    K, N = W_KN.shape
    codes_KN = torch.empty(K, N, dtype=torch.uint8, device=W_KN.device)
    error_KN = torch.empty_like(W_KN)
    lattice = grid.lattice(params) if W_KN.device.type == "cpu" else None
    leaf = compiled(_leaf, _KINDS) if lattice is not None else None
    if lattice is not None and leaf is not None:
        scale_GN, zero_GN, offset_GN = (p.T.contiguous() for p in lattice[:3])
        divisor_GN = torch.where(scale_GN == 0, torch.inf, scale_GN)
        tensors = (W_KN, T_KN, error_KN, codes_KN, divisor_GN, scale_GN, zero_GN, offset_GN, group_K)
        arrays = tuple(t.numpy() for t in tensors)

        def round_leaf(lo: int, hi: int) -> None:
            leaf(F_KK[lo:hi, lo:hi].contiguous().numpy(), *arrays, lo, hi, lattice.low, lattice.high)
    else:
        columns = tuple(t.unbind() for t in (W_KN, T_KN, error_KN, codes_KN))
        round_leaf = functools.partial(_torch_leaf, (grid, params.by_group(), group_K.tolist(), F_KK, T_KN, columns))
    for lo, mid, hi in _halves(0, K, _LEAF_COMPILED if leaf else _LEAF_TORCH):
        if mid < hi:
            T_KN[mid:hi].addmm_(F_KK[lo:mid, mid:hi].T, error_KN[lo:mid])
        else:
            round_leaf(lo, hi)
    return codes_KN


def _halves(lo: int, hi: int, leaf: int) -> Iterator[tuple[int, int, int]]:
    """Yield what to do, in order: `(lo, hi, hi)` rounds these columns, `(lo, mid, hi)` feeds errors past mid.

    A generator, since a recursive closure is a cycle that would keep its tensors until the next garbage collection.
    """
    if hi - lo <= leaf:
        yield lo, hi, hi
        return
    mid = (lo + hi) // 2
    yield from _halves(lo, mid, leaf)
    yield lo, mid, hi
    yield from _halves(mid, hi, leaf)


def _torch_leaf(args: tuple[Any, ...], lo: int, hi: int) -> None:
    grid, by_group, group, F_KK, T_KN, (weight, target, error, codes) = args
    for j in range(lo, hi):
        p = by_group[group[j]]
        code = grid.nearest(target[j], p)
        codes[j].copy_(code)
        torch.sub(weight[j], grid.decode(code, p), out=error[j])
        if j + 1 < hi:
            T_KN[j + 1 : hi].addr_(F_KK[j, j + 1 : hi], error[j])


def _leaf(F, W, T, E, codes, divisor, scale, zero, offset, group, lo, hi, low, high):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Round columns lo to hi, each first fed with the errors of those before it in the leaf. numba compiles this.

    F: the leaf's own diagonal block of the factor. divisor: the scale, infinite where that is 0. Adding and taking away
    1.5 * 2^23 rounds half to even, as the grids' `nearest` does, and vectorises.
    """
    magic = W.dtype.type(ROUNDER)
    N = W.shape[1]
    for first in range(0, N, _CHUNK):
        last = min(first + _CHUNK, N)
        for j in range(lo, hi):
            for i in range(lo, j):
                f = F[i - lo, j - lo]
                for n in range(first, last):
                    T[j, n] += E[i, n] * f
            g = group[j]
            for n in range(first, last):
                z, o = zero[g, n], offset[g, n]
                code = (((T[j, n] - o) / divisor[g, n] + magic) - magic) + z
                code = min(max(code, low), high)
                codes[j, n] = int(code)
                E[j, n] = W[j, n] - (scale[g, n] * (code - z) + o)


_KINDS = "f2 f2 f2 f2 u2 f2 f2 f2 f2 i1 i i f f"  # of _leaf's arguments
