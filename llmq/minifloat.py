"""Small floats as bits: E2M1 (4 bits), E4M3 (8 bits), and E8M0, powers of two for scales.

    E2M1   sign, 2 bits of exponent, 1 of mantissa: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives
    E4M3   sign, 4 bits, 3 bits: up to 448, no infinity; torch.float8_e4m3fn
    E8M0   8 bits of exponent: 2^(byte - 127); 255 is NaN

Values are rounded to nearest, ties to the even code, and those beyond the largest to the largest; a zero keeps its
sign. So do compressed-tensors 0.20 and the hardware. Facts: OCP Microscaling Formats 1.0, sections 5.1 to 5.4.
Not here: which scale a group has (grids/_float.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llmq.params import FloatParams, Levels, Parameters, stored


@dataclass(frozen=True)
class Minifloat:
    """A kind of small floats. bits: of one. most: the largest value."""

    bits: int
    most: float

    def encode(self, t: Tensor) -> Tensor:
        """Return the bits of the values nearest to float32 `t`, uint8. NaN has none: its bits mean nothing."""
        return _e2m1(t) if self.bits == 4 else t.clamp(-self.most, self.most).to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, bits: Tensor) -> Tensor:
        """Return the float32 values of integer `bits`."""
        if self.bits == 4:
            return _E2M1.to(bits.device)[bits.int()]
        return bits.to(torch.uint8).view(torch.float8_e4m3fn).float()

    @cached_property
    def codes(self) -> Tensor:
        """The bits of all finite values, uint8, from the least to the largest; -0 comes before 0."""
        bits = torch.arange(2**self.bits, dtype=torch.uint8)
        values = self.decode(bits)
        order = torch.argsort(torch.where(values.signbit(), values - 1e-30, values), stable=True)
        return bits[order][values[order].isfinite()]

    @cached_property
    def levels(self) -> Levels:
        """All finite values as a table; of two zeros the first is that of what lies below 0."""
        value = self.decode(self.codes)
        return Levels.of(value, self.codes, self.encode((value[1:] + value[:-1]) / 2) == self.codes[1:])


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
E2M1 = Minifloat(4, 6.0)
E4M3 = Minifloat(8, 448.0)


def _e2m1(t: Tensor) -> Tensor:
    """Round to E2M1: from 1 on a float32 is cut after one bit of its mantissa, below 1 the values are even."""
    magnitude = t.abs().float()
    bits = magnitude.contiguous().view(torch.int32)
    above = (bits + 0x1FFFFF + ((bits >> 22) & 1) >> 22) - 252  # half to even; 1.0 has exponent 127, and the code 2
    code = torch.where(magnitude < 1, (magnitude * 2).round().int(), above.clamp(max=7))
    return (code + (t.signbit() * 8)).to(torch.uint8)


def exponent(scale: Tensor) -> Tensor:
    """Return the E8M0 bits of the power of two nearest to float32 scales, uint8; from 2^-127, that of 0, to 2^127."""
    mantissa, power = torch.frexp(scale.float())  # in [.5, 1) times 2^power
    nearest = power - (mantissa < 0.75).int() + 127
    return torch.where(scale == 0, 0, nearest).clamp(0, 254).to(torch.uint8)


def power(bits: Tensor) -> Tensor:
    """Return 2^(byte - 127) in float32."""
    return torch.exp2(bits.float() - 127)


def scales_of(bits: Tensor, divisor: Tensor | None) -> Tensor:
    """Return the float32 scales that stored bits stand for: E4M3 over a divisor, where there is one, else E8M0."""
    return power(bits) if divisor is None else E4M3.decode(bits) / divisor


def rescaled(params: Parameters, scale: Tensor) -> Parameters:
    """Return params with the scales nearest to float32 `scale` that their file holds.

    Those of `params` stay where none is near: at 0, below it and beyond. So does what is stored once for a weight.
    """
    if not isinstance(params, FloatParams) or params.stored is None:
        return replace(params, scale=stored(scale, params.scale))
    bits = exponent(scale) if params.divisor is None else E4M3.encode(scale * params.divisor)
    bits = torch.where((scale > 0) & ((bits > 0) | (params.divisor is None)), bits, params.stored)
    return replace(params, scale=scales_of(bits, params.divisor), stored=bits)
