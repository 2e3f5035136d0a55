"""Integer grids: 2**bits evenly spaced values per group, `w = scale * (code - zero)`.

symmetric:   scale = max|w| / ((2^b - 1) / 2), zero = 2^(b-1): codes -2^(b-1) .. 2^(b-1)-1, one more value below than
             above. `restricted` uses max|w| / (2^(b-1) - 1), which keeps +-max exact: the usual choice for W8A8.
asymmetric:  scale = (max - min) / (2^b - 1), zero = round(-min / scale), with min <= 0 <= max so that 0.0 is exact.

Scales are rounded to the dtype they will be stored in before any code is chosen, so that solvers correct for it.
Not here: which interval to cover (ranges/), how codes are packed (formats/).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from llmq.granularity import Granularity, PerBlock, PerRow, PerTensor, granularity
from llmq.options import Between
from llmq.params import ROUNDER
from llmq.types import AffineGrid, Grid, Held, Lattice, Parameters, Params, Range

_LEAST = {torch.float16: 2.0**-24}  # the least scale of a group that is not all zero: float16 holds nothing below
_DEFAULT_LEAST = 1e-30
_OF_ZEROS = {torch.float16: 1e-5}  # the scale of a group that is
_DEFAULT_OF_ZEROS = 1e-8
# torch.round's kernel wakes every thread for a row of 3,000 values and so spends milliseconds in barriers when a core
# is busy. A tensor, since a Python number would be converted at every call.
_ROUND = torch.tensor(ROUNDER)


@dataclass(frozen=True)
class Int(AffineGrid):
    """An integer grid.

    group: columns that share a scale; "channel" is one scale a row, "tensor" one for the whole weight.
    restricted: codes reach as far below zero as above.
    range: how `fit` chooses intervals; None (a grid read from a checkpoint) is min-max.
    scale_dtype: the dtype scales are stored in.
    minima: whether the file holds `zero * scale`, rounded to that dtype, in place of the zero (MLX).
    """

    bits: Annotated[int, Between(2, 8)] = 4
    sym: bool = True
    group: int | str = 128
    restricted: bool = False
    range: Range | None = field(default=None, compare=False)
    scale_dtype: torch.dtype = field(default=torch.float16, compare=False, metadata={"option": False})
    minima: bool = field(default=False, compare=False, metadata={"option": False})

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if isinstance(self.granularity, PerBlock):
            raise ValueError(f"an integer grid has scales per group, channel or tensor, not {self.granularity}")
        if isinstance(self.granularity, PerTensor) and self.wants_hessian:
            raise ValueError("the range 'output' needs scales per group or per channel, not per tensor")

    @cached_property
    def granularity(self) -> Granularity:
        """See `Grid.granularity`."""
        return granularity(self.group)

    def stored_in(self, dtype: torch.dtype) -> Int:
        """See `Grid.stored_in`."""
        return replace(self, scale_dtype=dtype)

    def with_bits(self, bits: int) -> Grid:
        """See `Grid.with_bits`; a kind derived from this one may fix its bits."""
        return replace(self, bits=bits) if "bits" in {f.name for f in fields(self)} else super().with_bits(bits)

    def params(self, lo: Tensor, hi: Tensor) -> Params:
        """Return the grid that covers `[lo, hi]` (lo <= 0 <= hi), scales rounded to `scale_dtype`.

        A symmetric grid for an interval given from its upper end (lo >= 0 >= hi) falls: its scale is negative.
        """
        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        exact = self._scale(lo, hi)
        least, _, most = self.held
        scale = exact.clamp(least, most).masked_fill_(exact == 0, self._of_zeros)
        scale = scale.to(self.scale_dtype)
        if self.sym:
            scale = torch.where(lo > hi, -scale, scale)
        if self.sym:
            zero = torch.full(scale.shape, half, dtype=torch.int32, device=scale.device)
        else:
            zero = (-lo / scale.float()).round().clamp(0, top).to(torch.int32)
        return Params(scale, zero)

    @property
    def _of_zeros(self) -> float:
        """The scale of a group that is all zero, before it is rounded."""
        return _OF_ZEROS.get(self.scale_dtype, _DEFAULT_OF_ZEROS)

    @property
    def held(self) -> Held:
        """The scales of `scale_dtype`."""
        info = torch.finfo(self.scale_dtype)
        return Held(_LEAST.get(self.scale_dtype, _DEFAULT_LEAST), info.tiny, info.max)

    def strain(self, W_NK: Tensor, params: Parameters) -> dict[str, int]:
        """See `Grid.strain`; told by the scales, which are few. That of a group of zeros is none of these."""
        scale = params.scale[: self.granularity.rows(len(W_NK))].float().abs()
        if self.held.holds(scale):
            return {}
        of_zeros = torch.tensor(self._of_zeros).to(params.scale.dtype).item()
        return self.held.strain(scale.where(scale != of_zeros, 0))

    def covering(self, W_NK: Tensor) -> Tensor:
        """See `Grid.covering`; `[N, G]`."""
        lo, hi = (x.float() for x in self.granularity.gathered(W_NK).aminmax(dim=-1))
        return self._scale(lo.clamp(max=0), hi.clamp(min=0))

    def fake_quantize(self, x: Tensor, fixed: Parameters | None = None) -> Tensor:
        """See `RangedGrid.fake_quantize`."""
        integers, scale, zero = quantize_activation(x, self, fixed)
        return (integers if zero is None else integers.sub_(zero)) * scale

    def _scale(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Return the scale of the grid that covers `[lo, hi]`, before it is rounded."""
        top = 2**self.bits - 1
        if not self.sym:
            return (hi - lo) / top
        return torch.maximum(hi.abs(), lo.abs()) / (2 ** (self.bits - 1) - 1 if self.restricted else top / 2)

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest code."""
        return 1.0 if self.restricted else 0.0, 2.0**self.bits - 1

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the nearest codes as float32 integers."""
        params, offset = Params.of(params), self._offset(params)
        code = ((w if offset is None else w - offset) / params.scale.float()).add_(_ROUND).sub_(_ROUND)
        return code.add_(params.zero).clamp_(*self.bounds())

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return `scale * (code - zero)` in float32."""
        params, offset = Params.of(params), self._offset(params)
        values = (codes - params.zero).float().mul_(params.scale.float())
        return values if offset is None else values.add_(offset)

    def _offset(self, params: Parameters) -> Tensor | None:
        """Return what rounding a minimum adds to all values of its group; None where none is stored."""
        if not self.minima or self.sym:  # a zero in the middle is a power of two: nothing is rounded
            return None
        exact = Params.of(params).zero.float() * params.scale.float()
        return exact - exact.to(self.scale_dtype).float()

    def lattice(self, params: Parameters) -> Lattice:
        """See `Grid.lattice`."""
        params, offset = Params.of(params), self._offset(params)
        scale = params.scale.float()
        offset = torch.zeros_like(scale) if offset is None else offset
        return Lattice(scale, params.zero.float(), offset, *self.bounds())

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Parameters, H_KK: Tensor, group_K: Tensor
    ) -> Parameters:
        """Return params whose scales are the least-squares ones for these codes; see `_int_refine`.

        One scale for the whole tensor stays as it is.
        """
        if isinstance(self.granularity, PerTensor):
            return params
        from llmq.grids._int_refine import refine

        return refine(gradient_NK, codes, Params.of(params), H_KK, group_K)


def quantize_activation(
    x: Tensor, grid: AffineGrid, static: Parameters | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round activations `x` `[..., K]` to integers, held in the dtype of `x`; return them, their scale and their zero.

    Integers lie from -2^(b-1) to 2^(b-1) - 1 and stand for `scale * (integer - zero)`, no zero being 0.
    per token: a scale each `[..., 1]`, max|x| / ((2^b - 1) / 2), computed in the dtype of `x`; asymmetric, (max -
        min) / (2^b - 1) with min <= 0 <= max, and a zero per token (max - min has to be below float16's limit there).
    per tensor: `static` holds the one scale of the tensor and its zero, an unsigned code.
    The order of operations is that of compressed-tensors 0.20 (`calculate_qparams`, `_quantize`), and so are the bits
    of the result. Raises ValueError for a grid per tensor without parameters.
    """
    half, zero = 2 ** (grid.bits - 1), None
    per_token = isinstance(grid.granularity, PerRow)
    if per_token and grid.sym:
        scale = x.abs().amax(-1, keepdim=True) / ((2 * half - 1) / 2)
    elif per_token:
        low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low) / (2 * half - 1)
        zero = (-half - low / scale).nan_to_num_(-half).clamp_(-half, half - 1).round_()
    elif static is None:
        raise ValueError("a static activation grid needs the scale that calibration chose")
    else:
        scale, zero = static.scale.to(x.dtype), (Params.of(static).zero - half).to(x.dtype)
    if per_token:
        scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
    integers = x / scale if zero is None else (x / scale).add_(zero)
    return integers.clamp_(-half, half - 1).round_(), scale, zero
