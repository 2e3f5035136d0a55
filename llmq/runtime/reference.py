"""The reference back-end: decode the weight, multiply, and nothing else. Every other back-end is tested against it.

    y = Q(x) @ W^T,    W = scale * (code - zero) decoded in float32 and rounded once to the dtype of x

Q is the identity, or int8 rounding of the activation for W8A8 (`quantize_activation`). It takes every grid, format,
shape, dtype and device; a forward holds one weight's values, and nothing decoded survives it.
Not here: the layer that holds the packed tensors (linear.py), the faster back-ends (one file each).
"""

from dataclasses import replace
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.granularity import PerRow
from llmq.types import AffineGrid, Parameters, Params, QTensor, RangedGrid

_PANEL = 256  # rows decoded at once: what that needs on the way stays in the cache, 4 times faster than whole weights


def linear(x: Tensor, q: QTensor, activation: RangedGrid | None, bias: Tensor | None = None) -> Tensor:
    """Return `Q(x) @ W^T + bias` `[..., N]` for `x` `[..., K]`, in the dtype of `x`."""
    if activation is not None:
        x = fake_quantize(x, activation, q.input)
    return F.linear(x, decode(q, x.dtype), bias)


def decode(q: QTensor, dtype: torch.dtype) -> Tensor:
    """Return `q.dequantize()` in `dtype`, decoding a panel of rows at a time."""
    W_NK = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for i in range(0, q.codes.shape[0], _PANEL):
        rows = slice(i, i + _PANEL)
        W_NK[rows] = replace(q, codes=q.codes[rows], params=q.params.map(itemgetter(rows))).dequantize()
    return W_NK


def quantize_activation(
    x: Tensor, grid: AffineGrid, static: Parameters | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round activations `x` `[..., K]` to integers, held in the dtype of `x`; return them, their scale and their zero.

    Integers lie from -2^(b-1) to 2^(b-1) - 1 and stand for `scale * (integer - zero)`, no zero being 0.
    per token: a scale each `[..., 1]`, max|x| / ((2^b - 1) / 2), computed in the dtype of `x`; asymmetric, (max -
        min) / (2^b - 1) with min <= 0 <= max, and a zero per token (max - min has to be below float16's limit there).
    per tensor: `static` holds the one scale of the tensor and its zero, an unsigned code.
    The order of operations is that of compressed-tensors 0.20 (`calculate_qparams`, `_quantize`), and so are the bits
    of the result. Raises ValueError for a grid per tensor without parameters.
    """
    half, zero = 2 ** (grid.bits - 1), None
    per_token = isinstance(grid.granularity, PerRow)
    if per_token and grid.sym:
        scale = x.abs().amax(-1, keepdim=True) / ((2 * half - 1) / 2)
    elif per_token:
        low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
        scale = (high - low) / (2 * half - 1)
        zero = (-half - low / scale).nan_to_num_(-half).clamp_(-half, half - 1).round_()
    elif static is None:
        raise ValueError("a static activation grid needs the scale that calibration chose")
    else:
        scale, zero = static.scale.to(x.dtype), (Params.of(static).zero - half).to(x.dtype)
    if per_token:
        scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
    integers = x / scale if zero is None else (x / scale).add_(zero)
    return integers.clamp_(-half, half - 1).round_(), scale, zero


def fake_quantize(x: Tensor, grid: RangedGrid, static: Parameters | None = None) -> Tensor:
    """Return the values that `x` `[..., K]` is rounded to, in the dtype of `x`. static: what calibration fixed."""
    if not isinstance(grid, AffineGrid):
        rows = x.reshape(-1, x.shape[-1]).float()
        params = (grid.fit(rows) if static is None else static).columns(rows.shape[1])
        return grid.decode(grid.nearest(rows, params), params).to(x.dtype).view_as(x)
    integers, scale, zero = quantize_activation(x, grid, static)
    return (integers if zero is None else integers.sub_(zero)) * scale
