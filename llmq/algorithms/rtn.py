"""RTN: round every weight to the nearest value of its grid. No calibration, the baseline of every table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmq.stats import Hessian, MeanSquare, Stat, Stats
from llmq.steps import Held, Operations, Solved, Solver
from llmq.types import Grid, QTensor


@dataclass(frozen=True)
class Rtn(Solver):
    """Round to nearest. Needs activations only where the range does (`output`), or to weigh errors.

    importance: calibrate, and let ggml's grids weigh the error of every input channel by its mean square.
    """

    importance: bool = False

    held: ClassVar[Held] = Held(0, 2)

    def needs(self, grids: Sequence[Grid]) -> tuple[type[Stat], ...]:
        """Return the Hessian where a range weighs errors by whole blocks of it, its diagonal with `importance`."""
        if any(g.wants_hessian for g in grids):
            return (Hessian,)
        return (MeanSquare,) if self.importance else ()

    def operations(self, N: int, K: int) -> Operations:
        """See `Step.operations`."""
        return Operations(fits=N * K)

    def solve(self, W_NK: Tensor, grid: Grid, stats: Stats) -> Solved:
        """Fit the grid, by the errors' weights where there are any, and round."""
        needed = self.needs([grid])
        return Solved(QTensor.rounded(W_NK, grid, stats[needed[0]].mean() if needed else stats.importance))
