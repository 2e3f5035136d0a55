"""The grids whose scales are powers of two for 32 columns (E8M0): OCP Microscaling Formats 1.0.

Min-max: the scale is that of the largest value's own power of two, so that the largest lies in the top binade; one
whose mantissa is 1.75 or more is rounded up to the next. A search tries the powers beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2

import torch
from torch import Tensor

from llmq.granularity import Granularity, PerGroup
from llmq.grids._float import FloatGrid
from llmq.minifloat import exponent, scales_of
from llmq.types import Arguments, FloatParams, Held, Parameters, Range


@dataclass(frozen=True)
class Microscaling(FloatGrid):
    """Minifloats with E8M0 scales. range: how `fit` chooses what is covered; None is min-max."""

    range: Range | None = field(default=None, compare=False)

    @property
    def granularity(self) -> Granularity:
        """32 columns."""
        return PerGroup(32)

    def factors(self, least: float, steps: int) -> list[float]:
        """Return 1 and its neighbours: no other scale is stored between."""
        return [1.0, 0.5, 2.0]

    def params(self, lo: Tensor, hi: Tensor) -> FloatParams:
        """See `RangedGrid.params`."""
        largest = torch.maximum(hi.abs(), lo.abs()).float()
        carried = (largest.contiguous().view(torch.int32) + 0x200000) & 0x7F800000  # to the power of two below
        return self.nearest_scale(carried.view(torch.float32) / 2.0 ** int(log2(self.value.most)))

    def nearest_scale(self, scale: Tensor) -> FloatParams:
        """See `FloatGrid.nearest_scale`."""
        return self.of_bits(exponent(scale))

    def of_bits(self, bits: Tensor) -> FloatParams:
        """Return the parameters of scales as they are stored, uint8 `[..., G]`."""
        return FloatParams(scales_of(bits, None), bits)

    def run_time_scale(self, largest: Tensor, fixed: Parameters | None) -> Tensor:
        """See `FloatGrid.run_time_scale`."""
        return self.params(largest, largest).scale

    @property
    def held(self) -> Held:
        """Powers of two."""
        return Held(2.0**-127, 2.0**-127, 2.0**128)

    def args(self) -> Arguments:
        """See `Grid.args`."""
        args: Arguments = {"num_bits": self.bits, "type": "float", "symmetric": True, "strategy": "group"}
        return args | {"group_size": 32, "dynamic": False, "scale_dtype": "torch.uint8"}
