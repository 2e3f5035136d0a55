"""QEP: move the weights to where they make up for the error that the quantized blocks before them left in their input.

min |X W^T - Xq Q^T|^2 = |Xq (W* - Q)^T|^2 + const,   W* = W X^T Xq (Xq^T Xq)^-1 = W + W (X - Xq)^T Xq (Xq^T Xq)^-1,
with X the float model's inputs and Xq the quantized model's. Any solver then rounds W + alpha (W* - W).
Arai and Ichikawa 2025, arXiv:2504.09629, equations 5 and 8; GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695)
optimise the same objective.

W* overfits the calibration tokens, so alpha is chosen on tokens that it was not fitted on: with D = W* - W of the
fitted part, the error on the held-out part is a parabola in alpha, whose lowest point is
<W (X - Xq)^T Xq, D> / <D Xq^T Xq, D>, taken between 0 and `most`.
Not here: rounding (gptq.py), the second activation stream (pipeline/block.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.algorithms._hessian import Regularized, cholesky, retried, revived
from llmq.stats import Drift, Hessian, Stat, Stats
from llmq.steps import Correction, Held
from llmq.types import Grid


@dataclass(frozen=True)
class Qep(Regularized, Correction):
    """Quantization error propagation.

    alpha: how far to move, 0 to 1; None chooses it for each linear on held-out tokens.
    damp, prior: of Xq^T Xq, as in _hessian.py.
    most: the largest alpha chosen.
    share: of the calibration, how much runs through the float model too, at the cost of its forward.
    """

    alpha: float | None = None
    most: float = 1.0
    share: float = 1.0

    held: ClassVar[Held] = Held(2, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not {self.alpha}")
        if not 0 < self.most <= 1 or not 0 < self.share <= 1:
            raise ValueError("most and share lie above 0 and are at most 1")

    def needs(self, grids: Sequence[Grid]) -> tuple[type[Stat], ...]:
        """Return the Hessian and the drift of the activations."""
        return (Hessian, Drift)

    def correct(self, W_NK: Tensor, rows: Sequence[int], stats: Stats) -> tuple[Tensor, list[dict[str, Any]]]:
        """Move the weights of a site; a site whose input has not drifted stays as it is."""
        hessian, drift = stats[Hessian], stats[Drift]
        fit, held, tokens = drift.whole("fit"), drift.whole("held"), drift.number("count")
        if not fit.any():
            return W_NK, [{} for _ in rows]
        aim_NK = W_NK @ (fit + held).div_(tokens)
        D_NK, line = self._move(aim_NK, hessian.mean().clone(), hessian.count)
        del aim_NK
        alphas = [self.alpha] * len(rows) if self.alpha is not None else self._choose(W_NK, rows, stats)
        parts = zip(W_NK.split(list(rows)), D_NK.split(list(rows)), alphas, strict=True)
        moved = [W + alpha * D for W, D, alpha in parts]
        return torch.cat(moved), [{"qep_alpha": round(alpha, 4), **line} for alpha in alphas]

    def _choose(self, W_NK: Tensor, rows: Sequence[int], stats: Stats) -> list[float]:
        """Return, for each linear of the site, the alpha of least error on the held-out tokens."""
        hessian, drift = stats[Hessian], stats[Drift]
        fit, held, held_hessian = drift.whole("fit"), drift.whole("held"), drift.held_hessian
        seen, unseen = (drift.number(name) for name in ("count", "held_count"))
        tokens = hessian.count - unseen
        aim_NK = W_NK @ (fit / (seen - unseen))
        H_KK = (hessian.mean() * hessian.count).sub_(held_hessian).div_(tokens)
        D_NK, _ = self._move(aim_NK, H_KK, tokens)
        del aim_NK, H_KK
        slope_N = ((W_NK @ held) * D_NK).sum(1)
        curvature_N = ((D_NK @ held_hessian) * D_NK).sum(1)
        return [
            _lowest(float(slope.sum()), float(curvature.sum()), self.most)
            for slope, curvature in zip(slope_N.split(list(rows)), curvature_N.split(list(rows)), strict=True)
        ]

    def _move(self, aim_NK: Tensor, H_KK: Tensor, tokens: int) -> tuple[Tensor, dict[str, Any]]:
        """Return W (X - Xq)^T Xq (Xq^T Xq)^-1, zero where the Hessian does not factor, and a line on the damping.

        aim_NK: W (X - Xq)^T Xq. H_KK: the caller's own, to be regularized in place.
        """
        L, damping = cholesky(self.regularize(revived(H_KK)[0], tokens), self.damp)
        tried = retried(self.damp, damping)
        line: dict[str, Any] = {"qep_dampings": tried} if tried else {}
        if L is None:
            return torch.zeros_like(aim_NK), line | {"qep": f"none: H does not factor with damping up to {damping:g}"}
        return torch.cholesky_solve(aim_NK.T, L).T, line


def _lowest(slope: float, curvature: float, most: float) -> float:
    """Return where the parabola `curvature a^2 - 2 slope a` is least for a in [0, most]."""
    return min(max(slope / curvature, 0.0), most) if curvature > 0 else 0.0
