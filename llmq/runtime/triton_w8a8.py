"""W8A8 on a GPU through our Triton kernels (llmq_kernels.int8): int8 x int8 -> int32 on tensor cores.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k]) * s_x[m] * s_w[n]

A first kernel rounds the activation, per token or with the static scale, to the very integers of the reference; the
sums are exact and are scaled in float32. float16, bfloat16 and float32 activations enter as they are.
`w` int8 `[N, K]`, the codes less 128, padded to multiples of 128; `scale` float32 `[N]`, padded.
Not here: weights alone (triton_weight_only.py), what a GPU must have (gpu.py).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, centred
from llmq.runtime.gpu import DEVICES, refuses_device, run
from llmq.runtime.int_mm import refuses_scheme
from llmq.types import LinearSpec, LlmqError, Params, QTensor


class TritonW8A8(Prepacked):
    """An int8 weight for `llmq_kernels.int8`."""

    name = "triton_w8a8"
    devices: ClassVar[frozenset[str]] = DEVICES
    w: Tensor
    scale: Tensor
    in_scale: Tensor | None
    in_zero: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type not in cls.devices:
            return refuses_device(device, cls.devices)
        return refuses_scheme(spec) or refuses_device(device, cls.devices)

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`."""
        return centred(q)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        from llmq_kernels import KernelError, int8

        try:
            w = int8.pack((q.codes ^ 0x80).view(torch.int8), q.params.scale)
        except KernelError as e:
            raise LlmqError(f"{spec.name}: {e}") from e
        self.linear = spec.name
        self.scale_dtype = q.params.scale.dtype
        static = (None, None) if q.input is None else (q.input.scale, q.input.zero)
        self.keep(w=w.q, scale=w.scale, in_scale=static[0], in_zero=static[1])

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`. Raises LlmqError for activations other than float16, bfloat16 and float32."""
        op = torch.ops.llmq.int8_linear
        return run(self.linear, op, x, self.w, self.scale, self.in_scale, None, self.N, self.K)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        codes = self.w[: self.N, : self.K].contiguous().view(torch.uint8) ^ 0x80
        scale = self.scale[: self.N, None].to(self.scale_dtype)
        zero = torch.full(scale.shape, 128, dtype=torch.int32, device=scale.device)
        static = None if self.in_scale is None or self.in_zero is None else Params(self.in_scale, self.in_zero)
        return QTensor(codes, Params(scale, zero), self.grid, None, static)
