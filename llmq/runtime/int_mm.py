"""W8A8 on CPUs with int8 dot products: int8 x int8 -> int32 by `torch._int_mm`, rescaled in float32.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k]) * s_x[m] * s_w[n]

The sum is exact: K * 2^14 stays below 2^31 up to K = 131071. Without VNNI, oneDNN computes this product one scalar at a
time, 20 to 70 times slower than float32 (docs/runtime.md): there fbgemm.py is asked instead.
`w` int8 `[N, K]`, the codes less 128.
Not here: how activations are rounded (reference.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, centred, has_vnni
from llmq.runtime.reference import quantize_activation
from llmq.types import ActivationGrid, LinearSpec, Params, QTensor


class IntMM(Prepacked):
    """An int8 weight for `torch._int_mm`."""

    name = "int_mm"
    w: Tensor
    scale: Tensor
    in_scale: Tensor | None
    in_zero: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return refuses_scheme(spec) or (None if has_vnni() else "this CPU has no VNNI, without which it is slow")

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`."""
        return centred(q)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        self.activation = activation_of(spec)
        static = (None, None) if q.input is None else (q.input.scale, q.input.zero)
        self.keep(w=(q.codes ^ 0x80).view(torch.int8), scale=q.params.scale, in_scale=static[0], in_zero=static[1])

    @property
    def input(self) -> Params | None:
        """The static grid of the activation."""
        if self.in_scale is None or self.in_zero is None:
            return None
        return Params(self.in_scale, self.in_zero)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        x_int, s_x = quantize_activation(x.reshape(-1, self.K), self.activation, self.input)
        acc = torch._int_mm(x_int.to(torch.int8), self.w.T)
        y = acc.float().mul_(self.scale.float().T).mul_(s_x.float())
        return y.to(x.dtype).reshape(*x.shape[:-1], self.N)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        zero = torch.full(self.scale.shape, 128, dtype=torch.int32, device=self.scale.device)
        return QTensor(self.w.view(torch.uint8) ^ 0x80, Params(self.scale, zero), self.grid, None, self.input)


def activation_of(spec: LinearSpec) -> ActivationGrid:
    """Return the activation grid of a W8A8 linear."""
    if spec.scheme.activation is None:
        raise ValueError(f"{spec.name} has float activations")
    return spec.scheme.activation


def refuses_scheme(spec: LinearSpec) -> str | None:
    """Return why an int8 x int8 product cannot run a linear: its scheme, or a sum that int32 might not hold."""
    grid, activation = spec.scheme.weight, spec.scheme.activation
    if activation is None or grid.bits != 8 or not grid.sym or grid.group_size is not None:
        return "it takes symmetric 8-bit weights with a scale per channel or tensor, and 8-bit activations"
    return "the sum over K might not fit int32" if spec.K > 131071 else None
