"""What the grids of small floats share: a minifloat for each value, and a scale for a group, in the file's bits.

    w = scale * value(code),    scale = stored / divisor

    fp8      E4M3 values, scales as they are, for a tensor, a row or a block
    nvfp4    E2M1 values, E4M3 scales for 16 columns, one float32 divisor for a weight
    mxfp4    E2M1 values, scales that are powers of two (E8M0) for 32 columns;  mxfp8: the same with E4M3 values

A range chooses the largest value that is covered, as it does for integers; scales are rounded to what is stored before
any code is chosen. Min-max makes the scales of compressed-tensors 0.20 (`calculate_qparams`).
Not here: the bits of a value (minifloat.py), packing (formats/).
"""

from __future__ import annotations

from abc import abstractmethod
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from llmq.granularity import PerGroup, PerRow
from llmq.minifloat import Minifloat
from llmq.types import FloatParams, Lattice, Parameters, RangedGrid


class FloatGrid(RangedGrid):
    """Small floats times a scale.

    value: their kind. beyond: by what a search multiplies the largest value at most.
    """

    value: ClassVar[Minifloat]
    beyond: ClassVar[float] = 1.75

    @property
    def bits(self) -> int:
        """See `Grid.bits`."""
        return self.value.bits

    @property
    def sym(self) -> bool:
        """Every minifloat is there with both signs."""
        return True

    @property
    def reach(self) -> float:
        """See `RangedGrid.reach`."""
        return self.value.most

    @property
    def searches(self) -> bool:
        """Whether the range may cover more than there is."""
        return getattr(self.range, "searches", False)

    def factors(self, least: float, steps: int) -> list[float]:
        """See `RangedGrid.factors`; a search goes beyond the largest value too, which need not be the largest float."""
        return [1.0, *torch.logspace(log2(least), log2(self.beyond), steps - 1, 2).tolist()]

    @abstractmethod
    def nearest_scale(self, scale: Tensor) -> FloatParams:
        """Return the parameters whose scales are nearest to float32 `scale`, above 0, of those that a file holds."""

    def params(self, lo: Tensor, hi: Tensor) -> FloatParams:
        """See `RangedGrid.params`."""
        return self.nearest_scale(torch.maximum(hi.abs(), lo.abs()).float() / self.value.most)

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the nearest codes, the bits of minifloats, as float32 integers."""
        return self.value.encode(w / params.scale.float()).float()

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return `scale * value(code)` in float32."""
        return self.value.decode(codes).mul_(params.scale.float())

    @abstractmethod
    def run_time_scale(self, largest: Tensor, fixed: Parameters | None) -> Tensor:
        """Return the scales of groups of an activation whose largest magnitudes are `largest`.

        In the dtype of `largest`, or in float32, as compressed-tensors 0.20 has them. fixed: what calibration fixed.
        """

    def quantize_activation(self, x: Tensor, fixed: Parameters | None = None) -> tuple[Tensor, Tensor]:
        """Round an activation `[..., K]`; return the bits of its values `[..., G, g]` and their scales `[..., G, 1]`.

        The order of operations is that of compressed-tensors 0.20 (`calculate_qparams`, `_quantize_dequantize`), and so
        are the bits of the result, but for groups of float16 below its least normal value.
        """
        groups = x.unflatten(-1, (self.granularity.groups(x.shape[-1]), -1))
        scale = self.run_time_scale(groups.abs().amax(-1, keepdim=True), fixed)
        return self.value.encode(groups / scale), scale

    def fake_quantize(self, x: Tensor, fixed: Parameters | None = None) -> Tensor:
        """See `RangedGrid.fake_quantize`."""
        bits, scale = self.quantize_activation(x, fixed)
        return (self.value.decode(bits).to(scale.dtype) * scale).to(x.dtype).flatten(-2)

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Parameters, H_KK: Tensor, group_K: Tensor
    ) -> Parameters:
        """Return params with the best stored scales for these codes; see `_float_refine`. Shared by rows, they stay."""
        if not isinstance(self.granularity, PerRow | PerGroup):
            return params
        from llmq.grids._float_refine import refine

        return refine(gradient_NK, self.value.decode(codes), params, H_KK, group_K)

    def lattice(self, params: Parameters) -> Lattice:
        """See `Grid.lattice`."""
        scale = params.scale.float()
        zero = torch.zeros_like(scale)
        return Lattice(scale, zero, zero, 0.0, 2.0**self.bits - 1, self.value.levels)

    def covering(self, W_NK: Tensor) -> Tensor:
        """See `Grid.covering`; `[rows, G]`."""
        return self.granularity.gathered(W_NK).abs().amax(-1).float() / self.value.most
