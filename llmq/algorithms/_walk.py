"""Coordinate descent on codes, row by row, with the gradient of each row kept up to date.

Take a row of three codes. Code 1 would be better one step higher: it takes that step, and the step times row 1 of H is
taken off the gradient, three additions. Codes 2 and 3 are best where they are: each costs a look at its gradient and
nothing else. After GPTQ few codes change, so a sweep costs about N K looks and K additions for each change, where the
column loop of _sweep.py would cost products over all columns; the gradient is known at the end without a product.
On a GPU one launch of a kernel looks at a panel of columns of all rows, and products bring the gradient of the other
columns up to date, panel by panel and half by half: thousands of rows always have some code that moves.
Both need to know what the values of the grid are (`Grid.lattice`); elsewhere _sweep.py finds the same. The codes of a
table of values walk as ranks in it.
Not here: what the gradient is, and the scales (descent.py), the kernel (llmq_kernels/panel.py).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.algorithms._sweep import halves, looked_up
from llmq.gpu import runs_kernels
from llmq.jit import compiled, in_threads
from llmq.params import ROUNDER
from llmq.types import Grid, Lattice, Parameters

_ROWS = 8  # that share a row of H while it is in the cache


class Walk(NamedTuple):
    """What a descent moves, in place, and what it reads; all contiguous.

    codes: uint8 `[N, K]`. gradient: (W - Q) H, float32 `[N, K]`. loss: diag((W - Q) H (W - Q)^T), float32 `[N]`.
    H_KK: float32. order: of the columns, int64 `[K]`. group: of each column, int64 `[K]`.
    """

    codes: Tensor
    gradient: Tensor
    loss: Tensor
    H_KK: Tensor
    order: Tensor
    group: Tensor


def descend_codes(walk: Walk, grid: Grid, params: Parameters, sweeps: int) -> bool:
    """Make each code the best given the others, `sweeps` times in the order given. params: `[N, G]`.

    Returns False, with nothing done, where there is no compiled loop for the device and the grid.
    """
    lattice, how = grid.lattice(params), _way(walk.codes.device)
    if lattice is None or how is None:
        return False
    if lattice.levels is None:
        how(walk, lattice, sweeps)
        return True
    ranks = looked_up(lattice.levels.rank, walk.codes)
    how(walk._replace(codes=ranks), lattice, sweeps)
    walk.codes.copy_(looked_up(lattice.levels.code, ranks))
    return True


def _way(device: torch.device) -> Callable[[Walk, Lattice, int], None] | None:
    """Return what moves codes on a device, None where torch does."""
    if device.type == "cpu" and (loop := compiled(_loop, _KINDS)):
        return partial(_by_rows, loop)
    return _by_panels if runs_kernels(device, "codes are moved one by one") else None


def _by_rows(loop: Callable[..., None], walk: Walk, lattice: Lattice, sweeps: int) -> None:
    """Let each thread take rows of the weight, and go through all their columns before the next rows."""
    codes, gradient_NK, loss_N, H_KK, order, group_K = walk
    scale_NG, zero_NG = lattice.scale.contiguous(), lattice.zero.contiguous()  # an offset falls out of every step
    divisor_NG = torch.where(scale_NG == 0, torch.inf, scale_NG)
    diagonal_K = H_KK.diagonal().contiguous()
    tensors = (
        codes,
        gradient_NK,
        loss_N,
        H_KK,
        diagonal_K,
        order,
        group_K,
        divisor_NG,
        scale_NG,
        zero_NG,
        *lattice.table(),
    )
    arrays = [t.numpy() for t in tensors]
    in_threads(len(codes), lambda first, last: loop(*arrays, sweeps, first, last, lattice.low, lattice.high))


def _by_panels(walk: Walk, lattice: Lattice, sweeps: int) -> None:
    """Let one launch go through a panel of columns for all rows; products tell the other columns what it moved."""
    from llmq_kernels.panel import WIDTH, walk_panel

    order = walk.order
    H_KK, group_K = walk.H_KK[order[:, None], order], walk.group[order]
    gradient_KN, old_KN = walk.gradient.T[order].contiguous(), walk.codes.T[order].contiguous()
    step_KN, new_KN = torch.empty_like(gradient_KN), torch.empty_like(old_KN)
    values = (lattice.scale.T.contiguous(), lattice.zero.T.contiguous(), *lattice.table(), lattice.low, lattice.high)
    for _ in range(sweeps):
        for a, b in halves(0, len(order), WIDTH, WIDTH, back=True):
            if a == b:
                state = (gradient_KN[a], walk.loss, old_KN[a], group_K[a])
                walk_panel(H_KK[a, a], *state, *values, step_KN[a], new_KN[a])
            else:
                gradient_KN[b].addmm_(H_KK[a, b].T, step_KN[a], alpha=-1)
        old_KN, new_KN = new_KN, old_KN
    walk.codes[:, order] = old_KN.T
    walk.gradient[:, order] = gradient_KN.T


def _loop(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    codes, gradient, loss, H, diagonal, order, group, divisor, scale, zero, value, edge, sweeps, first, last, low, high
):
    """Do rows first to last. numba compiles this. Rounding and divisor are those of _sweep.py's leaf.

    Rows that share a row of H are done when a look at each of their codes has moved none.
    """
    magic = gradient.dtype.type(ROUNDER)
    K = len(order)
    for start in range(first, last, _ROWS):
        stop = min(start + _ROWS, last)
        still = 0  # how many columns were looked at since a code moved
        for k in range(sweeps * K):
            if still == K:
                break
            still += 1
            j = order[k % K]
            g = group[j]
            for n in range(start, stop):
                z, s, old = zero[n, g], scale[n, g], codes[n, j]
                at = value[old] if len(value) > 0 else gradient.dtype.type(old)
                target = (s * (at - z) + gradient[n, j] / diagonal[j]) / divisor[n, g]
                if len(value) > 0:
                    if edge[old] < target and (old + 1 == len(value) or target <= edge[old + 1]):  # most of them
                        continue
                    new, bit = 0, len(value) // 2
                    while bit > 0:
                        new += bit * (target > edge[new + bit])
                        bit //= 2
                    to = value[new]
                else:
                    to = min(max(((target + magic) - magic) + z, low), high)
                    new = int(to)
                if to != at:  # a zero keeps its sign
                    step = s * (to - at)
                    loss[n] -= step * (2 * gradient[n, j] - step * diagonal[j])
                    for i in range(K):
                        gradient[n, i] -= step * H[j, i]
                    codes[n, j] = new
                    still = 0


_KINDS = "u2 f2 f1 f2 f1 i1 i1 f2 f2 f2 f1 f1 i i i f f"  # of _loop's arguments
