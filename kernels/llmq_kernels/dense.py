"""Many tokens: the library multiplies. W is decoded in panels of rows, each multiplied while the L2 cache holds it.

    for each panel:   W [rows, K] in x's dtype            a decode kernel; at most half the L2 cache
                      y[:, panel] = x @ W^T (+ bias)      cuBLAS or hipBLAS, straight into y

The panel is a block of torch's allocator, given back when the call returns, so that all layers of a process take turns
with one block, whatever their size. A buffer of our own would be the same memory, but not as safe: two streams would
write it at once, and a CUDA graph would read what others have left there; the allocator keeps streams and graphs apart.

Not here: the decode kernels (decode.py, e2m1.py), when this is the fastest (tune.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmq_kernels.launch import cdiv

ROWS = 64
"""What the rows of a panel are a multiple of, and how many a program of a decode kernel makes."""
UNKNOWN_L2 = 32 << 20
"""Bytes taken for the L2 cache of a device that does not say its own."""


def product(x: Tensor, N: int, decode: Callable[[Tensor, int], None], bias: Tensor | None = None) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` for `x` `[..., K]`, W rounded to its dtype.

    decode: fills `[rows, K]` with the rows of W from the given one on.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    M, K = x_MK.shape
    rows = panel_rows(N, K, x_MK.element_size(), l2_cache(x_MK.device))
    y = x_MK.new_empty(M, N)
    panel = x_MK.new_empty(min(rows, N), K)
    with torch.no_grad():
        for n in range(0, N, rows):
            W, out = panel[: N - n], y[:, n : n + rows]
            decode(W, n)
            if bias is None:
                torch.mm(x_MK, W.t(), out=out)
            else:
                torch.addmm(bias[n : n + rows], x_MK, W.t(), out=out)
    return y.view(*x.shape[:-1], N)


def panel_rows(N: int, K: int, itemsize: int, cache: int) -> int:
    """Return the rows of a panel: `N` in even parts, each at most half of `cache` bytes (but `ROWS` at the least)."""
    most = max(cache // 2 // (K * itemsize) // ROWS, 1)
    tiles = cdiv(N, ROWS)
    return cdiv(tiles, cdiv(tiles, most)) * ROWS


@functools.cache
def l2_cache(device: torch.device) -> int:
    """Return the bytes of the L2 cache of a device."""
    found = 0 if device.type == "cpu" else getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return found or UNKNOWN_L2
