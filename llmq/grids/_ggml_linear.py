"""ggml grids through zero: `w = scale * level`, the scale of any sign, levels evenly spaced or from a code book.

For fixed levels v the error `sum w (x - s v)^2` is least at `s = D / A` with `D = sum w x v`, `A = sum w v^2`, and is
then less than at s = 0 by `D^2 / A`. The search rounds a group with its largest value on several levels, solves each
for s and keeps the best; then it alternates: store the scales, round with what was stored, solve again. A round that
does not lower the error of a qblock is not kept, so more rounds never hurt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmq.grids._ggml import GgmlGrid, Stored, better, by_group, error_weights, half, nearest_integer, peak, ratio
from llmq.types import GgmlParams, Lattice

_ROUNDS = 3


@dataclass(frozen=True)
class Linear(GgmlGrid):
    """Levels `code - zero` times a signed scale.

    zero: the code of level 0. starts: levels to try the largest value of a group on.
    sc_starts: as `starts`, for the scales of a superblock.
    """

    zero: ClassVar[int]
    starts: ClassVar[tuple[float, ...]]
    sc_starts: ClassVar[tuple[float, ...]] = ()

    def nearest(self, w: Tensor, params: GgmlParams) -> Tensor:
        """Return the nearest codes as float32 integers; the code of level 0 where the scale is 0."""
        return self._levels((w / params.scale).nan_to_num_(0.0, 0.0, 0.0)).add_(self.zero)

    def decode(self, codes: Tensor, params: GgmlParams) -> Tensor:
        """Return `scale * (code - zero)` in float32."""
        return self._decoded_levels(codes).mul_(params.scale)

    def lattice(self, params: GgmlParams) -> Lattice | None:
        """Return the values of `[N, G]` parameters."""
        scale = params.scale
        zero = torch.full_like(scale, self.zero)
        return Lattice(scale, zero, torch.zeros_like(scale), 0.0, 2.0**self.bits - 1)

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return codes.float() - self.zero

    def _levels(self, t: Tensor) -> Tensor:
        """Round `t` (overwritten) to the nearest levels."""
        return nearest_integer(t).clamp_(-self.zero, 2**self.bits - 1 - self.zero)

    def _fit_rows(self, W_nK: Tensor, importance: Tensor | None) -> Stored:
        n, groups = W_nK.shape[0], self.qblock // self.group_size
        x = by_group(W_nK, self)
        w = error_weights(x, self, importance)
        wx = w * x
        scale, A = self._search(x, w, wx)
        best: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            d, sc = self._store(scale.view(groups, -1), A.view(groups, -1))
            s = (d.float() * sc).view(-1)
            D, A = self._moments((x / s).nan_to_num_(0.0, 0.0, 0.0), w, wx)
            error = (s * (A * s - 2 * D)).view(groups, -1).sum(0)
            best = better((error, d, sc), best)
            scale = ratio(D, A)
        _, d, sc = best
        return Stored(d.view(n, -1), None, None if groups == 1 else sc.T.to(torch.int16).reshape(n, -1))

    def _moments(self, t: Tensor, w: Tensor, wx: Tensor) -> tuple[Tensor, Tensor]:
        """Return D and A, `[M]`, at the levels nearest to `t` (overwritten)."""
        v = self._levels(t)
        return (wx * v).sum(0), (w * v).mul_(v).sum(0)

    def _search(self, x: Tensor, w: Tensor, wx: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scale and its A, `[M]`, over the starts."""
        largest = peak(x)
        inverse = torch.where(largest.abs() < 1e-30, 0.0, 1 / largest)
        best: tuple[Tensor, ...] = ()
        for start in self.starts:
            D, A = self._moments(x * (start * inverse), w, wx)
            s = ratio(D, A)
            best = better((-s * D, s, A), best)
        _, scale, A = best
        return scale, A

    def _store(self, s: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return d `[M / groups]` as float16 and sc `[groups, M / groups]` as float32 integers, near scales `s`.

        s, A: `[groups, M / groups]`; a scale `t` in place of s costs `A (t - s)^2`.
        """
        if len(s) == 1:
            return half(s[0]), torch.ones_like(s)
        largest = peak(s)
        best: tuple[Tensor, ...] = ()
        for start in self.sc_starts:
            sc = self._small(s, largest / start)
            d = half(ratio((A * s * sc).sum(0), (A * sc * sc).sum(0))).float()
            sc = self._small(s, d)
            best = better(((sc * d - s).square_().mul_(A).sum(0), d, sc), best)
        _, d, sc = best
        return half(d), sc

    def _small(self, s: Tensor, d: Tensor) -> Tensor:
        return (s / d).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*self.small_range)


_TABLE = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
# Values half-way between two levels are multiples of 1/2, so the nearest level of all of [i / 2, (i + 1) / 2) is one.
_HALVES = 256
_NEAREST = torch.bucketize(torch.arange(-_HALVES, _HALVES) / 2, (_TABLE[1:] + _TABLE[:-1]) / 2, right=True)


@dataclass(frozen=True)
class Table(Linear):
    """The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h) times a signed scale."""

    zero: ClassVar[int] = 0

    def nearest(self, w: Tensor, params: GgmlParams) -> Tensor:
        """Return the codes of the nearest levels as float32 integers."""
        return _look_up(_NEAREST.float(), (w / params.scale).nan_to_num_(0.0, 0.0, 0.0))

    def decode(self, codes: Tensor, params: GgmlParams) -> Tensor:
        """Return `scale * table[code]` in float32."""
        return self._decoded_levels(codes).mul_(params.scale)

    def lattice(self, params: GgmlParams) -> None:
        """Return None: the levels are not evenly spaced."""

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return _TABLE.to(codes.device)[codes.int()]

    def _levels(self, t: Tensor) -> Tensor:
        return _look_up(_TABLE[_NEAREST], t)


def _look_up(table: Tensor, t: Tensor) -> Tensor:
    """Return the entries of `table`, one for each half step, at values `t` (overwritten)."""
    index = t.mul_(2).add_(_HALVES).floor_().clamp_(0, 2 * _HALVES - 1).int()
    return table.to(t.device).index_select(0, index.flatten()).view(t.shape)
