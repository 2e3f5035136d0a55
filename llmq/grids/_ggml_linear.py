"""ggml grids through zero: `w = scale * level`, the scale of any sign, levels evenly spaced or from a code book.

For fixed levels v the error `sum w (x - s v)^2` is least at `s = D / A` with `D = sum w x v`, `A = sum w v^2`, and is
then less than at s = 0 by `D^2 / A`. The search rounds a group with its largest value on several levels, solves each
for s and keeps the best; then it alternates: store the scales, round with what was stored, solve again. A round that
does not lower the error of a qblock is not kept, so more rounds never hurt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    inverse,
    larger,
    nearest_integer,
    ratio,
)
from llmq.jit import Loop, compiled, in_threads
from llmq.types import Lattice, Levels, Parameters

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

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the nearest codes as float32 integers; the code of level 0 where the scale is 0."""
        return self._levels((w / params.scale).nan_to_num_(0.0, 0.0, 0.0)).add_(self.zero)

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return `scale * (code - zero)` in float32."""
        return self._decoded_levels(codes).mul_(params.scale)

    def lattice(self, params: Parameters) -> Lattice:
        """See `Grid.lattice`."""
        scale = params.scale
        zero = torch.full_like(scale, self.zero)
        return Lattice(scale, zero, torch.zeros_like(scale), 0.0, 2.0**self.bits - 1)

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return codes.float() - self.zero

    def _levels(self, t: Tensor) -> Tensor:
        """Round `t` (overwritten) to the nearest levels."""
        return nearest_integer(t).clamp_(-self.zero, 2**self.bits - 1 - self.zero)

    def _reach(self, lo: Tensor, hi: Tensor) -> Tensor:
        """See `GgmlGrid._reach`; a scale may be negative, so that the larger side takes the level farther out."""
        farthest = self._levels(torch.tensor([-1e6, 1e6])).abs().max()
        return torch.maximum(hi.abs(), lo.abs()) / farthest

    def _half_steps(self) -> Tensor:
        """Return the levels nearest to every half step from -n / 2 on, `[2 n]`; nothing where they are integers."""
        return torch.empty(0)

    def _fit_rows(self, W_nK: Tensor, importance: Tensor | None) -> Stored:
        n = W_nK.shape[0]
        x = W_nK.reshape(-1, self.group_size)
        w = error_weights(x, importance)
        loop = _loop() if x.device.type == "cpu" else None
        fit = _Torch(self, x, w) if loop is None else _Compiled(loop, self, x, w)
        scale, A, _ = fit.best(inverse(larger(*extremes(x, self))), self.starts)
        best: tuple[Tensor, ...] = ()
        for _ in range(_ROUNDS):
            d, sc = self._store(scale, A)
            s = d.float() * sc
            scale, A, D = fit.best(inverse(s), (1.0,))
            best = better(((s * (A * s - 2 * D)).sum(0), d, sc), best)
        _, d, sc = best
        return Stored(d.view(n, -1), None, None if len(s) == 1 else sc.T.to(torch.int16).reshape(n, -1))

    def _store(self, s: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return d `[B]` as float16 and sc `[groups, B]` as float32 integers, near scales `s`.

        s, A: `[groups, B]`; a scale `t` in place of s costs `A (t - s)^2`.
        """
        if len(s) == 1:
            return half(s[0]), torch.ones_like(s)
        largest = larger(s.amin(0), s.amax(0))
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


