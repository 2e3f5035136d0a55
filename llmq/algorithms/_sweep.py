"""The column loop that GPTQ and coordinate descent share: round in order, feeding what each column lost to later ones.

For each column j of a weight, in order:   q_j = nearest(t_j + sum_(i<j) e_i F_ij),   e_j = w_j - decode(q_j).

Column by column that is one thin update for each column, which is bound by memory. So the columns are halved: of 8,
round 0 to 3, add their errors to columns 4 to 7 by one product, round 4 to 7; and 0 to 3 in the same way. What is left
when a part is small (a leaf) is rounded one by one. Where a grid says what its values are (`Grid.lattice`), a leaf is
a loop that numba compiles on the CPU, and one launch of a Triton kernel on a GPU; elsewhere that loop runs in torch.
The compiled ones write the ranks of values that are a table; at the end these become codes.
Not here: what t, w and F are (gptq.py, descent.py), the kernel (llmq_kernels/panel.py).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmq.gpu import runs_kernels
from llmq.jit import compiled
from llmq.params import ROUNDER
from llmq.types import Grid, Lattice, Parameters

_LEAF_TORCH = 16  # columns rounded one by one; their rank-1 updates stay in the L2 cache
_LEAF_COMPILED = 48  # measured best of 16 to 96 at N = 3072
_CHUNK = 256  # rows of W that a compiled leaf works on at a time: its columns stay in the L1 cache


class _Sweep(NamedTuple):
    """What a sweep reads and writes: see `round_columns`. E_KN: the errors of the columns that were rounded."""

    W_KN: Tensor
    T_KN: Tensor
    F_KK: Tensor
    E_KN: Tensor
    codes: Tensor
    group: Tensor


class _Leaf(NamedTuple):
    """What rounds columns lo to hi, how many at most, and a number that theirs is a multiple of but for the last.

    codes: those of the ranks that it writes, None where it writes codes.
    """

    round: Callable[[int, int], None]
    width: int
    step: int = 1
    codes: Tensor | None = None


def round_columns(W_KN: Tensor, T_KN: Tensor, F_KK: Tensor, grid: Grid, params: Parameters, group_K: Tensor) -> Tensor:
    """Round the rows of `T_KN` in order; return the codes, uint8 `[K, N]`.

    W_KN: float32, what the decoded codes are compared with. T_KN: float32, the targets before any feedback, consumed
    (it may not be `W_KN` itself). F_KK: float32, read above its diagonal. params: `[N, G]`. group_K: int64 `[K]`, the
    group of each row. All contiguous but F.
    """
    codes_KN = torch.empty(W_KN.shape, dtype=torch.uint8, device=W_KN.device)
    sweep = _Sweep(W_KN, T_KN, F_KK, torch.empty_like(W_KN), codes_KN, group_K)
    leaf = _leaf(sweep, grid, params)
    for done, fed in halves(0, len(W_KN), leaf.width, leaf.step):
        if done == fed:
            leaf.round(done.start, done.stop)
        else:
            T_KN[fed].addmm_(F_KK[done, fed].T, sweep.E_KN[done])
    return codes_KN if leaf.codes is None else looked_up(leaf.codes, codes_KN)


def looked_up(table: Tensor, at: Tensor) -> Tensor:
    """Return the entries of a table of codes or ranks, uint8 `[L]`, at uint8 `at`."""
    return table.to(at.device)[at.int()]


def halves(lo: int, hi: int, width: int, step: int = 1, *, back: bool = False) -> Iterator[tuple[slice, slice]]:
    """Yield what to do, in order: `(a, a)` works on these columns, `(a, b)` tells columns b what became of a.

    width: how many columns are worked on at a time. step: where they are cut, in multiples of it. back: whether earlier
    columns are told of later ones too.
    A generator, since a recursive closure is a cycle that would keep its tensors until the next garbage collection.
    """
    if hi - lo <= width:
        yield slice(lo, hi), slice(lo, hi)
        return
    mid = lo + max(step, (hi - lo) // (2 * step) * step)
    yield from halves(lo, mid, width, step, back=back)
    yield slice(lo, mid), slice(mid, hi)
    yield from halves(mid, hi, width, step, back=back)
    if back:
        yield slice(mid, hi), slice(lo, mid)


def _leaf(sweep: _Sweep, grid: Grid, params: Parameters) -> _Leaf:
    """Return what rounds a few columns one by one: the quickest that there is for the device and the grid."""
    lattice = grid.lattice(params)
    if lattice is not None:
        if sweep.W_KN.device.type == "cpu" and (loop := compiled(_loop, _KINDS)):
            return _compiled_leaf(sweep, lattice, loop)
        if runs_kernels(sweep.W_KN.device, "columns are rounded one by one"):
            return _kernel_leaf(sweep, lattice)
    return _Leaf(partial(_torch_leaf, sweep, grid, params.by_group(), sweep.group.tolist()), _LEAF_TORCH)


def _compiled_leaf(sweep: _Sweep, lattice: Lattice, loop: Callable[..., None]) -> _Leaf:
    W_KN, T_KN, F_KK, E_KN, codes_KN, group_K = sweep
    scale_GN, zero_GN, offset_GN = (p.T.contiguous() for p in lattice[:3])
    divisor_GN = torch.where(scale_GN == 0, torch.inf, scale_GN)
    tensors = (W_KN, T_KN, E_KN, codes_KN, divisor_GN, scale_GN, zero_GN, offset_GN, *lattice.table(), group_K)
    arrays = tuple(t.numpy() for t in tensors)

    def work(lo: int, hi: int) -> None:
        loop(F_KK[lo:hi, lo:hi].contiguous().numpy(), *arrays, lo, hi, lattice.low, lattice.high)

    return _Leaf(work, _LEAF_COMPILED, codes=lattice.levels and lattice.levels.code)


def _kernel_leaf(sweep: _Sweep, lattice: Lattice) -> _Leaf:
    from llmq_kernels.panel import WIDTH, round_panel

    W_KN, T_KN, F_KK, E_KN, codes_KN, group_K = sweep
    values = (*(p.T.contiguous() for p in lattice[:3]), *lattice.table(), lattice.low, lattice.high)

    def work(lo: int, hi: int) -> None:
        at = slice(lo, hi)
        round_panel(W_KN[at], T_KN[at], F_KK[at, at], group_K[at], *values, E_KN[at], codes_KN[at])

    return _Leaf(work, WIDTH, WIDTH, lattice.levels and lattice.levels.code)


def _torch_leaf(sweep: _Sweep, grid: Grid, by_group: list[Parameters], group: list[int], lo: int, hi: int) -> None:
    W_KN, T_KN, F_KK, E_KN, codes_KN, _ = sweep
    for j in range(lo, hi):
        p = by_group[group[j]]
        code = grid.nearest(T_KN[j], p)
        codes_KN[j].copy_(code)
        torch.sub(W_KN[j], grid.decode(code, p), out=E_KN[j])
        if j + 1 < hi:
            T_KN[j + 1 : hi].addr_(F_KK[j, j + 1 : hi], E_KN[j])


def _loop(F, W, T, E, codes, divisor, scale, zero, offset, value, edge, group, lo, hi, low, high):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Round columns lo to hi, each first fed with the errors of those before it in the leaf. numba compiles this.

    F: the leaf's own diagonal block of the factor. divisor: the scale, infinite where that is 0. Adding and taking away
    1.5 * 2^23 rounds half to even, as the grids' `nearest` does, and vectorises. In a table (value, edge) the rank is
    found bit by bit, for all rows at once.
    """
    magic = W.dtype.type(ROUNDER)
    N = W.shape[1]
    rank = np.empty(_CHUNK, np.int32)
    for first in range(0, N, _CHUNK):
        last = min(first + _CHUNK, N)
        for j in range(lo, hi):
            for i in range(lo, j):
                f = F[i - lo, j - lo]
                for n in range(first, last):
                    T[j, n] += E[i, n] * f
            g = group[j]
            if len(value) > 0:
                t, d, o = T[j, first:last], divisor[g, first:last], offset[g, first:last]
                for n in range(len(t)):
                    t[n] = (t[n] - o[n]) / d[n]
                    rank[n] = 0
                bit = len(value) // 2
                while bit > 0:
                    for n in range(len(t)):
                        rank[n] += bit * (t[n] > edge[rank[n] + bit])  # no branch, which would be a toss
                    bit //= 2
                for n in range(first, last):
                    at = rank[n - first]
                    codes[j, n] = at
                    E[j, n] = W[j, n] - (scale[g, n] * (value[at] - zero[g, n]) + offset[g, n])
                continue
            for n in range(first, last):
                z, o = zero[g, n], offset[g, n]
                code = (((T[j, n] - o) / divisor[g, n] + magic) - magic) + z
                code = min(max(code, low), high)
                codes[j, n] = np.int32(code)
                E[j, n] = W[j, n] - (scale[g, n] * (code - z) + o)


_KINDS = "f2 f2 f2 f2 u2 f2 f2 f2 f2 f1 f1 i1 i i f f"  # of _loop's arguments
