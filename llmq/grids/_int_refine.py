"""Group scales for solved codes, by least squares on `tr (W - Q) H (W - Q)^T`.

With the codes fixed, a row is Q = sum_g s_g u_g, u_g = (code - zero) on group g and 0 elsewhere, so the best change of
its scales solves   A ds = b,   A_gh = u_g H u_h^T,   b_g = u_g H (w - q)^T,   in float64; the sums are then rounded to
the dtype that scales are stored in.
Not here: rounding the codes again (algorithms/descent.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq.params import stored
from llmq.types import Params

_ROWS = 512  # at most, whose products with H are in memory together
_NUMBERS = 2**25  # of their G x G systems


def refine(gradient_NK: Tensor, codes: Tensor, params: Params, H_KK: Tensor, group_K: Tensor) -> Params:
    """Return params with the least-squares scales, zeros unchanged. gradient_NK: (W - Q) H.

    A scale that would halve, double or change sign stays: its group's codes hardly bear on the output.
    """
    U_NK = codes.float() - params.zero[:, group_K].float()
    change = torch.cat([torch.linalg.solve(A, b) for A, b in systems(gradient_NK, U_NK, H_KK, group_K)])
    old = params.scale.double()
    ratio = 1 + change / old
    sane = (ratio > 0.5) & (ratio < 2)
    return Params(stored(torch.where(sane, old + change, old), params.scale), params.zero)


def systems(gradient_NK: Tensor, U_NK: Tensor, H_KK: Tensor, group_K: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A, float64 `[n, G, G]`, and b, `[n, G]`, of the next n rows until there are none left."""
    G = int(group_K.max()) + 1
    b_NK = U_NK * gradient_NK
    if bool((group_K.diff() < 0).any()):
        order = torch.argsort(group_K, stable=True)
        U_NK, b_NK, H_KK = U_NK[:, order], b_NK[:, order], H_KK[order][:, order]
    rows = max(1, min(_ROWS, _NUMBERS // G**2))
    for U, b in zip(U_NK.split(rows), b_NK.split(rows), strict=True):
        yield _normal(U, H_KK, G), _by_group(b, G).sum(-1).double()


def _normal(U_NK: Tensor, H_KK: Tensor, G: int) -> Tensor:
    """Return A, float64 `[N, G, G]`, with a little on its diagonal: a group of zeros has none."""
    g = U_NK.shape[1] // G
    A = torch.zeros(len(U_NK), G, G, dtype=torch.float64, device=U_NK.device)
    for i in range(G):
        at = slice(i * g, (i + 1) * g)
        row = _by_group((U_NK[:, at] @ H_KK[at, i * g :]).mul_(U_NK[:, i * g :]), G - i).sum(-1).double()
        A[:, i, i:], A[:, i:, i] = row, row
    diagonal = A.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
    return A


def _by_group(x_NK: Tensor, G: int) -> Tensor:
    return x_NK.reshape(len(x_NK), G, -1)
