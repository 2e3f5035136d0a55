"""QEP: move the weights to where they make up for the error that the quantized blocks before them left in their input.

min |X W^T - Xq Q^T|^2 = |Xq (W* - Q)^T|^2 + const,   W* = W X^T Xq (Xq^T Xq)^-1 = W + W (X - Xq)^T Xq (Xq^T Xq)^-1,
with X the float model's inputs and Xq the quantized model's. Any solver then rounds W + alpha (W* - W).
Arai and Ichikawa 2025, arXiv:2504.09629, equations 5 and 8; GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695)
optimise the same objective.

W* overfits the calibration tokens, so alpha is chosen on tokens that it was not fitted on: with D = W* - W of the
fitted part, the error on the held-out part is a parabola in alpha, whose lowest point is
<W (X - Xq)^T Xq, D> / <D Xq^T Xq, D>, taken between 0 and `most`.
Not here: rounding (gptq.py), the second activation stream (block.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.algorithms._hessian import Regularized, cholesky, revive
from llmq.stats import Drift, Hessian
from llmq.types import Stats, Target


@dataclass(frozen=True)
class Qep(Regularized):
    """Quantization error propagation.

    alpha: how far to move, 0 to 1; None chooses it for each linear on held-out tokens.
    damp, prior: of Xq^T Xq, as in _hessian.py.
    most: the largest alpha chosen.
    share: of the calibration, how much runs through the float model too, at the cost of its forward.
    """

    alpha: float | None = None
    most: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not {self.alpha}")
        if not 0 < self.most <= 1 or not 0 < self.share <= 1:
            raise ValueError("most and share lie above 0 and are at most 1")

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Hessian and the drift of the activations."""
        return (Hessian, Drift)

    def correct(self, targets: Sequence[Target], stats: Stats) -> list[Target]:
        """Move the weights of a site; a site whose input has not drifted stays as it is."""
        hessian, drift = stats[Hessian], stats[Drift]
        if not drift.fit.any():
            return list(targets)
        W_NK = torch.cat([t.W_NK for t in targets])
        D_NK = self._move(W_NK, (drift.fit + drift.held) / drift.count, hessian.mean(), hessian.count)
        sizes = [t.W_NK.shape[0] for t in targets]
        alphas = [self.alpha] * len(sizes) if self.alpha is not None else self._choose(W_NK, hessian, drift, sizes)
        return [
            dataclasses.replace(t, W_NK=t.W_NK + alpha * D, report={**t.report, "qep_alpha": round(alpha, 4)})
            for t, D, alpha in zip(targets, D_NK.split(sizes), alphas, strict=True)
        ]

    def _choose(self, W_NK: Tensor, hessian: Hessian, drift: Drift, sizes: list[int]) -> list[float]:
        """Return, for each linear of the site, the alpha of least error on the held-out tokens."""
        tokens = hessian.count - drift.held_count
        unseen = (hessian.mean() * hessian.count - drift.held_hessian) / tokens
        D_NK = self._move(W_NK, drift.fit / (drift.count - drift.held_count), unseen, tokens)
        slope_N = ((W_NK @ drift.held) * D_NK).sum(1)
        curvature_N = ((D_NK @ drift.held_hessian) * D_NK).sum(1)
        return [
            _lowest(float(slope.sum()), float(curvature.sum()), self.most)
            for slope, curvature in zip(slope_N.split(sizes), curvature_N.split(sizes), strict=True)
        ]

    def _move(self, W_NK: Tensor, drift_KK: Tensor, H_KK: Tensor, tokens: int) -> Tensor:
        """Return W (X - Xq)^T Xq (Xq^T Xq)^-1; zero where the Hessian does not factor."""
        L, _ = cholesky(self.regularize(revive(H_KK)[0].clone(), tokens), self.damp)
        if L is None:
            return torch.zeros_like(W_NK)
        return torch.cholesky_solve((W_NK @ drift_KK).T, L).T


def _lowest(slope: float, curvature: float, most: float) -> float:
    """Return where the parabola `curvature a^2 - 2 slope a` is least for a in [0, most]."""
    return min(max(slope / curvature, 0.0), most) if curvature > 0 else 0.0