class _Torch:
    """The groups of one chunk: values `x[M, g]` and their error weights, as `error_weights` gives them."""

    def __init__(self, grid: Linear, x: Tensor, w: Tensor) -> None:
        self.grid = grid
        self.x = by_group(x, grid)
        self.w = by_group(w.repeat(len(x) // len(w), 1), grid)
        self.wx = self.w * self.x

    def best(self, steps: Tensor, starts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the solved scale of least error, `[groups, B]`, its A and its D.

        Every start f is tried: the levels nearest to `x * f * steps`; steps is `[groups, B]`.
        """
        best: tuple[Tensor, ...] = ()
        for start in starts:
            v = self.grid._levels(self.x * (start * steps))
            D, A = (self.wx * v).sum(0), (self.w * v).mul_(v).sum(0)
            s = ratio(D, A)
            best = better((-s * D, s, A, D), best)
        return best[1:]  # type: ignore[return-value]


class _Compiled:
    """`_Torch` by a compiled loop, which reads the values as they lie."""

    def __init__(self, loop: Loop, grid: Linear, x: Tensor, w: Tensor) -> None:
        self.loop, self.grid, self.x, self.w = loop, grid, x, w

    def best(self, steps: Tensor, starts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Torch.best`."""
        out = torch.empty(3, *steps.shape)
        tensors = (self.x, self.w, steps, torch.tensor(starts), self.grid._half_steps(), out.flatten(1))
        arrays = [t.detach().numpy() for t in tensors]
        bounds = -float(self.grid.zero), 2.0**self.grid.bits - 1 - self.grid.zero
        in_threads(len(self.x), lambda first, last: self.loop(*arrays, *bounds, len(steps), first, last))
        return tuple(out)  # type: ignore[return-value]


def _loop() -> Loop | None:
    return compiled(_best, "f2 f2 f2 f1 f1 f2 f f i i i", reassociate=True)


def _best(x, w, steps, starts, table, out, low, high, groups, first, last):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Write scale, A, D of groups first to last to `out[3, M]`; see `_Torch.best`.

    Group r is weighed by row `r % len(w)` of `w`. Levels are the entries of `table`, one for each half step, where it
    has any; else the integers from low to high.
    """
    zero, two, halves = np.float32(0), np.float32(2), np.float32(table.shape[0] // 2)
    greatest = zero
    for r in range(first, last):
        m, i, b = r % w.shape[0], r % groups, r // groups
        for f in range(starts.shape[0]):
            step = starts[f] * steps[i, b]
            A = D = zero
            if table.shape[0] > 0:
                for j in range(x.shape[1]):
                    t = np.floor(x[r, j] * step * two + halves)
                    v = table[int(min(max(t, zero), halves + halves - np.float32(1)))]
                    A += w[m, j] * v * v
                    D += w[m, j] * v * x[r, j]
            else:
                for j in range(x.shape[1]):
                    v = min(max(np.rint(x[r, j] * step), low), high)
                    A += w[m, j] * v * v
                    D += w[m, j] * v * x[r, j]
            s = D / A if zero < A else zero
            if f == 0 or s * D > greatest:
                greatest = s * D
                for k, value in enumerate((s, A, D)):
                    out[k, i * (x.shape[0] // groups) + b] = value


_TABLE = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
# Values half-way between two levels are multiples of 1/2, so the nearest level of all of [i / 2, (i + 1) / 2) is one.
_HALVES = 256
_NEAREST = torch.bucketize(torch.arange(-_HALVES, _HALVES) / 2, (_TABLE[1:] + _TABLE[:-1]) / 2, right=True)
_LEVELS = Levels.of(_TABLE, torch.arange(16, dtype=torch.uint8), torch.ones(15, dtype=torch.bool))


@dataclass(frozen=True)
class Table(Linear):
    """The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl of ggml-common.h) times a signed scale."""

    zero: ClassVar[int] = 0

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the codes of the nearest levels as float32 integers; that nearest to 0 where the scale is 0."""
        return _LEVELS.nearest((w / params.scale).nan_to_num_(0.0, 0.0, 0.0))

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return `scale * table[code]` in float32."""
        return self._decoded_levels(codes).mul_(params.scale)

    def lattice(self, params: Parameters) -> Lattice:
        """See `Grid.lattice`."""
        return super().lattice(params)._replace(levels=_LEVELS)

    def _decoded_levels(self, codes: Tensor) -> Tensor:
        return _TABLE.to(codes.device)[codes.int()]

    def _levels(self, t: Tensor) -> Tensor:
        index = t.mul_(2).add_(_HALVES).floor_().clamp_(0, 2 * _HALVES - 1).int()
        return self._half_steps().to(t.device).index_select(0, index.flatten()).view(t.shape)

    def _half_steps(self) -> Tensor:
        return _TABLE[_NEAREST]
