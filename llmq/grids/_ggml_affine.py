"""ggml grids with an offset: `w = scale * code + offset`, codes from 0, scale >= 0.

For fixed codes q the error `sum w (x - s q - o)^2` is the quadratic

    A s^2 + 2 B s o + C o^2 - 2 D s - 2 E o + const,   A, B, C = sum w (q^2, q, 1),   D, E = sum w x (q, 1)

so scale and offset are solved for together. The search rounds a group on several intervals, solves each and keeps the
best; then it alternates: store the scales, round with what was stored, solve again. A round that does not lower the
error of a qblock is not kept, so more rounds never hurt.

In a superblock `s = d * sc` and `o = -dmin * m`. The integers are chosen by the same quadratic: sc among the three
next to s / d, with the best m for each; then d and dmin are solved for over the whole superblock (a 2 x 2 system).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llmq.grids._ggml import GgmlGrid, Stored, better, by_group, error_weights, half, nearest_integer, ratio
from llmq.types import GgmlParams, Lattice

_ROUNDS = 3
_SHRINK = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8)  # of the largest scale: what `d` is first fitted to


class _Moments(NamedTuple):
    """The quadratic of every group, `[M]` or `[groups, M / groups]` each."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    E: Tensor

    def error(self, s: Tensor, o: Tensor) -> Tensor:
        """Return the error of scale s and offset o, less the constant."""
        return s * (self.A * s + 2 * (self.B * o - self.D)) + o * (self.C * o - 2 * self.E)

    def offset(self, s: Tensor) -> Tensor:
        """Return the best offset for scale s."""
        return ratio(self.E - self.B * s, self.C)


@dataclass(frozen=True)
class Affine(GgmlGrid):
    """Codes times a scale, plus an offset.

    starts: how many steps to lay between the least and the greatest value of a group.
    In superblocks scale and -offset are at least 0; else both are of any sign.
    """

    starts: ClassVar[tuple[float, ...]]

    def nearest(self, w: Tensor, params: GgmlParams) -> Tensor:
        """Return the nearest codes as float32 integers, 0 where the scale is 0."""
        return self._round(((w - params.offset) / params.scale).nan_to_num_(0.0, 0.0, 0.0))

    def decode(self, codes: Tensor, params: GgmlParams) -> Tensor:
        """Return `scale * code + offset` in float32."""
        return (codes * params.scale).add_(params.offset)

    def lattice(self, params: GgmlParams) -> Lattice:
        """Return the values of `[N, G]` parameters."""
        return Lattice(params.scale, torch.zeros_like(params.scale), params.offset, 0.0, 2.0**self.bits - 1)

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return codes.float()

    def _round(self, t: Tensor) -> Tensor:
        return nearest_integer(t).clamp_(0, 2**self.bits - 1)

    def _fit_rows(self, W_nK: Tensor, importance: Tensor | None) -> Stored:
        n, groups = W_nK.shape[0], self.qblock // self.group_size
        x = by_group(W_nK, self)
        w = error_weights(x, self, importance)
        fit = _Fit(self, x, w)
        s, o, moments = fit.search()
        best: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            in_blocks = _Moments(*(p.view(groups, -1) for p in moments))
            d, dmin, sc, m = self._store(s.view(groups, -1), o.view(groups, -1), in_blocks, best[1:3])
            s, o = (d.float() * sc).view(-1), (dmin.float() * -m).view(-1)
            moments = fit.moments(fit.rounded(s, o))
            error = moments.error(s, o).view(groups, -1).sum(0)
            best = better((error, d, dmin, sc, m), best)
            s, o = fit.solve(moments)
        _, d, dmin, *small = best
        kept = (None, None) if groups == 1 else (p.T.to(torch.int16).reshape(n, -1) for p in small)
        return Stored(d.view(n, -1), dmin.view(n, -1), *kept)

    def _store(
        self, s: Tensor, o: Tensor, q: _Moments, halves: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return d, dmin `[M / groups]` as float16 and sc, m `[groups, M / groups]` as float32 integers.

        s, o: solved scales and offsets `[groups, M / groups]` of the quadratics `q`.
        halves: d and dmin to start from, none at first.
        """
        if self.qblock == self.group_size:
            d = half(s[0])
            return d, half(-q.offset(d.float())[0]), torch.ones_like(s), torch.ones_like(s)
        if halves:
            d, dmin = (p.float() for p in halves)
        else:
            stiffness = (q.A - ratio(q.B * q.B, q.C)).clamp(min=0)  # of s, where o follows it
            d = self._first(s, stiffness)
            dmin = self._first(-q.offset(d * self._small(s, d)).clamp(max=0), q.C)
        sc, m = self._integers(d, dmin, q, self._small(s, d))
        d, dmin = self._solve_halves(sc, m, q, d, dmin)
        sc, m = self._integers(d, dmin, q, sc)
        d, dmin = self._solve_halves(sc, m, q, d, dmin)
        sc, m = self._integers(d, dmin, q, sc)
        return d.half(), dmin.half(), sc, m

    def _small(self, s: Tensor, d: Tensor) -> Tensor:
        return (s / d).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*self.small_range)

    def _first(self, s: Tensor, stiffness: Tensor) -> Tensor:
        """Return the float16 `[M / groups]`, as float32, whose multiples lie nearest to scales `s` (>= 0)."""
        greatest = s.amax(0)
        best: tuple[Tensor, ...] = ()
        for shrink in _SHRINK:
            d = half(greatest * (shrink / self.small_range[1])).float()
            best = better(((self._small(s, d) * d - s).square_().mul_(stiffness).sum(0), d), best)
        return best[1]

    def _solve_halves(self, sc: Tensor, m: Tensor, q: _Moments, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best d and dmin for given integers, rounded to float16; the old ones where that is no better."""
        a, c = (q.A * sc * sc).sum(0), (q.C * m * m).sum(0)
        b = -(q.B * sc * m).sum(0)
        u, v = (q.D * sc).sum(0), -(q.E * m).sum(0)
        det = a * c - b * b
        flat = det <= 1e-6 * a * c
        new_d = half(torch.where(flat, ratio(u, a), (u * c - v * b) / det).clamp(min=0)).float()
        new_dmin = half(torch.where(flat, 0.0, ratio(v - b * new_d, c)).clamp(min=0)).float()
        error = q.error(new_d * sc, -new_dmin * m).sum(0)
        better = error < q.error(d * sc, -dmin * m).sum(0)
        return torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)

    def _integers(self, d: Tensor, dmin: Tensor, q: _Moments, sc: Tensor) -> tuple[Tensor, Tensor]:
        """Return, group by group, the best of the integers next to `sc` with the best m for it."""
        best: tuple[Tensor, ...] = ()
        for step in (0, -1, 1):
            near = (sc + step).clamp_(*self.small_range)
            m = self._small(-q.offset(d * near), dmin)
            best = better((q.error(d * near, -dmin * m), near, m), best)
        return best[1], best[2]


