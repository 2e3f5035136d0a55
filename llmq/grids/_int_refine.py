"""Group scales for solved codes, by least squares on `tr (W - Q) H (W - Q)^T`.

With the codes fixed, a row is Q = sum_g s_g u_g, u_g = (code - zero) on group g and 0 elsewhere, so its best scales
solve   A s = b,   A_gh = u_g H u_h^T,   b_g = u_g H w^T,   in float64; they are then rounded to their stored dtype.
Not here: rounding the codes again (algorithms/descent.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.types import Params

_ROWS = 2048  # rows whose G x G systems are in memory together


def refine(W_NK: Tensor, codes: Tensor, params: Params, H_KK: Tensor, group_K: Tensor) -> Params:
    """Return params with the least-squares scales, zeros unchanged.

    A scale that would halve, double or change sign stays: its group's codes hardly bear on the output.
    """
    N, G = params.scale.shape
    order = torch.argsort(group_K, stable=True)
    H_GgK = H_KK[order][:, order].reshape(G, -1, H_KK.shape[0])
    U_NK = (codes.float() - params.zero[:, group_K].float())[:, order]
    b_NK = U_NK * (W_NK @ H_KK)[:, order]
    scale = torch.empty(N, G, dtype=torch.float64, device=U_NK.device)
    for rows in torch.arange(N, device=U_NK.device).split(_ROWS):
        U_NGg = U_NK[rows].reshape(len(rows), G, -1)
        A = torch.stack([((U_NGg[:, g] @ H_GgK[g]).reshape(U_NGg.shape) * U_NGg).sum(-1) for g in range(G)], 1)
        A = A.double()
        A.diagonal(dim1=1, dim2=2).add_(1e-6 * A.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
        b = b_NK[rows].reshape(len(rows), G, -1).sum(-1).double()
        scale[rows] = torch.linalg.solve(A, b)
    old = params.scale.double()
    ratio = scale / old
    sane = (ratio > 0.5) & (ratio < 2)
    return Params(torch.where(sane, scale, old).to(params.scale.dtype), params.zero)
