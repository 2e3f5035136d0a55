"""Biased: evenly spaced values, `w = scale * code + bias`, the bias a float of its own: what MLX's affine mode stores.

An integer grid is one whose bias is `-zero * scale`; `as_integers` finds the zero again where a bias is that, rounded
to the dtype that it is stored in. MLX's own files have such biases where zero lies within a group's values.
Not here: the words (formats/mlx.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.granularity import Granularity, PerGroup
from llmq.grids.int import Int
from llmq.types import Arguments, GgmlParams, Grid, Parameters, Params


@dataclass(frozen=True)
class Biased(Grid):
    """Codes of `bits` over `group` columns. Its parameters are `GgmlParams`: scale and offset, as they are stored."""

    bits: int = 4
    group: int = 64

    @property
    def integers(self) -> Int:
        """The grid of the same codes whose zeros are codes."""
        return Int(self.bits, False, self.group)

    @property
    def granularity(self) -> Granularity:
        """See `Grid.granularity`."""
        return PerGroup(self.group)

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> GgmlParams:
        """See `Grid.fit`: the least and the largest value are met."""
        lo, hi = (x.float() for x in self.granularity.gathered(W_NK).aminmax(dim=-1))
        return GgmlParams((hi - lo).clamp(min=1e-8) / (2**self.bits - 1), lo)

    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """See `Grid.nearest`."""
        scale, bias = _both(params)
        return ((w - bias) / scale).round().clamp(0, 2**self.bits - 1)

    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """See `Grid.decode`."""
        scale, bias = _both(params)
        return codes.float() * scale + bias

    def args(self) -> Arguments:
        """See `Grid.args`, as integers whose zeros are no codes."""
        args: Arguments = {"num_bits": self.bits, "type": "int", "symmetric": False}
        return args | {"strategy": "group", "group_size": self.group, "dynamic": False}


def as_integers(params: GgmlParams, bits: int) -> Params | None:
    """Return scales and zeros that give these biases when they are rounded; None where some bias is no such product."""
    scale, bias = _both(params)
    zero = (-bias / scale).round()
    stored = params.offset
    if stored is None or not bool(((zero >= 0) & (zero < 2**bits)).all()):
        return None
    same = torch.equal((-zero * scale).to(stored.dtype), stored) or torch.equal(-zero * scale, bias)
    return Params(params.scale, zero.to(torch.int32)) if same else None


def _both(params: Parameters) -> tuple[Tensor, Tensor]:
    found = GgmlParams.of(params)
    bias = torch.zeros_like(found.scale) if found.offset is None else found.offset
    return found.scale.float(), bias.float()
