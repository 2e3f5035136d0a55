"""Parameters: where the grid of one weight lies, in the two forms that files store.

    Params       w = scale * (code - zero)                  integer grids: GPTQ, AWQ, compressed-tensors
    GgmlParams   w = scale * level(code) + offset           ggml's types, whose scales are products of what is stored

Shape suffixes: N output features, K input features, G groups along K, B stored blocks along K.
Not here: what chooses them (grids/).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def stored(scale: Tensor, old: Tensor) -> Tensor:
    """Return scales in the dtype of `old`, and those of `old` where rounding makes 0 or infinity of them."""
    rounded = scale.to(old.dtype)
    return torch.where((rounded != 0) & rounded.isfinite(), rounded, old)


class Lattice(NamedTuple):
    """Evenly spaced values: `w = scale * (code - zero) + offset`, codes from `low` to `high`.

    scale, zero, offset: float32 `[N, G]`; a group whose scale is 0 takes the code `zero`.
    """

    scale: Tensor
    zero: Tensor
    offset: Tensor
    low: float
    high: float


@dataclass(frozen=True)
class Params:
    """Where one weight's grid lies: `w = scale * (code - zero)`.

    scale: `[N, G]` (or any shape that broadcasts against the codes), in the dtype it is stored in, not 0; negative
        where a symmetric grid has its surplus level above zero.
    zero: same shape, int32, an integer code in `[0, 2**bits - 1]`.
    """

    scale: Tensor
    zero: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Params:
        """Apply `f` to both tensors."""
        return Params(f(self.scale), f(self.zero))

    def columns(self, K: int, g_idx: Tensor | None = None) -> Params:
        """Return `[N, G]` parameters spread over K columns: by `g_idx` `[K]`, else in G equal runs."""
        return self.map(lambda p: _spread(p, K, g_idx))

    def by_group(self) -> list[Params]:
        """Return `[N, G]` parameters group by group for column loops, float32 `[N]` each, contiguous."""
        columns = self.map(lambda p: p.float().T.contiguous())
        return [Params(s, z) for s, z in zip(columns.scale, columns.zero, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Params]) -> Params:
        """Return the parameters of stacked weights."""
        return Params(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))

    def where(self, keep_N: Tensor, other: Params) -> Params:
        """Return these parameters in the rows where `keep_N` is true, `other` elsewhere."""
        keep = keep_N[:, None]
        return Params(torch.where(keep, self.scale, other.scale), torch.where(keep, self.zero, other.zero))

    def split(self, rows: Sequence[int]) -> list[Params]:
        """Return `[N, G]` parameters in parts of so many rows."""
        parts = zip(self.scale.split(list(rows)), self.zero.split(list(rows)), strict=True)
        return [Params(s, z) for s, z in parts]


@dataclass(frozen=True)
class GgmlParams:
    """Where the ggml grid of one weight lies: `w = scale * level(code) + offset`, and what its file stores of that.

    scale: float32 `[N, G]`, `d * sc` (`d` where a type has no `sc`); any sign, 0 where a group is all zero.
    offset: float32 `[N, G]`, `-dmin * m` (`-dmin` where a type has no `m`); None on grids without one.
    d, dmin: float16 `[N, B]`, B stored blocks (qblocks) along K. sc, m: int16 `[N, G]`, their small integers.
    What a type does not store is None; so is all that is stored, once spread over columns or taken by group.
    """

    scale: Tensor
    offset: Any = None  # each a Tensor or None, by the type
    d: Any = None
    dmin: Any = None
    sc: Any = None
    m: Any = None

    def map(self, f: Callable[[Tensor], Tensor]) -> GgmlParams:
        """Apply `f` to every tensor."""
        mapped: list[Any] = [None if p is None else f(p) for p in self._fields()]
        return GgmlParams(*mapped)

    def columns(self, K: int, g_idx: Tensor | None = None) -> GgmlParams:
        """Return scale and offset spread over K columns: by `g_idx` `[K]`, else in G equal runs."""
        return self._derived().map(lambda p: _spread(p, K, g_idx))

    def by_group(self) -> list[GgmlParams]:
        """Return scale and offset group by group for column loops, `[N]` each, contiguous."""
        columns = self._derived().map(lambda p: p.T.contiguous())
        return [columns.map(lambda p, g=g: p[g]) for g in range(self.scale.shape[1])]  # type: ignore[misc]

    @staticmethod
    def cat(parts: Sequence[GgmlParams]) -> GgmlParams:
        """Return the parameters of stacked weights."""
        joined: list[Any] = [
            None if p[0] is None else torch.cat(p) for p in zip(*(q._fields() for q in parts), strict=True)
        ]
        return GgmlParams(*joined)

    def where(self, keep_N: Tensor, other: GgmlParams) -> GgmlParams:
        """Return these parameters in the rows where `keep_N` is true, `other` elsewhere."""
        pairs = zip(self._fields(), other._fields(), strict=True)
        chosen: list[Any] = [None if a is None else torch.where(keep_N[:, None], a, b) for a, b in pairs]
        return GgmlParams(*chosen)

    def split(self, rows: Sequence[int]) -> list[GgmlParams]:
        """Return the parameters in parts of so many rows."""
        ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        return [self.map(lambda p, a=end - n, b=end: p[a:b]) for n, end in zip(rows, ends, strict=True)]  # type: ignore[misc]

    def _fields(self) -> tuple[Any, ...]:
        return self.scale, self.offset, self.d, self.dmin, self.sc, self.m

    def _derived(self) -> GgmlParams:
        return GgmlParams(self.scale, self.offset)


def _spread(p: Tensor, K: int, g_idx: Tensor | None) -> Tensor:
    return p.repeat_interleave(K // p.shape[1], dim=1) if g_idx is None else p[:, g_idx.long()]
