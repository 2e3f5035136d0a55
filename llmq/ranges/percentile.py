"""Percentile: leave a fraction of the values outside, half of it at each end.

Suits activations and whole channels, where few outliers stretch the interval; a group of 64 has no tail to cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.types import RangedGrid


@dataclass(frozen=True)
class Percentile:
    """Covers the middle `p` percent of the values (of their weight, where weights are given)."""

    p: float = 99.9

    def __post_init__(self) -> None:
        if not 50 < self.p <= 100:
            raise ValueError(f"p is a percentage above 50, at most 100, not {self.p}")

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the two percentiles of `w[..., g]`, zero included."""
        values, order = w.sort(-1)
        mass = torch.ones_like(w) if weight is None else weight.expand_as(w).gather(-1, order)
        below = mass.double().cumsum(-1)
        share, total = below, below[..., -1:]
        tail = (1 - self.p / 100) / 2
        last = w.shape[-1] - 1
        first = (share <= tail * total).sum(-1, keepdim=True).clamp(max=last)
        final = (share < (1 - tail) * total).sum(-1, keepdim=True).clamp(max=last)
        lo, hi = values.gather(-1, first).squeeze(-1), values.gather(-1, final).squeeze(-1)
        return lo.clamp(max=0), hi.clamp(min=0)
