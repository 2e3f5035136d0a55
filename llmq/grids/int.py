"""Integer grids: 2**bits evenly spaced values per group, `w = scale * (code - zero)`.

symmetric:   scale = max|w| / ((2^b - 1) / 2), zero = 2^(b-1): codes -2^(b-1) .. 2^(b-1)-1, one more value below than
             above. `restricted` uses max|w| / (2^(b-1) - 1), which keeps +-max exact: the usual choice for W8A8.
asymmetric:  scale = (max - min) / (2^b - 1), zero = round(-min / scale), with min <= 0 <= max so that 0.0 is exact.

Scales are rounded to the dtype they will be stored in before any code is chosen, so that solvers correct for it.
Not here: which interval to cover (ranges/), how codes are packed (formats/).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.types import Lattice, Params, Range

_LEAST = {torch.float16: 2.0**-24}  # the least scale of a group that is not all zero: float16 holds nothing below
_DEFAULT_LEAST = 1e-30
_OF_ZEROS = {torch.float16: 1e-5}  # the scale of a group that is
_DEFAULT_OF_ZEROS = 1e-8
# Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 half to even, like torch.round, whose kernel wakes every
# thread for a row of 3,000 values and so spends milliseconds in barriers when a core is busy.
# A tensor, since a Python number would be converted at every call.
_ROUND = torch.tensor(12582912.0)


@dataclass(frozen=True)
class Int:
    """An integer grid.

    group_size: columns that share a scale; None is per channel (one group a row).
    per_tensor: one scale for the whole weight; needs group_size None.
    range: how `fit` chooses intervals; None (a grid read from a checkpoint) is min-max.
    scale_dtype: the dtype scales are stored in.
    """

    bits: int = 4
    sym: bool = True
    group_size: int | None = 128
    per_tensor: bool = False
    restricted: bool = False
    scale_dtype: Any = field(default=torch.float16, compare=False)
    range: Range | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, or None for per channel, not {self.group_size}")
        if self.per_tensor and getattr(self.range, "uses_blocks", False):
            raise ValueError("the range 'output' needs scales per group or per channel, not per tensor")

    def groups(self, K: int) -> int:
        """Return G for K input features. Raises ValueError where the group does not divide K."""
        g = self.group_size or K
        if K % g:
            raise ValueError(f"group size {g} does not divide K = {K}")
        return K // g

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> Params:
        """Choose scale and zero `[N, G]` for float32 `W_NK`, errors weighed by the diagonal of `H_KK` if given.

        `H_KK` may be that diagonal alone, `[K]`.

        A range that wants whole diagonal blocks of H (`uses_blocks`) is handed `[G, g, g]` in place of `[G, g]`.
        """
        N, K = W_NK.shape
        G = self.groups(K)
        if self.per_tensor:
            weight = None if H_KK is None else _diagonal(H_KK).expand(N, K).reshape(-1)
            params = self._fit_rows(W_NK.reshape(-1), weight)
            return params.map(lambda p: p.expand(N, 1).contiguous())
        return self._fit_rows(W_NK.reshape(N, G, K // G), _group_weight(H_KK, G, self.range))

    def _fit_rows(self, w: Tensor, weight: Tensor | None) -> Params:
        if self.range is None:
            lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        else:
            lo, hi = self.range.interval(w, self, weight)
        return self.params(lo, hi)

    def params(self, lo: Tensor, hi: Tensor) -> Params:
        """Return the grid that covers `[lo, hi]` (lo <= 0 <= hi), scales rounded to `scale_dtype`.

        A symmetric grid for an interval given from its upper end (lo >= 0 >= hi) falls: its scale is negative.
        """
        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        exact = self._scale(lo, hi)
        scale = exact.clamp(*self._held()).masked_fill_(exact == 0, _OF_ZEROS.get(self.scale_dtype, _DEFAULT_OF_ZEROS))
        scale = scale.to(self.scale_dtype)
        if self.sym:
            scale = torch.where(lo > hi, -scale, scale)
        if self.sym:
            zero = torch.full(scale.shape, half, dtype=torch.int32, device=scale.device)
        else:
            zero = (-lo / scale.float()).round().clamp(0, top).to(torch.int32)
        return Params(scale, zero)

    def beyond(self, W_NK: Tensor) -> Tensor:
        """Say of each group `[N, G]` of a float matrix whether its scale is one that `scale_dtype` does not hold.

        Such a group is so small that codes or all of it are lost, or so large that it is clipped.
        """
        N, K = W_NK.shape
        w = W_NK.reshape(1, 1, -1) if self.per_tensor else W_NK.reshape(N, self.groups(K), -1)
        lo, hi = (x.float() for x in w.aminmax(dim=-1))
        exact = self._scale(lo.clamp(max=0), hi.clamp(min=0))
        least, limit = self._held()
        return (exact != 0) & ((exact < least) | (exact > limit))

    def _scale(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Return the scale of the grid that covers `[lo, hi]`, before it is rounded."""
        top = 2**self.bits - 1
        if not self.sym:
            return (hi - lo) / top
        return torch.maximum(hi.abs(), lo.abs()) / (2 ** (self.bits - 1) - 1 if self.restricted else top / 2)

    def _held(self) -> tuple[float, float]:
        """Return the least and the greatest scale of `scale_dtype`."""
        return _LEAST.get(self.scale_dtype, _DEFAULT_LEAST), torch.finfo(self.scale_dtype).max

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest code."""
        return 1.0 if self.restricted else 0.0, 2.0**self.bits - 1

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        """Return the nearest codes as float32 integers."""
        code = (w / params.scale.float()).add_(_ROUND).sub_(_ROUND)
        return code.add_(params.zero).clamp_(*self.bounds())

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return `scale * (code - zero)` in float32."""
        return (codes - params.zero).float().mul_(params.scale.float())

    def lattice(self, params: Params) -> Lattice:
        """Return the values of `[N, G]` parameters."""
        scale = params.scale.float()
        return Lattice(scale, params.zero.float(), torch.zeros_like(scale), *self.bounds())

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Params, H_KK: Tensor, group_K: Tensor
    ) -> Params:
        """Return params whose scales are the least-squares ones for these codes; see `_int_refine`.

        One scale for the whole tensor stays as it is.
        """
        if self.per_tensor:
            return params
        from llmq.grids._int_refine import refine

        return refine(gradient_NK, codes, params, H_KK, group_K)


def _group_weight(H_KK: Tensor | None, G: int, range_: Range | None) -> Tensor | None:
    if H_KK is None:
        return None
    g = H_KK.shape[0] // G
    if getattr(range_, "uses_blocks", False):
        i = torch.arange(G, device=H_KK.device)
        return H_KK.reshape(G, g, G, g)[i, :, i, :]
    return _diagonal(H_KK).reshape(G, g)


def _diagonal(H_KK: Tensor) -> Tensor:
    return H_KK if H_KK.dim() == 1 else H_KK.diagonal()
