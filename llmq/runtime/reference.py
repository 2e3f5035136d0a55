"""The reference back-end: decode the weight, multiply, and nothing else. Every other back-end is tested against it.

    y = Q(x) @ W^T,    W = scale * (code - zero) decoded in float32 and rounded once to the dtype of x

Q is the identity, or what rounds the activation to its grid (`RangedGrid.fake_quantize`). It takes every grid, format,
shape, dtype and device; a forward holds one weight's values, and nothing decoded survives it.
Not here: the layer that holds the packed tensors (linear.py), the faster back-ends (one file each).
"""

from dataclasses import replace
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.types import QTensor, RangedGrid

_PANEL = 256  # rows decoded at once: what that needs on the way stays in the cache, 4 times faster than whole weights


def linear(x: Tensor, q: QTensor, activation: RangedGrid | None, bias: Tensor | None = None) -> Tensor:
    """Return `Q(x) @ W^T + bias` `[..., N]` for `x` `[..., K]`, in the dtype of `x`."""
    if activation is not None:
        x = activation.fake_quantize(x, q.input)
    return F.linear(x, decode(q, x.dtype), bias)


def decode(q: QTensor, dtype: torch.dtype) -> Tensor:
    """Return `q.dequantize()` in `dtype`, decoding a panel of rows at a time."""
    W_NK = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for i in range(0, q.codes.shape[0], _PANEL):
        rows = slice(i, i + _PANEL)
        W_NK[rows] = replace(q, codes=q.codes[rows], params=q.params.map(itemgetter(rows))).dequantize()
    return W_NK