class _Fit:
    """One chunk: values x and error weights w, `[g, M]`."""

    def __init__(self, grid: Affine, x: Tensor, w: Tensor) -> None:
        self.grid, self.x, self.w = grid, x, w
        self.wx = w * x
        self.C, self.E = w.sum(0), self.wx.sum(0)

    def rounded(self, s: Tensor, o: Tensor) -> Tensor:
        """Return the codes nearest on scale s and offset o, `[M]` each."""
        return self.grid._round(((self.x - o) / s).nan_to_num_(0.0, 0.0, 0.0))

    def moments(self, q: Tensor) -> _Moments:
        """Return the quadratic of every group at codes q."""
        wq = self.w * q
        return _Moments(wq.mul(q).sum(0), wq.sum(0), self.C, (self.wx * q).sum(0), self.E)

    def solve(self, q: _Moments) -> tuple[Tensor, Tensor]:
        """Return the best scale >= 0 and offset (<= 0 in superblocks), `[M]`."""
        det = q.A * q.C - q.B * q.B
        s = torch.where(det > 1e-6 * q.A * q.C, (q.D * q.C - q.E * q.B) / det, 0.0).clamp_(min=0)
        o = q.offset(s)
        if self.grid.qblock > self.grid.group_size:
            s = torch.where(o > 0, ratio(q.D, q.A), s).clamp_(min=0)
            o = o.clamp_(max=0)
        return s, o

    def search(self) -> tuple[Tensor, Tensor, _Moments]:
        """Return the best scale and offset over the starts, `[M]`, and their quadratics."""
        lo, hi = self.x.amin(0), self.x.amax(0)
        if self.grid.qblock > self.grid.group_size:
            lo = lo.clamp(max=0)
        reach = 1 / (hi - lo)
        reach = torch.where(hi - lo < 1e-30, 0.0, reach)
        x = self.x - lo
        best: tuple[Tensor, ...] = ()
        for start in self.grid.starts:
            q = self.moments(self.grid._round(x * (start * reach)))
            s, o = self.solve(q)
            best = better((q.error(s, o), s, o, q.A, q.B, q.D), best)
        _, s, o, A, B, D = best
        return s, o, _Moments(A, B, self.C, D, self.E)
