"""Scales for solved codes: descent on `tr (W - Q) H (W - Q)^T` over what ggml blocks store, in its precision.

With the codes fixed, Q is linear in d, in dmin, in each sc and in each m. Along such a coordinate with direction p (the
change of Q per unit) the loss of a row changes by `t^2 p H p^T - 2 t p H e^T` for a step t and the error e = w - q. So
every qblock takes the best step of (d, dmin) together, then every group that of (sc, m): d and dmin rounded to
float16, sc and m to integers in range, and a step is taken only where the loss falls. Errors of all other columns
count in full through H, which no search on the diagonal can see.

Frantar et al.'s feedback fixes the scales before it rounds; this is the second half of the alternation "group-scale
least squares, then codes". Not here: rounding the codes again (algorithms/).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.grids._ggml import GgmlGrid, Stored, half, ratio


@dataclass
class _Qblock:
    """One qblock of all rows: the gradient `(e H)` of its columns, `[N, q]`, its error likewise, its diagonal of H."""

    error: Tensor
    gradient: Tensor
    H_qq: Tensor

    def step(self, at: slice, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the best steps `[N]` along u and v, `[N, c]`, which are zero outside the columns `at`."""
        gradient, H = self.gradient[:, at], self.H_qq[at, at]
        Hu = u @ H
        num_u, den_u = (u * gradient).sum(1), (u * Hu).sum(1)
        if v is None:
            return ratio(num_u, den_u), torch.zeros_like(num_u)
        num_v, den_v, cross = (v * gradient).sum(1), ((v @ H) * v).sum(1), (Hu * v).sum(1)
        det = den_u * den_v - cross * cross
        apart = det > 1e-4 * den_u * den_v  # else u and v are one direction, and the step along u does
        step_u = torch.where(apart, (num_u * den_v - num_v * cross) / det, ratio(num_u, den_u))
        return step_u, torch.where(apart, (num_v * den_u - num_u * cross) / det, 0.0)

    def move(self, at: slice, change: Tensor) -> Tensor:
        """Add `change` to the decoded weights of the columns `at` where the loss falls; return where, bool `[N]`."""
        pull = change @ self.H_qq[at]
        falls = (change * (pull[:, at] - 2 * self.gradient[:, at])).sum(1) < 0
        taken = falls[:, None].float()
        self.error[:, at] -= change * taken
        self.gradient -= pull * taken
        return falls


@dataclass
class _Scales:
    """Stored scales in float32, edited in place: d, dmin `[N, B]`, sc, m `[N, B, groups]`; what is not stored is 1."""

    d: Tensor
    dmin: Tensor | None
    sc: Tensor
    m: Tensor


def refine(error_NK: Tensor, levels_NK: Tensor, stored: Stored, H_KK: Tensor, grid: GgmlGrid) -> Stored:
    """Return scales with a loss no higher for the same codes, after one sweep over the qblocks.

    error_NK: W - Q. levels_NK: what the codes stand for, float32 (the code less its zero, or a table entry).
    """
    N, B = stored.d.shape
    groups = grid.qblock // grid.group_size
    small = [
        error_NK.new_ones(N, B, groups) if p is None else p.float().view(N, B, groups) for p in (stored.sc, stored.m)
    ]
    scales = _Scales(stored.d.float(), None if stored.dmin is None else stored.dmin.float(), *small)
    error_NK = error_NK.clone()
    for b in range(B):
        at = slice(b * grid.qblock, (b + 1) * grid.qblock)
        qblock = _Qblock(error_NK[:, at], error_NK @ H_KK[:, at], H_KK[at, at])
        _halves(qblock, levels_NK[:, at], scales, b, signed=stored.m is None)
        if stored.sc is not None:
            _integers(qblock, levels_NK[:, at], scales, b, grid.small_range)
    sc = None if stored.sc is None else scales.sc.flatten(1).to(torch.int16)
    m = None if stored.m is None else scales.m.flatten(1).to(torch.int16)
    return Stored(scales.d.half(), None if scales.dmin is None else scales.dmin.half(), sc, m)


def _halves(qblock: _Qblock, levels: Tensor, scales: _Scales, b: int, *, signed: bool) -> None:
    """Step d and dmin of qblock b together; in superblocks with a minimum neither goes below 0."""
    g, at = levels.shape[1] // scales.sc.shape[2], slice(None)
    d, dmin = scales.d[:, b], None if scales.dmin is None else scales.dmin[:, b]
    least = -torch.inf if signed else 0.0
    u = levels * _columns(scales.sc[:, b], g)
    if dmin is None:
        step, _ = qblock.step(at, u, None)
        new_d = half(d + step).float()
        d += (new_d - d) * qblock.move(at, u * (new_d - d)[:, None])
        return
    v = -_columns(scales.m[:, b], g)
    step, step_min = qblock.step(at, u, v)
    new_d, new_dmin = (half((p + s).clamp(min=least)).float() for p, s in ((d, step), (dmin, step_min)))
    falls = qblock.move(at, u * (new_d - d)[:, None] + v * (new_dmin - dmin)[:, None])
    d += (new_d - d) * falls
    dmin += (new_dmin - dmin) * falls


def _integers(qblock: _Qblock, levels: Tensor, scales: _Scales, b: int, limits: tuple[int, int]) -> None:
    """Step sc and m of qblock b, group by group."""
    groups = scales.sc.shape[2]
    g = levels.shape[1] // groups
    for i in range(groups):
        at = slice(i * g, (i + 1) * g)
        sc, m = scales.sc[:, b, i], scales.m[:, b, i]
        u = levels[:, at] * scales.d[:, b, None]
        v = None if scales.dmin is None else -scales.dmin[:, b, None].expand_as(u)
        step, step_m = qblock.step(at, u, v)
        new_sc, new_m = ((p + s).round().clamp(*limits) for p, s in ((sc, step), (m, step_m)))
        change = u * (new_sc - sc)[:, None]
        falls = qblock.move(at, change if v is None else change + v * (new_m - m)[:, None])
        sc += (new_sc - sc) * falls
        m += (new_m - m) * falls


def _columns(p: Tensor, g: int) -> Tensor:
    return p.repeat_interleave(g, dim=1)
