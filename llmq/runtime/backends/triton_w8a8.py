"""W8A8 on a GPU through our Triton kernels (llmq_kernels.int8): int8 x int8 -> int32 on tensor cores.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k]) * s_x[m] * s_w[n]

A first kernel rounds the activation, per token or with the static scale, to the very integers of the reference; the
sums are exact and are scaled in float32. float16, bfloat16 and float32 activations enter as they are.
`w` int8 `[N, K]`, the codes less 128, padded to multiples of 128; `scale` float32 `[N]`, padded.
Not here: weights alone (triton_weight_only.py), what a GPU must have (llmq/gpu.py).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.gpu import DEVICES, refuses_device
from llmq.runtime.backends._triton import run
from llmq.runtime.backends._w8a8 import PrepackedW8A8, centred_int8, refuses_scheme
from llmq.types import LinearSpec, LlmqError, QTensor


class TritonW8A8(PrepackedW8A8):
    """An int8 weight for `llmq_kernels.int8`."""

    name = "triton_w8a8"
    rank = 1
    devices: ClassVar[frozenset[str]] = DEVICES
    w: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type not in cls.devices:
            return refuses_device(device, cls.devices)
        if spec.scheme.activation and not spec.scheme.activation.sym:
            return "its kernel takes symmetric activations"
        return refuses_scheme(spec) or refuses_device(device, cls.devices)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        from llmq_kernels import KernelError, int8

        try:
            w = int8.pack(centred_int8(q), q.params.scale)
        except KernelError as e:
            raise LlmqError(f"{spec.name}: {e}") from e
        self.linear, self.multiply = spec.name, int8.linear
        self.keep(w=w.q, scale=w.scale)
        self._packed = w

    @property
    def packed(self) -> Any:
        """The weight as the kernel takes it, of the buffers that are here now."""
        if self._packed.q is not self._buffers["w"]:
            from llmq_kernels import int8

            self._packed = int8.PackedInt8(self.w, self.scale, self.N, self.K)
        return self._packed

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`. Raises LlmqError for activations other than float16, bfloat16 and float32."""
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Prepacked.affine`; the kernel adds the bias before it rounds."""
        return run(self.linear, self.multiply, x, self.packed, self.in_scale, bias)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.w[: self.N, : self.K].contiguous(), self.scale[: self.N, None])
