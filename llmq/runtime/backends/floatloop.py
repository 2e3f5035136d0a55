"""Weights of small floats (FP8, NVFP4, MXFP4, MXFP8) on a CPU: loops of our own, compiled by numba.

    few rows of x:   E2M1: integer dot products of twice the values and of x rounded to 16 bits; E4M3: float32 products
    many rows:       panels of W decoded to float32, exactly as the reference does, and multiplied by torch

An activation that is quantized too is rounded as the reference rounds it, first: its products are those of the values.
torch's `_scaled_mm` of FP8 is slower than a float32 product on CPUs that have no instructions for it (docs/runtime.md).
Kept: `codes`, int16 `[N, S, 16]` of E2M1 (_float_loops.py has the picture) or uint8 `[N, K]`, both of the size they
have in the file; `stored` uint8 `[N, G]`, the bits of scales, with `scale` float32 `[1, 256]`, their table, or `scale`
`[N, G]` alone.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.granularity import PerGroup
from llmq.runtime.backends import _panels, one_op
from llmq.runtime.backends._floats import FloatPrepacked, refuses_floats, table
from llmq.types import FloatParams, LinearSpec, QTensor

FEW = {4: 64, 8: 8}
"""By bits of a code, the most rows that are multiplied without decoding; the times of both sides: docs/runtime.md."""
_SEGMENT = 64  # columns of E2M1


class FloatLoop(FloatPrepacked):
    """A weight of small floats for loops of our own."""

    name = "floatloop"
    rank = 7
    codes: Tensor
    scale: Tensor
    stored: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if reason := refuses_floats(spec):
            return reason
        by = spec.scheme.weight.granularity
        if spec.scheme.weight.bits == 4 and by not in (PerGroup(16), PerGroup(32)):
            return f"it takes E2M1 in groups of 16 or 32 columns, not {by}"
        return None if importlib.util.find_spec("numba") else "numba is not installed"

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        params = FloatParams.of(q.params)
        self.group = spec.scheme.weight.granularity.columns(self.K)
        self.bits = q.grid.bits
        if params.stored is None:
            stored, scale = torch.empty(self.N, 0, dtype=torch.uint8), params.scale.float().contiguous()
        else:
            stored, scale = params.stored.contiguous(), table(params)[None]
        codes = q.codes.contiguous()
        if self.bits == 4:
            codes, stored = _packed(codes, self.group), F.pad(stored, (0, -self.K % _SEGMENT // self.group))
        self.keep(codes=codes, scale=scale, stored=stored)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        return _linear(self.rounded(x), self.codes, self.scale, self.stored, self.group)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        if self.bits == 8:
            stored = self.stored if self.stored.shape[1] else None
            return self.quantized(self.codes, self.scale, stored)
        fields = [(self.codes >> 4 * q & 15).to(torch.uint8) for q in range(4)]
        codes = torch.stack(fields, dim=2).view(*self.codes.shape[:2], 4, -1, self.group // 4).transpose(2, 3)
        stored = self.stored[:, : self.K // self.group].contiguous()
        return self.quantized(codes.reshape(self.N, -1)[:, : self.K].contiguous(), None, stored)


def _packed(codes: Tensor, group: int) -> Tensor:
    """Return the words of E2M1 codes `[N, K]`, int16 `[N, S, 16]`."""
    fields = _in_order_of_words(F.pad(codes, (0, -codes.shape[1] % _SEGMENT)), group).unbind(2)
    words = torch.zeros(fields[0].shape, dtype=torch.int16)
    for q, field in enumerate(fields):
        words |= field.to(torch.int16) << 4 * q
    return words


def _in_order_of_words(t: Tensor, group: int) -> Tensor:
    """Return `[rows, K]` as the words of E2M1 have it, `[rows, S, 4, 16]`."""
    parts = t.unflatten(1, (-1, _SEGMENT // group, 4, group // 4))
    return parts.transpose(2, 3).reshape(len(t), t.shape[1] // _SEGMENT, 4, 16)


@one_op("(Tensor x, Tensor codes, Tensor scale, Tensor stored, int group) -> Tensor", lambda codes, *_: codes.shape[0])
def _linear(x: Tensor, codes: Tensor, scale: Tensor, stored: Tensor, group: int) -> Tensor:
    """Return `x @ W^T` in the dtype of `x`."""
    x_MK, N, bits = x.reshape(-1, x.shape[-1]).float(), codes.shape[0], 4 if codes.dtype == torch.int16 else 8
    if bits == 4:
        x_MK = _in_order_of_words(F.pad(x_MK, (0, -x.shape[-1] % _SEGMENT)), group).flatten(1)
    K = codes[0].numel() * (4 if bits == 4 else 1)
    if x_MK.shape[-1] != K:  # what follows hands addresses on
        raise ValueError(f"the weight has {K} columns, x {x.shape[-1]}")
    product = dot_product if x_MK.shape[0] <= FEW[bits] else decoded_product
    return product(x_MK, codes, scale, stored, group).to(x.dtype).reshape(*x.shape[:-1], N)


def dot_product(x_MK: Tensor, codes: Tensor, scale: Tensor, stored: Tensor, group: int) -> Tensor:
    """Return `x @ W^T` in float32; of E2M1 with `x` rounded to 16 bits."""
    M, N = x_MK.shape[0], codes.shape[0]
    y_MN = torch.empty(M, N, dtype=torch.float32)
    if M:
        _run((codes, scale, stored, x_MK.contiguous(), y_MN), x_MK.shape, group, decoding=False)
    return y_MN


def decoded_product(x_MK: Tensor, codes: Tensor, scale: Tensor, stored: Tensor, group: int) -> Tensor:
    """Return `x @ W^T` in float32, decoding some rows of W at a time."""

    def decode(rows: slice, W: Tensor) -> None:
        s = scale if stored.shape[1] else scale[rows]
        _run((codes[rows], s, stored[rows], W), x_MK.shape, group, decoding=True)

    return _panels.product(x_MK, codes.shape[0], decode)


def _run(tensors: tuple[Tensor, ...], shape: tuple[int, ...], group: int, decoding: bool) -> None:
    """Run a loop over all rows of the weight."""
    from llmq.runtime.backends import _float_loops, _team

    codes, scale, stored = tensors[:3]
    bits, (M, K) = 4 if codes.dtype == torch.int16 else 8, shape
    sizes = (decoding, bits, codes.shape[0], K, K // group, stored.shape[1], scale.shape[1], M)
    _team.run(_float_loops.one_thread, _float_loops.of_many, sizes, *tensors)
