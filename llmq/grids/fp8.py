"""FP8: E4M3 floats of 8 bits, one scale for a tensor, a row ("channel") or a block: what vendors release.

    w = scale * value(code),    scale = max|w| / 448 by min-max

Of an activation, "channel" is a scale per token and a number of columns one for so many of a token, both found at run
time; "tensor" is one that calibration fixes. Facts: docs/floats.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from llmq.granularity import Granularity, PerBlock, PerTensor, granularity
from llmq.grids._float import FloatGrid
from llmq.minifloat import E4M3
from llmq.types import Arguments, FloatParams, Grid, Held, Parameters, Range

_LEAST = 2.0**-126  # of float32, and of bfloat16


@dataclass(frozen=True)
class Fp8(FloatGrid):
    """E4M3 floats.

    group: values that share a scale: "channel", "tensor", "128x128" or a number of columns.
    range: how `fit` chooses what is covered; None is min-max.
    scale_dtype: the dtype scales are stored in.
    spans: the largest value of the weights that share a scale per tensor; None is each its own.
    """

    group: int | str = "channel"
    range: Range | None = field(default=None, compare=False)
    scale_dtype: torch.dtype = field(default=torch.float32, compare=False, metadata={"option": False})

    spans: float | None = field(default=None, compare=False, metadata={"option": False})

    value = E4M3

    def __post_init__(self) -> None:
        if self.wants_hessian and isinstance(self.granularity, PerTensor | PerBlock):
            raise ValueError("the range 'output' needs scales per group or per channel")

    @cached_property
    def granularity(self) -> Granularity:
        """See `Grid.granularity`."""
        return granularity(self.group)

    def spanning(self, weights: Sequence[Tensor], grids: Sequence[Grid] = ()) -> Fp8:
        """See `Grid.spanning`; one scale for a tensor is that of the largest value of all, whatever the range.

        Runtimes that fuse them would round the codes of the others again, to the largest scale.
        """
        if not isinstance(self.granularity, PerTensor):
            return self
        return replace(self, spans=max(float(W.abs().max()) for W in weights))

    def fit_values(self, w: Tensor, weight: Tensor | None) -> Parameters:
        """See `RangedGrid.fit_values`."""
        if self.spans is None:
            return super().fit_values(w, weight)
        largest = torch.full(w.shape[:-1], self.spans, device=w.device)
        return self.params(-largest, largest)

    def stored_in(self, dtype: torch.dtype) -> Fp8:
        """See `Grid.stored_in`."""
        return replace(self, scale_dtype=dtype)

    @property
    def held(self) -> Held:
        """The scales of `scale_dtype`."""
        info = torch.finfo(self.scale_dtype)
        return Held(_LEAST if self.scale_dtype != torch.float16 else 2.0**-24, info.tiny, info.max)

    def nearest_scale(self, scale: Tensor) -> FloatParams:
        """Return scales rounded to `scale_dtype`; that of zeros alone is its epsilon, as compressed-tensors has it."""
        least, _, most = self.held
        kept = scale.clamp(least, most).masked_fill(scale == 0, torch.finfo(self.scale_dtype).eps)
        return FloatParams(kept.to(self.scale_dtype))

    def run_time_scale(self, largest: Tensor, fixed: Parameters | None) -> Tensor:
        """See `FloatGrid.run_time_scale`."""
        if self.static and fixed is None:
            raise ValueError("an fp8 grid per tensor needs the scale that calibration chose")
        if fixed is not None:
            return fixed.scale.to(largest.dtype)
        scale = largest / self.value.most
        return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)

    def args(self) -> Arguments:
        """See `Grid.args`."""
        by = self.granularity
        args: Arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": by.strategy}
        args |= {"group_size": by.group_size, "dynamic": False}
        return args | ({"block_structure": [by.tall, by.width]} if isinstance(by, PerBlock) else {})
