"""Weights of 2 to 8 bits, float activations, on a GPU through our Triton kernel (llmq_kernels.weight_only).

    y = x @ W^T,    W = scale * (code - zero), decoded in registers; float32 sums, scaled group by group, rounded once

float16 and bfloat16 activations enter as they are. float32 ones are multiplied in float16 after a power of two a row
has brought them into its range: 11 bits of each activation are kept (about 70 dB), and nothing is rounded after that.
So a float32 checkpoint runs on a GPU as it is, with less rounding than bfloat16 has; who wants every bit loads it with
`backend="reference"`. From 33 rows on the tuner may find it faster to decode W in panels, rounded to the activation's
dtype as the reference does, and to let torch multiply them.

Codes of 5 to 7 bits, and their zeros, are lifted to the middle of 8 bits and take the kernel for those.

Symmetric and asymmetric grids, groups that 32 divides or per channel, any N and K (padded when packed), act-order.
Kept: `words` and `params` (layout.py there has the picture), `order` and `g_idx` for act-order, and `rest`, what zeros
displaced of float32 scales, which the product does without (2^-15 of a scale) and `restore` gives back.
Not here: 8-bit activations (triton_w8a8.py), what a GPU must have (llmq/gpu.py).
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.gpu import refuses_device
from llmq.runtime.backends import in_file_order
from llmq.runtime.backends._triton import TritonPrepacked
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor


class TritonWeightOnly(TritonPrepacked):
    """A weight for `llmq_kernels.weight_only`."""

    name = "triton_weight_only"
    rank = 0
    words: Tensor
    params: Tensor
    order: Tensor | None
    rest: Tensor | None
    g_idx: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        grid = spec.scheme.weight
        size = grid.granularity.columns(spec.K)
        if device.type not in cls.devices:
            return refuses_device(device, cls.devices)
        if spec.scheme.activation is not None or not isinstance(grid, AffineGrid):
            return "it takes integer weights and float activations"
        if size != spec.K and (size % 32 or spec.K % size):
            return f"32 does not divide the group size {size}" if size % 32 else f"{size} does not divide K = {spec.K}"
        return refuses_device(device, cls.devices)

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`: zeros out of range, or uneven groups of act-order, are no kernel's."""
        from llmq_kernels import KernelError, layout

        try:
            layout.check(*_lifted(q), g_idx=q.g_idx)
        except KernelError:
            return False
        return True

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        from llmq_kernels import KernelError, grouped, layout, weight_only

        try:
            w = layout.pack(*_lifted(q), g_idx=q.g_idx)
        except KernelError as e:
            raise LlmqError(f"{spec.name}: {e}") from e
        self.linear, self._multiply, self._join = spec.name, weight_only.linear, layout.join
        self.stack = grouped.stack
        self.scale_dtype = q.params.scale.dtype
        self.hold(w)
        self.keep(g_idx=q.g_idx)

    def hold(self, w: Any) -> None:
        """See `TritonPrepacked.hold`."""
        self.keep(words=w.words, params=w.params, order=w.order, rest=w.rest)
        self._packed = w

    @property
    def packed(self) -> Any:
        """See `TritonPrepacked.packed`."""
        if self._packed.words is not self._buffers["words"]:
            now = {"words": self.words, "params": self.params, "order": self.order, "rest": self.rest}
            self._packed = replace(self._packed, **now)
        return self._packed

    def multiply(self, x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
        """See `TritonPrepacked.multiply`."""
        return self._multiply(x, w, bias)

    def kind(self) -> Hashable:
        """See `TritonPrepacked.kind`; weights in an order of their own stay alone."""
        return None if self.order is not None else (self.name, self.packed.shape[1:], self.params.dtype)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        from llmq_kernels import layout

        codes, scale, zero = layout.unpack(self.packed)
        lift = _lift(self.grid.bits)
        params = Params(scale.to(self.scale_dtype), zero - lift)
        return QTensor(in_file_order(codes - lift, self.order), params, self.grid, self.g_idx)


def _lift(bits: int) -> int:
    """Return what is added to codes and zeros, so that the middle of `bits` bits becomes the middle of the kernel's."""
    return 2**7 - 2 ** (bits - 1) if bits in (5, 6, 7) else 0


def _lifted(q: QTensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return codes, scales, zeros and bits as the kernel takes them."""
    codes, scale, zero = q.codes, q.params.scale, Params.of(q.params).zero
    if lift := _lift(q.grid.bits):
        return codes + lift, scale, zero + lift, 8
    return codes, scale, zero, q.grid.bits
