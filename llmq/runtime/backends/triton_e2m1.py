"""NVFP4 and MXFP4 weights on a GPU through our Triton kernels (llmq_kernels.e2m1).

    few tokens:    decoded in registers; float32 sums, scaled group by group, rounded once
    many tokens:   W decoded in panels by a kernel, to the activation's dtype as the reference does, and torch's
                   product of each

float32 activations of few tokens are multiplied in float16, as in triton_weight_only.py; those of many as they are.
An activation that is quantized too is rounded as the reference rounds it, first: its products are those of the values.
Kept: `words` and `params`, of the size they have in the file. A scale of 2^-127 counts as 0 in the product.
Not here: E4M3 weights (scaled_mm.py, e4m3.py), what a GPU must have (llmq/gpu.py).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.gpu import DEVICES, refuses_device
from llmq.granularity import PerGroup
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats
from llmq.runtime.backends._triton import run
from llmq.types import FloatParams, LinearSpec, QTensor


class TritonE2M1(FloatPrepacked):
    """A weight of E2M1 for `llmq_kernels.e2m1`."""

    name = "triton_e2m1"
    rank = 8
    devices: ClassVar[frozenset[str]] = DEVICES
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
        from llmq_kernels import e2m1

        params = FloatParams.of(q.params)
        if params.stored is None:
            raise ValueError(f"{spec.name} stores no bits of scales")
        factor = 1.0 if params.divisor is None else 1 / float(params.divisor[0])
        w = e2m1.pack(q.codes, params.stored, e8m0=params.divisor is None, factor=factor)
        self.linear, self.multiply = spec.name, e2m1.linear
        self.shape, self.factor = w.shape, factor
        self.keep(words=w.words, params=w.params)
        self._packed = w

    @property
    def packed(self) -> Any:
        """The weight as the kernel takes it, of the buffers that are here now."""
        if self._packed.words is not self._buffers["words"]:
            from llmq_kernels import e2m1

            self._packed = e2m1.E2M1Weight(self.words, self.params, *self.shape, self.factor)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`. Raises LlmqError for activations other than float16, bfloat16 and float32."""
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Prepacked.affine`; the kernel adds the bias before it rounds."""
        return run(self.linear, self.multiply, self.rounded(x), self.packed, bias)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        from llmq_kernels import e2m1

        codes, stored = e2m1.unpack(self.packed)
        return self.quantized(codes, None, stored)
