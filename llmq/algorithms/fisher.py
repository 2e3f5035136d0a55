"""Fisher: let tokens count in every error by how much the model's answer depends on them.

min sum_t w_t |(W - Q) x_t|^2,   w_t = s_t^power / mean,   s_t = mean_j (dL/dz_tj)^2

with s the squared gradients of the float model's loss at the linear's output z, averaged over the linears of the site,
each relative to its mean. Power 1 is the Fisher matrix with one number for each token; a few tokens then hold most of
the weight, and so little calibration is left that it pays to go half the way (docs/accuracy.md).
Kim et al. 2025, arXiv:2505.07004, equation 7 with one group of output channels (GuidedQuant).
Not here: the gradients (calibration/token_gradients.py), the sums they weigh (stats.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.steps import Weighting


@dataclass(frozen=True)
class Fisher(Weighting):
    """Weights of tokens.

    power: of the squared gradient; 0 weighs all tokens alike.
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 1:
            raise ValueError(f"power lies between 0 and 1, not {self.power}")

    def weigh(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the weights `[T]`, 1 on average, of the tokens of a site.

        squares: the squared gradients of each of its linears, float32 `[T]`.
        """
        relative = [s / s.mean().clamp(min=1e-30) for s in squares]
        weight = torch.stack(relative).mean(0).pow(self.power)
        return weight / weight.mean().clamp(min=1e-30)
