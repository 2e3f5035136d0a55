"""MSE: shrink the interval until the rounding error it saves no longer pays for the clipping error.

Tries `steps` shrink factors from 1 down to `least` and keeps, row by row, the one with the least
`sum_j weight_j |decode(nearest(w_j)) - w_j|^norm`. The weight is the diagonal of the Hessian where a solver gives one,
so that columns which carry large activations count for more (min-max is the first candidate: never worse than it).
GPTQModel and AutoGPTQ search the same family with norm 2.4 and no weight.

A symmetric grid has one level more below zero than above; with `shift` it is also tried upside down (negative scale,
Q4_0's and AutoRound's full range), and an asymmetric one also with its zero point a step up or down.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.ranges._search import Interval, best, best_squares, shrunken
from llmq.types import RangedGrid

_AT_ONCE = 2**24  # values whose intervals are held at a time


@dataclass(frozen=True)
class Mse:
    """The interval with the least (weighted) error.

    norm: exponent of the error.
    least: the smallest shrink factor tried.
    steps: how many factors are tried.
    weighted: use the Hessian's diagonal where there is one.
    shift: also try falling symmetric grids, and neighbouring zero points.
    """

    searches = True  # beyond the largest value too, on grids that say so
    norm: float = 2.0
    least: float = 0.4
    steps: int = 32
    weighted: bool = True
    shift: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.least < 1 or self.steps < 2:
            raise ValueError("least lies between 0 and 1, and steps is at least 2")

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the best of the intervals tried for each row of `w[..., g]`."""
        step = max(1, _AT_ONCE // w[0].numel())
        if w.dim() > 2 and len(w) > step:  # each row of values is searched alone; all intervals of all of them are many
            found = [self.interval(part, grid, weight) for part in w.split(step)]
            return tuple(map(torch.cat, zip(*found, strict=True)))  # type: ignore[return-value]
        mass = weight if self.weighted else None
        tried = self._tried(w, grid)
        if self.norm == 2:
            return best_squares(w, grid, tried, mass)

        def loss(error: Tensor) -> Tensor:
            error = error.abs_().pow_(self.norm)
            return error.sum(-1) if mass is None else error.mul_(mass).sum(-1)

        return best(w, grid, tried, loss)

    def _tried(self, w: Tensor, grid: RangedGrid) -> Iterator[Interval]:
        for lo, hi in shrunken(w, grid.factors(self.least, self.steps)):
            yield lo, hi
            if not self.shift:
                continue
            if not grid.sym:
                step = (hi - lo) / (2**grid.bits - 1)
                yield (lo - step).clamp(max=0), (hi - step).clamp(min=0)
                yield (lo + step).clamp(max=0), (hi + step).clamp(min=0)
            elif grid.falls:
                yield -lo, -hi
