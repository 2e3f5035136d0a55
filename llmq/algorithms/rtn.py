"""RTN: round every weight to the nearest value of its grid. No calibration, the baseline of every table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.stats import Hessian, MeanSquare
from llmq.types import QTensor, Solved, Stats, Target


@dataclass(frozen=True)
class Rtn:
    """Round to nearest. Needs activations only where the range does (`output`), or to weigh errors.

    importance: calibrate, and let ggml's grids weigh the error of every input channel by its mean square.
    """

    importance: bool = False

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Hessian where a range weighs errors by whole blocks of it, its diagonal with `importance`."""
        if any(getattr(g.range, "uses_blocks", False) for g in grids):
            return (Hessian,)
        return (MeanSquare,) if self.importance else ()

    def solve(self, targets: Sequence[Target], stats: Stats) -> list[Solved]:
        """Fit each grid and round."""
        return [Solved(self._round(t, stats)) for t in targets]

    def _round(self, target: Target, stats: Stats) -> QTensor:
        weight = target.importance
        for stat in self.needs([target.grid]):
            weight = stats[stat].mean()
        return QTensor.rounded(target.W_NK, target.grid, weight)
