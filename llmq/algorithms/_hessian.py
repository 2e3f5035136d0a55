"""What the steps of a site do with its Hessian: damp it until it factors, and solve with it.

Damping adds `damp * mean(diag H)` to the diagonal, tenfold more at each retry. A dead column, which no token excites
(H_jj = 0), gets H_jj = 1: it takes no part in any feedback.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RETRIES = 6  # each multiplies the damping by 10


def revive(H_KK: Tensor) -> tuple[Tensor, int]:
    """Return H with 1 on the diagonal of its dead columns, and how many there are. H itself is unchanged."""
    dead = H_KK.diagonal() == 0
    count = int(dead.sum())
    return (H_KK + torch.diag(dead.to(H_KK.dtype)) if count else H_KK), count


def damped(H_KK: Tensor, damp: float) -> Tensor:
    """Return `H + damp * mean(diag H) * I`, a new tensor."""
    out = H_KK.clone()
    out.diagonal().add_(damp * H_KK.diagonal().mean())
    return out


def cholesky(H_KK: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """Return the lower Cholesky factor of the damped H and the damping used; None where H resists every retry.

    H is damped in place and put back: another copy of it would be the largest thing in memory.
    """
    diagonal = H_KK.diagonal()
    given = diagonal.clone()
    try:
        for _ in range(_RETRIES):
            diagonal.copy_(given).add_(damp * given.mean())
            L, info = torch.linalg.cholesky_ex(H_KK)
            if info == 0 and torch.isfinite(L.diagonal()).all():
                return L, damp
            damp *= 10
        return None, damp / 10
    finally:
        diagonal.copy_(given)
