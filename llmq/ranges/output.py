"""Output: AWQ's clip search. Shrink the interval where that lowers the error of the group's output, not of its weights.

For a group with weights w and quantized weights v, and H_g the group's diagonal block of X^T X, the error of its
partial sum over the calibration tokens is `(v - w) H_g (v - w)^T` (Lin et al. 2024, arXiv:2306.00978, section 3.2;
there computed on a sample of tokens). Without a Hessian it falls back on nothing: the recipe is refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.ranges._search import best, shrunken
from llmq.types import RangedGrid


@dataclass(frozen=True)
class Output:
    """The shrunken interval with the least error of the group's output.

    least: the smallest shrink factor tried (AWQ: 0.5).
    steps: how many factors are tried (AWQ: 10; 20 here).
    """

    wants_hessian = True
    searches = True
    least: float = 0.5
    steps: int = 21

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the best interval for each row of `w[N, G, g]`; `weight` is `[G, g, g]`."""
        if weight is None or weight.dim() != 3:
            raise ValueError("the range 'output' needs grouped or per-channel weights and a calibration")
        blocks = weight

        def loss(error: Tensor) -> Tensor:
            by_group = error.transpose(0, 1)  # [G, N, g]
            return (torch.bmm(by_group, blocks) * by_group).sum(-1).transpose(0, 1)

        return best(w, grid, shrunken(w, grid.factors(self.least, self.steps)), loss)
