"""Descent: after rounding, alternate the group scales by least squares and the codes by coordinate descent.

Both lower  tr((W - Q) H (W - Q)^T), row by row, with the H of the solver, and neither can raise it:

scales   with the codes fixed, those that the grid finds (`refine`: least squares), rounded to what is stored. A row
         keeps its old scales unless the loss falls with the new ones.
codes    one after the other, each the best given all others:  q_j = nearest(q_j + [(W - Q) H]_j / H_jj).
         Where no loop is compiled, a sweep over all columns is GPTQ's column loop with H_ij / H_jj for its factor.

Coordinate descent on the codes is the local search of QuantEase (Behdin et al. 2023, arXiv:2309.01885, equation 11).
Not here: the loops (_walk.py, _sweep.py), the scales of a kind of grid (grids/_int_refine.py, grids/_ggml_refine.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmq.algorithms._hessian import Regularized, damped, revived
from llmq.algorithms._sweep import round_columns
from llmq.algorithms._walk import Walk, descend_codes
from llmq.stats import Hessian, Stat, Stats
from llmq.steps import Held, Operations, Refiner, Solved
from llmq.types import Grid, Parameters, QTensor


@dataclass(frozen=True)
class Descent(Regularized, Refiner):
    """Least squares on the scales, coordinate descent on the codes.

    rounds: how often both are done. sweeps: how often a round goes over all codes, at most; rows where a sweep moves
        nothing are done.
    scales: whether the scales move at all.
    damp, prior: as in _hessian.py.
    """

    rounds: int = 2
    sweeps: int = 8
    scales: bool = True

    held: ClassVar[Held] = Held(2, 6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or self.sweeps < 1:
            raise ValueError("rounds and sweeps are at least 1")

    def needs(self, grids: Sequence[Grid]) -> tuple[type[Stat], ...]:
        """Return the Hessian."""
        return (Hessian,)

    def operations(self, N: int, K: int) -> Operations:
        """Return the products with H: one before the rounds, in a round one and a half for scales; and the walk."""
        products = 2 * N * K**2 * (1 + 1.5 * self.rounds * self.scales)
        return Operations(products=products, looks=self.rounds * self.sweeps * N * K, passes=8 * self.rounds * N * K)

    def refine(self, W_NK: Tensor, solved: Solved, stats: Stats) -> Solved:
        """Lower the loss of every row, or leave the row as it is."""
        q, (seen_KK, tokens) = solved.q, self.seen(stats)
        H_KK = stats.once(self, lambda: self.regularize(damped(revived(seen_KK)[0], self.damp), tokens))
        state = _State(W_NK, q, H_KK)
        before = state.loss_N.sum()
        for _ in range(self.rounds):
            if self.scales:
                state.fit_scales()
            state.descend(self.sweeps)
        ratios = {**solved.ratios, "descent": (float(state.loss_N.sum()), float(before))}
        return Solved(QTensor(state.codes, state.params, q.grid, q.g_idx), solved.report, ratios)


class _State:
    """A stack while it is refined: codes, parameters, decoded weight Q, gradient (W - Q) H, and loss row by row."""

    def __init__(self, W_NK: Tensor, q: QTensor, H_KK: Tensor) -> None:
        self.grid, self.g_idx = q.grid, q.g_idx
        self.params, self.codes = q.params, q.codes.clone(memory_format=torch.contiguous_format)  # moved in place
        self.W_NK, self.H_KK, self.group_K = W_NK, H_KK, q.group_K
        self.Q_NK, self.gradient_NK, self.loss_N = self._measure(q.codes, q.params)

    @functools.cached_property
    def _order(self) -> Tensor:
        return torch.argsort(self.H_KK.diagonal(), descending=True, stable=True)

    @functools.cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        """H_jj in the order of the columns, and H_ij / H_jj."""
        diagonal_K = self.H_KK.diagonal()[self._order]
        return diagonal_K, self.H_KK[self._order][:, self._order].div_(diagonal_K)

    def _measure(self, codes: Tensor, params: Parameters) -> tuple[Tensor, Tensor, Tensor]:
        Q_NK = self._decoded(codes, params)
        error = self.W_NK - Q_NK
        gradient = error @ self.H_KK
        return Q_NK, gradient, error.mul_(gradient).sum(1)

    def _decoded(self, codes: Tensor, params: Parameters) -> Tensor:
        return QTensor(codes, params, self.grid, self.g_idx).dequantize()

    def _accept(self, codes: Tensor, params: Parameters) -> None:
        """Take the rows of a proposal that have less loss."""
        Q_NK, gradient, loss = self._measure(codes, params)
        better = loss < self.loss_N
        keep = better[:, None]
        self.codes = torch.where(keep, codes, self.codes)
        self.params = params.where(better, self.params)
        self.Q_NK = torch.where(keep, Q_NK, self.Q_NK)
        self.gradient_NK = torch.where(keep, gradient, self.gradient_NK)
        self.loss_N = torch.where(better, loss, self.loss_N)

    def fit_scales(self) -> None:
        """Propose, for each row, the scales that its grid finds best."""
        state = (self.gradient_NK, self.codes, self.params, self.H_KK, self.group_K)
        self._accept(self.codes, self.grid.refine(self.W_NK - self.Q_NK, *state))

    def descend(self, sweeps: int = 1) -> None:
        """Make each code the best given the others, `sweeps` times."""
        walk = Walk(self.codes, self.gradient_NK, self.loss_N, self.H_KK, self._order, self.group_K)
        if descend_codes(walk, self.grid, self.params, sweeps):
            self.Q_NK = self._decoded(self.codes, self.params)
        else:
            for _ in range(sweeps):
                self._sweep()

    def _sweep(self) -> None:
        """Propose, for each row, codes that are each the best given the others, in one sweep."""
        order = self._order
        diagonal_K, F_KK = self._factor
        Q_KN = self.Q_NK.T[order].contiguous()
        T_KN = Q_KN + self.gradient_NK.T[order].contiguous().div_(diagonal_K[:, None])
        codes_KN = round_columns(Q_KN, T_KN, F_KK, self.grid, self.params, self.group_K[order])
        codes = torch.empty_like(codes_KN)
        codes[order] = codes_KN
        self._accept(codes.T.contiguous(), self.params)
