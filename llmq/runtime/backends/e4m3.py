"""E4M3 weights (FP8, MXFP8) on a GPU: decoded by torch at every forward, to the activation's dtype.

Codes and scales stay as the file has them. An activation that is quantized too is
rounded as the reference rounds it, first. Not here: products of FP8 by FP8 (scaled_mm.py), CPUs (floatloop.py).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.gpu import DEVICES
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats, table
from llmq.types import FloatParams, LinearSpec, QTensor

_PANEL = 2**24  # weights decoded at once in float32: 64 MB beside the decoded weight


class E4M3(FloatPrepacked):
    """A weight of E4M3 codes, uint8 `[N, K]`. scale: `[N, G]`, or stored: its bits, uint8 `[N, G]`."""

    name = "e4m3"
    rank = 9
    devices: ClassVar[frozenset[str]] = DEVICES
    codes: Tensor
    scale: Tensor | None
    stored: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type not in cls.devices:
            return f"it runs on a GPU, not on {device.type}"
        return refuses_floats(spec) or ("it takes weights of 8 bits" if spec.scheme.weight.bits != 8 else None)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        params = FloatParams.of(q.params)
        kept = params.scale if params.stored is None else None
        self.keep(codes=q.codes.contiguous(), scale=kept, stored=params.stored)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        return F.linear(self.rounded(x), self.decoded(x.dtype))

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[N, K]`, rounded once."""
        W_NK = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        scale = self._scale()
        G, step = scale.shape[1], max(1, _PANEL // self.K)
        for n in range(0, self.N, step):
            values = self.codes[n : n + step].view(torch.float8_e4m3fn).float().unflatten(1, (G, -1))
            W_NK[n : n + step] = values.mul_(scale[n : n + step, :, None]).flatten(1)
        return W_NK

    def _scale(self) -> Tensor:
        if self.scale is not None:
            return self.scale.float()
        if self.stored is None:
            raise ValueError("a weight has scales, or their bits")
        return table(FloatParams(self.stored, self.stored, self.divisor))[self.stored.int()]

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        return self.quantized(self.codes, self.scale, self.stored)
