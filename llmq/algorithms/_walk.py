"""Coordinate descent on codes, row by row, with the gradient of each row kept up to date.

Take a row of three codes. Code 1 would be better one step higher: it takes that step, and the step times row 1 of H is
taken off the gradient, three additions. Codes 2 and 3 are best where they are: each costs a look at its gradient and
nothing else. After GPTQ few codes change, so a sweep costs about N K looks and K additions for each change, where the
column loop of _sweep.py would cost products over all columns; the gradient is known at the end without a product.
It needs a compiled loop, so a weight on the CPU and a grid of evenly spaced values; elsewhere _sweep.py finds the same.
Not here: what the gradient is, and the scales (descent.py).
"""

import torch
from torch import Tensor

from llmq.jit import compiled, in_threads
from llmq.params import ROUNDER
from llmq.types import Grid, Parameters

_ROWS = 8  # that share a row of H while it is in the cache


def descend_codes(  # noqa: PLR0913, PLR0917, the state of the descent
    codes: Tensor,
    gradient_NK: Tensor,
    loss_N: Tensor,
    H_KK: Tensor,
    order: Tensor,
    grid: Grid,
    params: Parameters,
    group_K: Tensor,
    sweeps: int,
) -> bool:
    """Make each code the best given the others, `sweeps` times in the order given; update the first three in place.

    codes: uint8 `[N, K]`. gradient_NK: (W - Q) H, float32. loss_N: diag((W - Q) H (W - Q)^T), float32. order: int64
    `[K]`. params: `[N, G]`. group_K: int64 `[K]`, the group of each column. All contiguous.
    Returns False, with nothing done, where there is no compiled loop for the device and the grid.
    """
    lattice = grid.lattice(params) if codes.device.type == "cpu" else None
    loop = compiled(_loop, _KINDS) if lattice is not None else None
    if lattice is None or loop is None:
        return False
    scale_NG, zero_NG = lattice.scale.contiguous(), lattice.zero.contiguous()  # an offset falls out of every step
    divisor_NG = torch.where(scale_NG == 0, torch.inf, scale_NG)
    diagonal_K = H_KK.diagonal().contiguous()
    tensors = (codes, gradient_NK, loss_N, H_KK, diagonal_K, order, group_K, divisor_NG, scale_NG, zero_NG)
    arrays = [t.numpy() for t in tensors]
    in_threads(len(codes), lambda first, last: loop(*arrays, sweeps, first, last, lattice.low, lattice.high))
    return True


def _loop(codes, gradient, loss, H, diagonal, order, group, divisor, scale, zero, sweeps, first, last, low, high):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """Do rows first to last. numba compiles this. Rounding and divisor are those of _sweep.py's leaf."""
    magic = gradient.dtype.type(ROUNDER)
    K = len(order)
    for start in range(first, last, _ROWS):
        stop = min(start + _ROWS, last)
        for k in range(sweeps * K):
            j = order[k % K]
            g = group[j]
            for n in range(start, stop):
                z, s, old = zero[n, g], scale[n, g], codes[n, j]
                target = s * (old - z) + gradient[n, j] / diagonal[j]
                code = ((target / divisor[n, g] + magic) - magic) + z
                new = int(min(max(code, low), high))
                if new != old:
                    step = s * gradient.dtype.type(new - old)
                    loss[n] -= step * (2 * gradient[n, j] - step * diagonal[j])
                    for i in range(K):
                        gradient[n, i] -= step * H[j, i]
                    codes[n, j] = new


_KINDS = "u2 f2 f1 f2 f1 i1 i1 f2 f2 f2 i i i f f"  # of _loop's arguments
