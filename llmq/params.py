"""Parameters: where the grid of one weight lies, in the forms that files store.

    Params       w = scale * (code - zero)                  integer grids: GPTQ, AWQ, compressed-tensors
    FloatParams  w = scale * value(code)                    small floats: FP8, NVFP4, MXFP4, MXFP8
    GgmlParams   w = scale * level(code) + offset           ggml's types, whose scales are products of what is stored

Another form is another frozen dataclass of tensors under `Parameters`, which spreads, stacks and splits it.
Shape suffixes: N output features, K input features, G groups along K, B stored blocks along K.
Not here: what chooses them (grids/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple, Self

import torch
from torch import Tensor

ROUNDER = 12582912.0
"""1.5 * 2^23: added to a float32 below 2^22 and taken away again, it rounds it half to even, like torch.round."""


def stored(scale: Tensor, old: Tensor) -> Tensor:
    """Return scales in the dtype of `old`, and those of `old` where rounding makes 0 or infinity of them."""
    rounded = scale.to(old.dtype)
    return torch.where((rounded != 0) & rounded.isfinite(), rounded, old)


class Held(NamedTuple):
    """Which scales a file holds: the least above 0, the least with all its digits, the largest."""

    least: float
    full: float
    most: float

    def beyond(self, scale: Tensor) -> Tensor:
        """Say of each scale whether it is too small or too large; 0 is neither."""
        return (scale != 0) & ((scale < self.least) | (scale > self.most))

    def holds(self, scale: Tensor) -> bool:
        """Say whether all of these are stored with all their digits: told by the least and the largest alone."""
        low, high = scale.aminmax()
        return self.full <= low.item() and high.item() < self.most

    def strain(self, scale: Tensor) -> dict[str, int]:
        """Count scales, stored or not yet, that are "lost", "coarse" or "clipped".

        The first are the least there is or smaller, the last the largest or larger; the others have fewer digits.
        """
        if self.holds(scale):
            return {}
        lost = (scale > 0) & (scale <= 1.01 * self.least)  # where it is stored, the least is rounded itself
        kinds = {"lost": lost, "coarse": (scale > 0) & (scale < self.full) & ~lost, "clipped": scale >= self.most}
        return {kind: n for kind, mask in kinds.items() if (n := int(mask.sum()))}


class Levels(NamedTuple):
    """A table of ascending values, each with a rank in it and a code, for loops that round to the nearest.

    t takes the last rank whose edge lies below it. Example: 0, 1 and 4 with ties going up have the edges -inf, the
    float32 below 0.5 and the one below 2.5.
    value, edge: float32 `[M]`, M a power of two: the last value again and infinity where there are fewer values.
    code: uint8 `[L]`, that of each rank. rank: uint8 `[256]`, that of each code; 0 of one that is no value.
    """

    value: Tensor
    edge: Tensor
    code: Tensor
    rank: Tensor

    @classmethod
    def of(cls, value: Tensor, code: Tensor, up: Tensor) -> Levels:
        """Return the table of ascending float32 values `[L]`. up: whether half-way to the next is rounded up to it."""
        between = (value[1:] + value[:-1]) / 2
        between = torch.where(up, between.nextafter(torch.tensor(-torch.inf)), between)
        more = 2 ** (len(value) - 1).bit_length() - len(value)
        rank = torch.zeros(256, dtype=torch.uint8)
        rank[code.long()] = torch.arange(len(code), dtype=torch.uint8)
        edge = torch.cat([torch.tensor([-torch.inf]), between, torch.full((more,), torch.inf)])
        return cls(torch.cat([value, value[-1:].expand(more)]), edge, code, rank)

    def nearest(self, t: Tensor) -> Tensor:
        """Return the codes of the values nearest to float32 `t`, as float32 integers."""
        ranks = torch.bucketize(t.contiguous(), self.edge[1 : len(self.code)].to(t.device))
        return self.code.to(t.device)[ranks].float()


class Lattice(NamedTuple):
    """The values of a grid, for loops: `w = scale * (code - zero) + offset`, codes from `low` to `high`.

    With levels they are those of a table, `w = scale * (value(code) - zero) + offset`.
    scale, zero, offset: float32 `[N, G]`; a group whose scale is 0 takes the code nearest to `zero`.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor
    low: float
    high: float
    levels: Levels | None = None

    def table(self) -> tuple[Tensor, Tensor]:
        """Return the values and edges of the levels, on the device of the scales; `[0]` where there are none."""
        if self.levels is None:
            return self.scale.new_empty(0), self.scale.new_empty(0)
        return self.levels.value.to(self.scale.device), self.levels.edge.to(self.scale.device)


