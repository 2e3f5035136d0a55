"""The search that ranges share: of several intervals for each row of values, the one whose rounding error is least.

An interval given from its upper end (lo >= 0 >= hi) asks a symmetric grid to fall: its scale is negative, so that its
one surplus level lies above zero. Squared errors on grids that say what their values are (`Grid.lattice`) are compared
on the CPU by a loop that numba compiles; anything else in torch.
Not here: which intervals are tried (mse.py, output.py).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llmq.jit import compiled, in_threads
from llmq.types import RangedGrid

Interval = tuple[Tensor, Tensor]


def extremes(w: Tensor) -> Interval:
    """Return the least and the largest value of each row of `w[..., g]`, zero included."""
    return w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)


def shrunken(w: Tensor, factors: Sequence[float]) -> Iterator[Interval]:
    """Yield the extremes of each row of `w[..., g]` times each factor."""
    lo, hi = extremes(w)
    for factor in factors:
        yield lo * factor, hi * factor


def best(w: Tensor, grid: RangedGrid, tried: Iterator[Interval], loss: Callable[[Tensor], Tensor]) -> Interval:
    """Return, row by row, the first of the intervals whose `loss(error)` is least.

    w: `[..., g]`. loss: maps the error `decode(nearest(w)) - w` (which it may overwrite) to `w.shape[:-1]`.
    """
    chosen: Interval | None = None
    least = torch.zeros(())
    for lo, hi in tried:
        params = grid.params(lo, hi).map(lambda p: p.unsqueeze(-1))
        error = loss(grid.decode(grid.nearest(w, params), params).sub_(w))
        if chosen is None:
            chosen, least = (lo, hi), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better, lo, chosen[0]), torch.where(better, hi, chosen[1])
    if chosen is None:
        raise ValueError("no interval to try")
    return chosen


def best_squares(w: Tensor, grid: RangedGrid, tried: Iterator[Interval], mass: Tensor | None) -> Interval:
    """Return `best` for the squared error, its terms weighed by `mass` (which broadcasts to `w`) where given."""
    search = compiled(_search, _KINDS, reassociate=True) if w.device.type == "cpu" else None

    def squares(error: Tensor) -> Tensor:
        return (error.square_() if mass is None else error.square_().mul_(mass)).sum(-1)

    if search is None:
        return best(w, grid, tried, squares)
    lo, hi = map(torch.stack, zip(*tried, strict=True))
    if (lattice := grid.lattice(grid.params(lo, hi))) is None:
        return best(w, grid, zip(lo, hi, strict=True), squares)
    rows = w.reshape(-1, w.shape[-1])
    R = rows.shape[0]
    weight = torch.ones(w.shape[-1]) if mass is None else mass
    if weight.shape != w.shape[w.dim() - weight.dim() :]:
        weight = weight.expand_as(w)
    chosen = torch.zeros(R, dtype=torch.int64)
    by_factor = (p.reshape(-1, R) for p in lattice[:2])
    floats = (rows, weight.reshape(-1, w.shape[-1]), *by_factor, *lattice.table())
    arrays = (*(t.float().contiguous().numpy() for t in floats), chosen.numpy())
    in_threads(R, lambda first, last: search(*arrays, first, last, lattice.low, lattice.high))
    picked = chosen.reshape(1, *w.shape[:-1])
    return tuple(ends.gather(0, picked)[0] for ends in (lo, hi))  # type: ignore[return-value]


def _search(w, mass, scale, zero, value, edge, chosen, first, last, low, high):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Choose, for rows first to last of `w`, the row of `scale` and `zero` with the least weighted squared error.

    Row r of `w` is weighed by row `r % len(mass)` of `mass`. In a table (value, edge) ranks are found bit by bit, for a
    whole row at once.
    """
    t, rank = np.empty(w.shape[1], np.float32), np.empty(w.shape[1], np.int32)
    for r in range(first, last):
        m = r % mass.shape[0]
        least = np.float32(np.inf)
        for f in range(scale.shape[0]):
            s, z = scale[f, r], zero[f, r]
            inverse = np.float32(1) / s
            total = np.float32(0)
            if len(value) > 0:
                for j in range(len(t)):
                    t[j] = w[r, j] * inverse
                    rank[j] = 0
                bit = len(value) // 2
                while bit > 0:
                    for j in range(len(t)):
                        rank[j] += bit * (t[j] > edge[rank[j] + bit])
                    bit //= 2
                for j in range(len(t)):
                    error = s * (value[rank[j]] - z) - w[r, j]
                    total += mass[m, j] * error * error
            else:
                for j in range(w.shape[1]):
                    code = min(max(np.rint(w[r, j] * inverse) + z, low), high)
                    error = s * (code - z) - w[r, j]
                    total += mass[m, j] * error * error
            if total < least:
                least = total
                chosen[r] = f


_KINDS = "f2 f2 f2 f2 f1 f1 i1 i i f f"  # of _search's arguments
