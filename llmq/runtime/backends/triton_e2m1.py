"""NVFP4 and MXFP4 weights on a GPU through our Triton kernels (llmq_kernels.e2m1).

    few tokens:    decoded in registers; float32 sums, scaled group by group, rounded once
    many tokens:   W decoded in panels by a kernel, to the activation's dtype as the reference does, and torch's
                   product of each

float32 activations of few tokens are multiplied in float16, as in triton_weight_only.py; those of many as they are.
An activation that is quantized too is rounded as the reference rounds it, first: its products are those of the values.
Kept: `words` and `params`, of the size they have in the file. A scale of 2^-127 counts as 0 in the product.
Not here: E4M3 weights (scaled_mm.py, e4m3.py), what a GPU must have (llmq/gpu.py).
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.gpu import refuses_device
from llmq.granularity import PerGroup
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats
from llmq.runtime.backends._triton import TritonPrepacked
from llmq.types import FloatParams, LinearSpec, QTensor


class TritonE2M1(TritonPrepacked, FloatPrepacked):
    """A weight of E2M1 for `llmq_kernels.e2m1`."""

    name = "triton_e2m1"
    rank = 8
    words: Tensor
    params: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type not in cls.devices:
            return refuses_device(device, cls.devices)
        if reason := refuses_floats(spec):
            return reason
        grid = spec.scheme.weight
        if grid.bits != 4 or grid.granularity not in (PerGroup(16), PerGroup(32)):
            return f"it takes E2M1 in groups of 16 or 32 columns, not {grid.bits} bits {grid.granularity}"
        return refuses_device(device, cls.devices)

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`: scales that are stored as bits, positive."""
        from llmq_kernels import KernelError, e2m1

        params = FloatParams.of(q.params)
        if params.stored is None or not super().holds(q):
            return False
        try:
            e2m1.check(q.codes, params.stored, e8m0=params.divisor is None)
        except KernelError:
            return False
        return True

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        from llmq_kernels import e2m1, grouped

        params = FloatParams.of(q.params)
        if params.stored is None:
            raise ValueError(f"{spec.name} stores no bits of scales")
        factor = 1.0 if params.divisor is None else 1 / float(params.divisor[0])
        w = e2m1.pack(q.codes, params.stored, e8m0=params.divisor is None, factor=factor)
        self.linear, self._multiply, self._join = spec.name, e2m1.linear, e2m1.join
        self.stack = grouped.stack
        self.hold(w)

    def hold(self, w: Any) -> None:
        """See `TritonPrepacked.hold`."""
        self.keep(words=w.words, params=w.params)
        self._packed = w

    @property
    def packed(self) -> Any:
        """See `TritonPrepacked.packed`."""
        if self._packed.words is not self._buffers["words"]:
            self._packed = replace(self._packed, words=self.words, params=self.params)
        return self._packed

    def multiply(self, x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
        """See `TritonPrepacked.multiply`."""
        return self._multiply(self.entering(x), w, bias)

    def entering(self, x: Tensor) -> Tensor:
        """See `TritonPrepacked.entering`."""
        return self.rounded(x)

    def kind(self) -> Hashable:
        """See `TritonPrepacked.kind`; of weights whose input is rounded by a grid of its own, each stays alone."""
        fixed = self.in_scale is not None or self.in_divisor is not None
        return None if fixed else (self.name, self.activation, self.packed.shape[1:], self.packed.factor)

    def kind_of_expert(self) -> Hashable:
        """See `TritonPrepacked.kind_of_expert`: each has a factor of its own."""
        kind = self.kind()
        return None if kind is None else kind[:-1]  # type: ignore[index]

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        from llmq_kernels import e2m1

        codes, stored = e2m1.unpack(self.packed)
        return self.quantized(codes, None, stored)
