"""Many rows on a CPU: panels of rows of W decoded to float32 and multiplied by torch, no more than one at a time.

Not here: the loops that decode (_int_loops.py, _float_loops.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 2**21  # weights decoded at once, 8 MB: smaller panels slow the product down, larger ones leave the cache


def product(x_MK: Tensor, N: int, decode: Callable[[slice, Tensor], None]) -> Tensor:
    """Return `x @ W^T` in float32, `[M, N]`.

    decode: fills the first rows of float32 `[panel, K]` with those of W that the slice says.
    """
    M, K = x_MK.shape
    panel = min(max(_PANEL // K, 64), N)
    W = torch.empty(panel, K, dtype=torch.float32)
    if panel == N:  # its result needs no copying
        decode(slice(0, N), W)
        return F.linear(x_MK, W)
    y_MN = torch.empty(M, N, dtype=torch.float32)
    for n in range(0, N, panel):
        rows = slice(n, min(n + panel, N))
        decode(rows, W)
        y_MN[:, rows] = F.linear(x_MK, W[: rows.stop - n])
    return y_MN
