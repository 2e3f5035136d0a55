"""ggml grids with an offset: `w = scale * code + offset`, codes from 0, scale >= 0.

For fixed codes q the error `sum w (x - s q - o)^2` is the quadratic

    A s^2 + 2 B s o + C o^2 - 2 D s - 2 E o + const,   A, B, C = sum w (q^2, q, 1),   D, E = sum w x (q, 1)

so scale and offset are solved for together. Example: for the weights 0.1, 0.5, 0.9 on 4 codes, the interval [0.1, 0.9]
gives s = 0.267 and the codes 0, 2, 3; with these fixed, the quadratic is least at s = 0.257, o = 0.071, a third less
error. The search does so on several intervals and keeps the best; then it alternates: store the scales, round with what
was stored, solve again. A round that does not lower the error of a qblock is not kept, so more rounds never hurt.

In a superblock `s = d * sc` and `o = -dmin * m`. The integers are chosen by the same quadratic: sc among the three
next to s / d, with the best m for each; then d and dmin are solved for over the whole superblock (a 2 x 2 system).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmq.grids._ggml import (
    GgmlGrid,
    Stored,
    better,
    by_group,
    error_weights,
    extremes,
    half,
    held,
    inverse,
    nearest_integer,
    ratio,
)
from llmq.jit import Loop, compiled, in_threads
from llmq.types import GgmlParams, Lattice, Parameters

_ROUNDS = 3
_SHRINK = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8)  # of the largest scale: what `d` is first fitted to


class _Moments(NamedTuple):
    """The quadratic of every group, `[groups, B]` each."""

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

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the nearest codes as float32 integers, 0 where the scale is 0."""
        offset = held(GgmlParams.of(params).offset)
        return self._round(((w - offset) / params.scale).nan_to_num_(0.0, 0.0, 0.0))

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return `scale * code + offset` in float32."""
        return (codes * params.scale).add_(held(GgmlParams.of(params).offset))

    def lattice(self, params: Parameters) -> Lattice:
        """Return the values of `[N, G]` parameters."""
        scale, offset = params.scale, held(GgmlParams.of(params).offset)
        return Lattice(scale, torch.zeros_like(scale), offset, 0.0, 2.0**self.bits - 1)

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return codes.float()

    def _reach(self, lo: Tensor, hi: Tensor) -> Tensor:
        """See `GgmlGrid._reach`; superblocks have no offset above 0."""
        lowest = lo.clamp(max=0) if self.qblock > self.group_size else lo
        return (hi - lowest) / (2**self.bits - 1)

    def _round(self, t: Tensor) -> Tensor:
        return nearest_integer(t).clamp_(0, 2**self.bits - 1)

    def _fit_rows(self, W_nK: Tensor, importance: Tensor | None) -> Stored:
        n = W_nK.shape[0]
        x = W_nK.reshape(-1, self.group_size)
        w = error_weights(x, importance)
        loop = _loop() if x.device.type == "cpu" else None
        fit = _Torch(self, x, w) if loop is None else _Compiled(loop, self, x, w)
        lo, hi = extremes(x, self)
        if self.qblock > self.group_size:
            lo = lo.clamp(max=0)
        s, o, moments = fit.best(lo, inverse(hi - lo), self.starts)
        best: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            d, dmin, sc, m = self._store(s, o, moments, best[1:3])
            stored_s, stored_o = d.float() * sc, dmin.float() * -m
            s, o, moments = fit.best(stored_o, inverse(stored_s), (1.0,))
            best = better((moments.error(stored_s, stored_o).sum(0), d, dmin, sc, m), best)
        _, d, dmin, *small = best
        kept = (None, None) if len(s) == 1 else (p.T.to(torch.int16).reshape(n, -1) for p in small)
        return Stored(d.view(n, -1), dmin.view(n, -1), *kept)

    def _store(
        self, s: Tensor, o: Tensor, q: _Moments, halves: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return d, dmin `[B]` as float16 and sc, m `[groups, B]` as float32 integers.

        s, o: solved scales and offsets `[groups, B]` of the quadratics `q`.
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
        """Return the float16 `[B]`, as float32, whose multiples lie nearest to scales `s` (>= 0)."""
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


class _Torch:
    """The groups of one chunk: values `x[M, g]` and their error weights, as `error_weights` gives them."""

    def __init__(self, grid: Affine, x: Tensor, w: Tensor) -> None:
        self.grid = grid
        self.x = by_group(x, grid)
        self.w = by_group(w.repeat(len(x) // len(w), 1), grid)
        self.wx = self.w * self.x
        self.C, self.E = self.w.sum(0), self.wx.sum(0)

    def best(self, origin: Tensor, steps: Tensor, starts: Sequence[float]) -> tuple[Tensor, Tensor, _Moments]:
        """Return the solved scale and offset of least error, `[groups, B]`, and their quadratics.

        Every start f is tried: the codes nearest to `(x - origin) * f * steps`; origin and steps are `[groups, B]`.
        """
        x = self.x - origin
        best: tuple[Tensor, ...] = ()
        for start in starts:
            q = self._moments(self.grid._round(x * (start * steps)))
            s, o = self._solve(q)
            best = better((q.error(s, o), s, o, *q), best)
        return best[1], best[2], _Moments(*best[3:])

    def _moments(self, q: Tensor) -> _Moments:
        wq = self.w * q
        return _Moments(wq.mul(q).sum(0), wq.sum(0), self.C, (self.wx * q).sum(0), self.E)

    def _solve(self, q: _Moments) -> tuple[Tensor, Tensor]:
        """Return the best scale >= 0 and offset (<= 0 in superblocks)."""
        det = q.A * q.C - q.B * q.B
        s = torch.where(det > 1e-6 * q.A * q.C, (q.D * q.C - q.E * q.B) / det, 0.0).clamp_(min=0)
        o = q.offset(s)
        if self.grid.qblock > self.grid.group_size:
            s = torch.where(o > 0, ratio(q.D, q.A), s).clamp_(min=0)
            o = o.clamp_(max=0)
        return s, o


class _Compiled:
    """`_Torch` by a compiled loop, which reads the values as they lie."""

    def __init__(self, loop: Loop, grid: Affine, x: Tensor, w: Tensor) -> None:
        self.loop, self.grid, self.x, self.w = loop, grid, x, w

    def best(self, origin: Tensor, steps: Tensor, starts: Sequence[float]) -> tuple[Tensor, Tensor, _Moments]:
        """See `_Torch.best`."""
        out = torch.empty(7, *origin.shape)
        arrays = [t.detach().numpy() for t in (self.x, self.w, origin, steps, torch.tensor(starts), out.flatten(1))]
        top, groups = 2.0**self.grid.bits - 1, origin.shape[0]
        in_threads(len(self.x), lambda first, last: self.loop(*arrays, top, groups, first, last))
        s, o, *moments = out
        return s, o, _Moments(*moments)


def _loop() -> Loop | None:
    return compiled(_best, "f2 f2 f2 f2 f1 f2 f i i i", reassociate=True)


def _best(x, w, origin, steps, starts, out, top, groups, first, last):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Write scale, offset, A, B, C, D, E of groups first to last to `out[7, M]`; see `_Torch.best`.

    Group r is weighed by row `r % len(w)` of `w`. Where groups is 1 offsets may be of any sign.
    """
    zero, flat = np.float32(0), np.float32(1e-6)
    for r in range(first, last):
        m, i, b = r % w.shape[0], r % groups, r // groups
        C = E = zero
        for j in range(x.shape[1]):
            C += w[m, j]
            E += w[m, j] * x[r, j]
        least = zero
        for f in range(starts.shape[0]):
            step, start = starts[f] * steps[i, b], origin[i, b]
            A = B = D = zero
            for j in range(x.shape[1]):
                q = min(max(np.rint((x[r, j] - start) * step), zero), top)
                wq = w[m, j] * q
                A += wq * q
                B += wq
                D += wq * x[r, j]
            det = A * C - B * B
            s = max((D * C - E * B) / det, zero) if det > flat * A * C else zero
            o = (E - B * s) / C if zero < C else zero
            if groups > 1 and o > zero:
                s, o = (max(D / A, zero) if zero < A else zero), zero
            slope = B * o - D
            error = s * (A * s + slope + slope) + o * (C * o - E - E)
            if f == 0 or error < least:
                least = error
                for k, value in enumerate((s, o, A, B, C, D, E)):
                    out[k, i * (x.shape[0] // groups) + b] = value
