"""NVFP4: E2M1 floats of 4 bits, an E4M3 scale for 16 columns, one float32 divisor for a weight (4.5 bits): Blackwell.

    w = value(code) * stored / divisor,    divisor = 448 * 6 / max|W| by min-max,  stored = E4M3(divisor * max|w| / 6)

Runtimes fuse the linears that read one activation (q, k, v; gate, up) and have room for one divisor: they are given
one (`spanning`). Of an activation, calibration fixes the divisor and the scales are found at run time.
Facts: docs/floats.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, log2

import torch
from torch import Tensor

from llmq.granularity import Granularity, PerGroup
from llmq.grids._float import FloatGrid
from llmq.grids._ggml import held
from llmq.grids._ggml_floats import FloatBlocks
from llmq.minifloat import E2M1, E4M3, scales_of
from llmq.types import Arguments, FloatParams, Grid, Held, Parameters, Range

_OF_ZEROS = 0.125  # the stored scale of a group of zeros, as compressed-tensors has it


@dataclass(frozen=True)
class Nvfp4(FloatGrid, FloatBlocks):
    """E2M1 floats with E4M3 scales.

    range: how `fit` chooses what is covered; None is min-max.
    divisor: that of the weights it spans; None is found for each weight.
    """

    range: Range | None = field(default=None, compare=False)
    divisor: float | None = field(default=None, metadata={"option": False})

    value = E2M1
    qblock = 64
    once = ("scale",)

    @property
    def granularity(self) -> Granularity:
        """16 columns."""
        return PerGroup(16)

    def spanning(self, weights: Sequence[Tensor], grids: Sequence[Grid] = ()) -> Nvfp4:
        """See `Grid.spanning`; where any range searches beyond what there is, there is room above the largest scale.

        The divisor is then a power of two, so that every reader's arithmetic gives the same values.
        """
        largest = max(float(W.abs().max()) for W in weights)
        searched = any(g.searches for g in (self, *grids) if isinstance(g, FloatGrid))
        most = E4M3.most / self.beyond if searched else E4M3.most
        divisor = most * self.value.most / largest if largest else 1.0
        divisor = 2.0 ** floor(log2(divisor)) if searched else divisor
        return replace(self, divisor=divisor if divisor <= torch.finfo(torch.float32).max else 1.0)

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> Parameters:
        """See `RangedGrid.fit`."""
        if self.divisor is None:
            return self.spanning([W_NK]).fit(W_NK, H_KK)
        return super().fit(W_NK, H_KK)

    def nearest_scale(self, scale: Tensor) -> FloatParams:
        """See `FloatGrid.nearest_scale`."""
        return _stored(scale, torch.full((*scale.shape[:-1], 1), self.divisor or 1.0, device=scale.device))

    @property
    def static(self) -> bool:
        """See `RangedGrid.static`: the divisor is fixed."""
        return True

    def calibrated(self, magnitudes: Tensor, counts: Tensor) -> FloatParams:
        """See `RangedGrid.calibrated`: the divisor with which the largest value has the largest scale."""
        divisor = E4M3.most * self.value.most / magnitudes[-1:].float()
        divisor = divisor.masked_fill(divisor.isinf(), 1.0)
        return FloatParams(1 / divisor, None, divisor)

    def largest(self, params: Parameters) -> Tensor:
        """See `RangedGrid.largest`."""
        return E4M3.most * super().largest(params)

    def run_time_scale(self, largest: Tensor, fixed: Parameters | None) -> Tensor:
        """See `FloatGrid.run_time_scale`."""
        if not isinstance(fixed, FloatParams) or fixed.divisor is None:
            raise ValueError("activations in nvfp4 need the divisor that calibration chose")
        return _stored(largest / self.value.most, fixed.divisor).scale

    def of_bits(self, bits: Tensor, divisor: Tensor) -> FloatParams:
        """Return the parameters of scales as they are stored, uint8 `[..., G]`. divisor: float32 `[1]`."""
        return FloatParams(scales_of(bits, divisor), bits, divisor.expand(*bits.shape[:-1], 1).contiguous())

    def stored_once(self, params: Parameters) -> dict[str, Tensor]:
        """Return the reciprocal of the divisor."""
        return {"scale": 1 / held(FloatParams.of(params).divisor)[0]}

    def read(self, scales: Tensor, once: Mapping[str, Tensor]) -> FloatParams:
        """See `FloatBlocks.read`; without a scale the divisor is 1. ggml reads no sign, and NaN as 0."""
        bits = (scales & 127).masked_fill(scales & 127 == 127, 0)
        return self.of_bits(bits, 1 / once["scale"] if once else torch.ones(1))

    @property
    def held(self) -> Held:
        """The scales of E4M3, over the divisor."""
        divisor = self.divisor or 1.0
        return Held(2.0**-9 / divisor, 2.0**-6 / divisor, E4M3.most * 1.01 / divisor)

    def args(self) -> Arguments:
        """See `Grid.args`."""
        args: Arguments = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
        return args | {"group_size": 16, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}


def _stored(scale: Tensor, divisor: Tensor) -> FloatParams:
    """Return the scales nearest to positive `scale` that E4M3 holds over a float32 divisor, broadcast to them."""
    bits = E4M3.encode(scale * divisor)
    bits = torch.where(bits == 0, E4M3.encode(torch.full_like(divisor, _OF_ZEROS)), bits)
    return FloatParams(scales_of(bits, divisor), bits, divisor)
