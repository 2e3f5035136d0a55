"""FP8 weights and activations on a GPU that multiplies FP8: `torch._scaled_mm`, rescaled in float32.

    y[m, n] = (sum_k x_fp8[m, k] * w_fp8[n, k]) * s_x[m] * s_w[n],    x_fp8 = E4M3(x / s_x)

The activation is rounded per token, or by the static scale, to the values of the reference; sums are float32. NVIDIA
from compute capability 8.9 (Ada, Hopper, Blackwell), AMD's CDNA 4 (others have FP8 of another kind).
`codes` uint8 `[N, K]`, the bytes of the file. Not here: scales of groups or blocks (e4m3.py).
"""

from typing import ClassVar

import torch
from torch import Tensor

from llmq.gpu import DEVICES, refuses_fp8
from llmq.granularity import PerRow, PerTensor
from llmq.grids.fp8 import Fp8
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats
from llmq.types import LinearSpec, QTensor


class ScaledMM(FloatPrepacked):
    """An FP8 weight for `torch._scaled_mm`."""

    name = "scaled_mm"
    rank = 8
    devices: ClassVar[frozenset[str]] = DEVICES
    codes: Tensor
    scale: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type not in cls.devices:
            return f"it runs on a GPU, not on {device.type}"
        whole = all(
            isinstance(grid, Fp8) and isinstance(grid.granularity, PerRow | PerTensor)
            for grid in (spec.scheme.weight, spec.scheme.activation)
        )
        if not whole:
            return "it takes FP8 weights per channel or tensor, and FP8 activations per token or tensor"
        if spec.N % 16 or spec.K % 16:
            return f"16 does not divide N = {spec.N} and K = {spec.K}"
        return refuses_floats(spec) or (refuses_fp8(device) if device.type == "cuda" else None)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        if not isinstance(spec.scheme.activation, Fp8):
            raise ValueError(f"{spec.name} has no FP8 activations")
        self.activation: Fp8 = spec.scheme.activation
        self.keep(codes=q.codes.contiguous(), scale=q.params.scale)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        bits, scale = self.activation.quantize_activation(x.reshape(-1, self.K), self.input)
        x_fp8, scale = bits.flatten(1).view(torch.float8_e4m3fn), scale.reshape(-1, 1).float()
        one = torch.ones((), device=x.device)
        w = self.codes.view(torch.float8_e4m3fn).t()
        y_MN = torch._scaled_mm(x_fp8, w, one, one, out_dtype=torch.float32)
        y_MN = y_MN.mul_(scale).mul_(self.scale.float().T)
        return y_MN.to(x.dtype).reshape(*x.shape[:-1], self.N)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.codes, self.scale, None)
