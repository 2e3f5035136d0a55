"""W8A8 on CPUs with int8 dot products: int8 x int8 -> int32 by `torch._int_mm`, rescaled in float32.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k] - z_x[m] * sum_k w_int[n, k]) * s_x[m] * s_w[n]

The sum is exact: K * 2^14 stays below 2^31 up to K = 131071. Without VNNI, oneDNN computes this product one scalar at a
time, 20 to 70 times slower than float32 (docs/runtime.md): there fbgemm.py is asked instead.
`w` int8 `[N, K]`, the codes less 128.
Not here: how activations are rounded (reference.py).
"""

import torch
from torch import Tensor

from llmq.grids.int import quantize_activation
from llmq.runtime.backends import has_vnni
from llmq.runtime.backends._w8a8 import PrepackedW8A8, centred_int8, refuses_scheme
from llmq.types import LinearSpec, QTensor


class IntMM(PrepackedW8A8):
    """An int8 weight for `torch._int_mm`."""

    name = "int_mm"
    rank = 5
    w: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return refuses_scheme(spec) or (None if has_vnni() else "this CPU has no VNNI, without which it is slow")

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        self.keep(w=centred_int8(q), scale=q.params.scale)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        x_int, s_x, zero = quantize_activation(x.reshape(-1, self.K), self.activation, self.input)
        y = self.rescaled(torch._int_mm(x_int.to(torch.int8), self.w.T).float(), s_x, zero)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.N)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.w, self.scale)
