"""MSE: shrink the interval until the rounding error it saves no longer pays for the clipping error.

Tries `steps` shrink factors from 1 down to `least` and keeps, row by row, the one with the least
`sum_j weight_j |decode(nearest(w_j)) - w_j|^norm`. The weight is the diagonal of the Hessian where a solver gives one,
so that columns which carry large activations count for more (min-max is the first candidate: never worse than it).
GPTQModel and AutoGPTQ search the same family with norm 2.4 and no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.types import AffineGrid


@dataclass(frozen=True)
class Mse:
    """The shrunken interval with the least (weighted) error.

    norm: exponent of the error.
    least: the smallest shrink factor tried.
    steps: how many factors are tried.
    weighted: use the Hessian's diagonal where there is one.
    """

    norm: float = 2.0
    least: float = 0.4
    steps: int = 32
    weighted: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.least < 1 or self.steps < 2:
            raise ValueError("least lies between 0 and 1, and steps is at least 2")

    def interval(self, w: Tensor, grid: AffineGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the best of the shrunken intervals for each row of `w[..., g]`."""
        mass = weight if self.weighted else None

        def loss(error: Tensor) -> Tensor:
            error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
            return error.sum(-1) if mass is None else error.mul_(mass).sum(-1)

        return shrink(w, grid, torch.linspace(1, self.least, self.steps).tolist(), loss)


def shrink(
    w: Tensor, grid: AffineGrid, factors: list[float], loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return, row by row, the shrunken min-max interval whose `loss(error)` is least.

    w: `[..., g]`. loss: maps the error `decode(nearest(w)) - w` (which it may overwrite) to `w.shape[:-1]`.
    """
    lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    best_factor = torch.ones_like(lo)
    best: Tensor | None = None
    for factor in factors:
        params = grid.params(lo * factor, hi * factor).map(lambda p: p.unsqueeze(-1))
        error = loss(grid.decode(grid.nearest(w, params), params).sub_(w))
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        best_factor = torch.where(better, torch.full_like(best_factor, factor), best_factor)
    return lo * best_factor, hi * best_factor
