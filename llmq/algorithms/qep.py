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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llmq.algorithms._hessian import Regularized, cholesky, retried, revived
from llmq.stats import Drift, Hessian, Stat, Stats, forms
from llmq.steps import Correction, Held, Operations
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

    def operations(self, N: int, K: int) -> Operations:
        """Return a factor, a product and a solve for the move; to choose alpha all again, and a product and a half."""
        chosen = self.alpha is None
        move = 2 * N * K**2 + 2 * min(N, K) * K**2
        return Operations(factor=(1 + chosen) * K**3 / 3, products=(1 + chosen) * move + chosen * 3 * N * K**2)

    def judge(self, W_NK: Tensor, stats: Stats) -> Tensor:
        """Return slope and curvature, `[N, 2]`, of the error of each row on the held-out tokens, by alpha."""
        if self.alpha is not None or not _drifted(stats):
            return W_NK.new_zeros(len(W_NK), 2)
        held, held_hessian = stats[Drift].whole("held"), stats[Drift].held_hessian
        D_NK = stats.once((self, "judged"), lambda: self._fitted(stats)).of(W_NK)
        return torch.stack([((W_NK @ held) * D_NK).sum(1), forms(D_NK, held_hessian)], 1)

    def correct(self, W_NK: Tensor, sums_Nm: Tensor, stats: Stats) -> Tensor:
        """Move rows of a site; a site whose input has not drifted stays as it is."""
        if not _drifted(stats):
            return W_NK
        return W_NK + self._alpha(sums_Nm)[:, None] * self._whole(stats).of(W_NK)

    def line(self, sums_m: Tensor, stats: Stats) -> dict[str, Any]:
        """Return alpha, and what damping it took."""
        if not _drifted(stats):
            return {}
        return {"qep_alpha": round(self._alpha(sums_m[None]).item(), 4), **self._whole(stats).line}

    def _alpha(self, sums_Nm: Tensor) -> Tensor:
        """Return alpha, `[N]`: where the parabola `curvature a^2 - 2 slope a` is least for a in [0, most]."""
        if self.alpha is not None:
            return sums_Nm.new_full((len(sums_Nm),), self.alpha)
        slope_N, curvature_N = sums_Nm.double().unbind(1)
        least_N = (slope_N / curvature_N).clamp(0, self.most)
        return torch.where(curvature_N > 0, least_N, 0).to(sums_Nm.dtype)

    def _fitted(self, stats: Stats) -> _Move:
        """Return the move that all but the held-out tokens ask for."""
        hessian, drift = stats[Hessian], stats[Drift]
        seen, unseen = (drift.number(name) for name in ("count", "held_count"))
        tokens = hessian.count - unseen
        H_KK = (hessian.mean() * hessian.count).sub_(drift.held_hessian).div_(tokens)
        factor, line = self._factor(H_KK, tokens)
        return _Move.made(drift.whole("fit"), seen - unseen, factor, line, stats.rows)

    def _whole(self, stats: Stats) -> _Move:
        """Return the move that all tokens ask for."""
        hessian, drift = stats[Hessian], stats[Drift]

        def make() -> _Move:
            stats.forget()  # the move that was judged
            factor, line = self._factor(hessian.mean().clone(), hessian.count)
            both = drift.whole("fit") + drift.whole("held")
            return _Move.made(both, drift.number("count"), factor, line, stats.rows)

        return stats.once((self, "whole"), make)  # type: ignore[no-any-return]

    def _factor(self, H_KK: Tensor, tokens: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the factor of the caller's own H, None where it has none, and a line on the damping."""
        L, damping = cholesky(self.regularize(revived(H_KK)[0], tokens), self.damp)
        tried = retried(self.damp, damping)
        line: dict[str, Any] = {"qep_dampings": tried} if tried else {}
        return L, line if L is not None else line | {"qep": f"none: H does not factor with damping up to {damping:g}"}


class _Move(NamedTuple):
    """W -> W (X - Xq)^T Xq (Xq^T Xq)^-1, and a line on the damping.

    left, right: W is multiplied by `left` `[K, K]`, a sum over so many tokens, and what comes of it is solved for with
        the lower factor `right`, where there is one. Both None where the Hessian does not factor: nothing moves then.
    """

    left: Tensor | None
    tokens: int
    right: Tensor | None
    line: dict[str, Any]

    @classmethod
    def made(cls, drift: Tensor, tokens: int, factor: Tensor | None, line: dict[str, Any], rows: int) -> _Move:
        """Return the move by a drift `(X - Xq)^T Xq`, a sum over so many tokens, and the factor of `Xq^T Xq`.

        rows: how many will be moved. Solves cost twice what products do, so where these are more than K, the drift's
        own rows are solved for, once.
        """
        if factor is not None and rows > len(drift):
            return cls(torch.cholesky_solve(drift.T, factor).T, tokens, None, line)
        return cls(None if factor is None else drift, tokens, factor, line)

    def of(self, W_NK: Tensor) -> Tensor:
        """Return the move of some rows; zero where the Hessian does not factor."""
        if self.left is None:
            return torch.zeros_like(W_NK)
        moved = (W_NK @ self.left).div_(self.tokens)
        return moved if self.right is None else torch.cholesky_solve(moved.T, self.right).T


def _drifted(stats: Stats) -> bool:
    return bool(stats[Drift].whole("fit").any())
