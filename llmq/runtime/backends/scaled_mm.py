"""FP8 weights and activations on a GPU that multiplies FP8: `torch._scaled_mm` between two kernels (llmq_kernels.fp8).

    y[m, n] = (sum_k x_fp8[m, k] * w_fp8[n, k]) * s_x[m] * s_w[n],    x_fp8 = E4M3(x / s_x)

The activation is rounded per token, or by the static scale, to the values of the reference; sums are float32, scaled
and rounded once. The experts of a layer are multiplied at once, by a kernel of ours. NVIDIA from compute capability 8.9
(Ada, Hopper, Blackwell), AMD's CDNA 4 (others have FP8 of another kind): elsewhere e4m3.py decodes one linear, and so
one expert, after the other.
`codes` uint8 `[N, K]`, the bytes of the file; `scale` as the file has it. Not here: scales of groups or blocks
(e4m3.py).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.gpu import refuses_device, refuses_fp8
from llmq.granularity import PerRow, PerTensor
from llmq.grids.fp8 import Fp8
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats
from llmq.runtime.backends._quantized_inputs import QuantizedInputs
from llmq.types import LinearSpec, QTensor


class ScaledMM(QuantizedInputs, FloatPrepacked):
    """An FP8 weight for `llmq_kernels.fp8`."""

    name = "scaled_mm"
    rank = 8
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
        if device.type != "cuda":
            return refuses_floats(spec)
        return refuses_floats(spec) or refuses_fp8(device) or refuses_device(device, cls.devices)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        from llmq_kernels import fp8, grouped_int8

        if not isinstance(spec.scheme.activation, Fp8):
            raise ValueError(f"{spec.name} has no FP8 activations")
        if spec.scheme.activation.static and q.input is None:
            raise ValueError(f"{spec.name}: an fp8 grid per tensor needs the scale that calibration chose")
        self.linear, self._multiply, self._join = spec.name, fp8.linear, fp8.join
        self.stack = grouped_int8.stack
        self.keep(scale=q.params.scale)
        self.hold(fp8.pack(q.codes, q.params.scale))

    def hold(self, w: Any) -> None:
        """See `TritonPrepacked.hold`."""
        self.keep(codes=w.q, row_scale=w.scale, one=w.one)
        self._packed = w

    @property
    def packed(self) -> Any:
        """See `TritonPrepacked.packed`."""
        own = self._buffers
        if self._packed.q is not own["codes"]:
            self._packed = replace(self._packed, q=own["codes"], scale=own["row_scale"], one=own["one"])
        return self._packed

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.codes.contiguous(), self.scale, None)  # a part of padded experts is not
