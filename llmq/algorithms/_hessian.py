"""What the steps of a site do with its Hessian: regularize it, damp it until it factors, and solve with it.

H is an estimate from T tokens, and its K^2 / 2 products are the less certain the fewer tokens there are for a column.
So each step first adds to the tokens `prior * K` made-up ones in which no two columns are correlated:
H <- (T H + prior K diag H) / (T + prior K), the mean of H under an inverse Wishart prior; a shrinkage toward the
diagonal (Schaefer and Strimmer 2005, doi:10.2202/1544-6115.1175, target D). The diagonal stays as it is.
An expert sees few tokens, but all tokens of its layer are known: its made-up ones are correlated as those are,
H <- (T H + prior K H_layer) / (T + prior K).

Damping adds `damp * mean(diag H)` to the diagonal, tenfold more at each retry. A dead column, which no token excites
(H_jj = 0), gets a hundredth of that mean: it takes no part in any feedback, and ranges and scales heed it where they
lose next to nothing for the others. (GPTQ's code gives it 1, which where inputs are small is most of a group's error.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.stats import Hessian, Stats

_RETRIES = 6  # each multiplies the damping by 10


@dataclass(frozen=True)
class Regularized:
    """What the steps that solve with a Hessian have in common.

    damp: added to the diagonal of H, as a fraction of its mean; raised tenfold until H factors.
    prior: how many tokens without correlations H counts beside the calibration's, in multiples of its columns.
    """

    damp: float = 0.01
    prior: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ValueError(f"damp lies between 0 and 1, not {self.damp}")
        if not self.prior >= 0:
            raise ValueError(f"prior is 0 or more, not {self.prior}")

    def seen(self, stats: Stats) -> tuple[Tensor, int]:
        """Return H, and how many tokens it is the mean over, as `regularize` takes them.

        An expert's H is shrunk toward its layer's here; the 0 beside it says that nothing is left to do.
        """
        hessian, layer = stats[Hessian], stats.layer
        if layer is None:
            return hessian.mean(), hessian.count
        unseen = self.prior * len(layer)
        return (hessian.count * hessian.mean() + unseen * layer) / (hessian.count + unseen), 0

    def regularize(self, H_KK: Tensor, tokens: int) -> Tensor:
        """Shrink H, the mean over so many tokens, toward its diagonal by the prior, in place; return it.

        tokens: 0 leaves an H as it is that `seen` has shrunk.
        """
        if not tokens:
            return H_KK
        unseen = self.prior * len(H_KK)
        diagonal = H_KK.diagonal().clone()
        H_KK.mul_(tokens / (tokens + unseen)).diagonal().copy_(diagonal)
        return H_KK


def revived(H_KK: Tensor) -> tuple[Tensor, int]:
    """Return H with a hundredth of its mean on the diagonal of its dead columns, and how many there are.

    Where all are dead, with 1. H itself is unchanged.
    """
    dead = H_KK.diagonal() == 0
    count = int(dead.sum())
    if count:
        little = 0.01 * float(H_KK.diagonal().mean())
        H_KK = H_KK.clone()
        H_KK.diagonal().add_(dead * (little or 1.0))
    return H_KK, count


def damped(H_KK: Tensor, damp: float) -> Tensor:
    """Return `H + damp * mean(diag H) * I`, a new tensor."""
    out = H_KK.clone()
    out.diagonal().add_(damp * H_KK.diagonal().mean())
    return out


def retried(given: float, used: float) -> list[float]:
    """Return the dampings that were tried, where the given one was not enough; else none."""
    tried = [given]
    while tried[-1] < 0.99 * used:
        tried.append(10 * tried[-1])
    return tried if len(tried) > 1 else []


def cholesky(H_KK: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """Return the lower Cholesky factor of the damped H and the damping used; None where H resists every retry.

    H is the caller's own, and damped in place: another copy of it would be the largest thing in memory.
    """
    diagonal = H_KK.diagonal()
    given = diagonal.clone()
    for _ in range(_RETRIES):
        diagonal.copy_(given).add_(damp * given.mean())
        L, info = torch.linalg.cholesky_ex(H_KK)
        if info == 0 and torch.isfinite(L.diagonal()).all():
            return L, damp
        damp *= 10
    return None, damp / 10
