"""W8A8 on a GPU through our Triton kernels (llmq_kernels.int8): int8 x int8 -> int32 on tensor cores.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k]) * s_x[m] * s_w[n]

A first kernel rounds the activation, per token or with the static scale, to the very integers of the reference; the
sums are exact and are scaled in float32. float16, bfloat16 and float32 activations enter as they are.
`w` int8 `[N, K]`, the codes less 128, padded to multiples of 128; `scale` float32 `[N]`, padded.
Not here: weights alone (triton_weight_only.py), what a GPU must have (llmq/gpu.py).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.gpu import refuses_device
from llmq.runtime.backends._quantized_inputs import QuantizedInputs
from llmq.runtime.backends._w8a8 import PrepackedW8A8, centred_int8, refuses_scheme
from llmq.types import LinearSpec, LlmqError, QTensor


class TritonW8A8(QuantizedInputs, PrepackedW8A8):
    """An int8 weight for `llmq_kernels.int8`."""

    name = "triton_w8a8"
    rank = 1
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
        from llmq_kernels import KernelError, grouped_int8, int8

        try:
            w = int8.pack(centred_int8(q), q.params.scale)
        except KernelError as e:
            raise LlmqError(f"{spec.name}: {e}") from e
        self.linear, self._multiply, self._join = spec.name, int8.linear, int8.join
        self.stack = grouped_int8.stack
        self.hold(w)

    def hold(self, w: Any) -> None:
        """See `TritonPrepacked.hold`."""
        self.keep(w=w.q, scale=w.scale)
        self._packed = w

    @property
    def packed(self) -> Any:
        """See `TritonPrepacked.packed`."""
        if self._packed.q is not self._buffers["w"]:
            self._packed = replace(self._packed, q=self.w, scale=self.scale)
        return self._packed

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.w[: self.N, : self.K].contiguous(), self.scale[: self.N, None])