@dataclass(frozen=True)
class Parameters:
    """The base of all forms: tensors with a row for each row of the weight; those that a grid does not have are None.

    scale: `[N, G]` (or any shape that broadcasts against the codes).
    """

    scale: Tensor

    @classmethod
    def of(cls, params: Parameters) -> Self:
        """Return `params`, which are to be of this form. Raises TypeError where they are another grid's."""
        if not isinstance(params, cls):
            raise TypeError(f"this grid lies by {cls.__name__}, not by {type(params).__name__}")
        return params

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names, without those that the grid does not have."""
        return {name: t for name, t in vars(self).items() if t is not None}

    def decoding(self) -> Self:
        """Return what decoding needs, all of it `[N, G]`."""
        return self

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """Apply `f` to every tensor."""
        return type(self)(**{name: f(t) for name, t in self.tensors().items()})

    def columns(self, K: int, g_idx: Tensor | None = None) -> Self:
        """Return what decoding needs spread over K columns: by `g_idx` `[K]`, else in G equal runs."""
        return self.decoding().map(lambda p: _spread(p, K, g_idx))

    def by_group(self) -> list[Self]:
        """Return what decoding needs group by group for column loops, float32 `[N]` each, contiguous."""
        columns = self.decoding().map(lambda p: p.float().T.contiguous())
        return [columns.map(itemgetter(g)) for g in range(self.scale.shape[1])]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the parameters of stacked weights."""
        rest = [p.tensors() for p in parts]
        return replace(parts[0], **{name: torch.cat([r[name] for r in rest]) for name in rest[0]})

    def where(self, keep_N: Tensor, other: Self) -> Self:
        """Return these parameters in the rows where `keep_N` is true, `other` elsewhere."""
        theirs = other.tensors()
        return replace(self, **{n: torch.where(keep_N[:, None], t, theirs[n]) for n, t in self.tensors().items()})

    def split(self, rows: Sequence[int]) -> list[Self]:
        """Return the parameters in parts of so many rows."""
        parts = zip(*(t.split(list(rows)) for t in self.tensors().values()), strict=True)
        return [replace(self, **dict(zip(self.tensors(), part, strict=True))) for part in parts]


@dataclass(frozen=True)
class Params(Parameters):
    """Where one weight's grid lies: `w = scale * (code - zero)`.

    scale: in the dtype it is stored in, not 0; negative where a symmetric grid has its surplus level above zero.
    zero: same shape, int32, an integer code in `[0, 2**bits - 1]`.
    """

    zero: Tensor


@dataclass(frozen=True)
class FloatParams(Parameters):
    """Where a grid of small floats lies: `w = scale * value(code)`.

    scale: `[N, G]`, above 0; in the dtype it is stored in, float32 where `stored` holds what the file does.
    stored: uint8 `[N, G]`, the bits of the scales in the file (E4M3 or E8M0); None where that is `scale` itself.
    divisor: float32 `[N, 1]`, what the stored scales are divided by, one for a whole weight; None on grids without.
    """

    stored: Tensor | None = None
    divisor: Tensor | None = None

    def decoding(self) -> FloatParams:
        """Return the scale."""
        return FloatParams(self.scale)


@dataclass(frozen=True)
class GgmlParams(Parameters):
    """Where the ggml grid of one weight lies: `w = scale * level(code) + offset`, and what its file stores of that.

    scale: float32 `[N, G]`, `d * sc` (`d` where a type has no `sc`); any sign, 0 where a group is all zero.
    offset: float32 `[N, G]`, `-dmin * m` (`-dmin` where a type has no `m`); None on grids without one.
    d, dmin: float16 `[N, B]`, B stored blocks (qblocks) along K. sc, m: int16 `[N, G]`, their small integers.
    What a type does not store is None; so is all that is stored, once spread over columns or taken by group.
    """

    offset: Tensor | None = None
    d: Tensor | None = None
    dmin: Tensor | None = None
    sc: Tensor | None = None
    m: Tensor | None = None

    def decoding(self) -> GgmlParams:
        """Return scale and offset."""
        return GgmlParams(self.scale, self.offset)


def _spread(p: Tensor, K: int, g_idx: Tensor | None) -> Tensor:
    return p.repeat_interleave(K // p.shape[1], dim=1) if g_idx is None else p[:, g_idx.long()]
