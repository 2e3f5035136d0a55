"""Scales of small floats for solved codes, of those that a file stores, by coordinate descent.

With the codes fixed the loss of a row is quadratic in its scales (_int_refine.py): that of a group, the others as they
are, is best at s + b_g / A_gg, and the nearest to it that is stored is the best of those. It is taken where the loss
falls, the others are told of it, b -= A_g ds, and the next group follows: a few rounds over all groups, for all rows of
a chunk at once.
Not here: rounding the codes again (algorithms/descent.py).
"""

import torch
from torch import Tensor

from llmq.grids._int_refine import systems
from llmq.minifloat import rescaled
from llmq.types import Parameters

_ROUNDS = 3


def refine(gradient_NK: Tensor, U_NK: Tensor, params: Parameters, H_KK: Tensor, group_K: Tensor) -> Parameters:
    """Return params with better scales. gradient_NK: (W - Q) H. U_NK: the values of the codes. group_K: int64 `[K]`."""
    found, first = [], 0
    for A, b in systems(gradient_NK, U_NK, H_KK, group_K):
        rows = slice(first, first + len(b))
        found.append(_descended(A, b, params.map(lambda p, rows=rows: p[rows])))  # type: ignore[misc]
        first = rows.stop
    return type(params).cat(found)


def _descended(A: Tensor, b: Tensor, params: Parameters) -> Parameters:
    columns = [params.map(lambda p, g=g: p[:, min(g, p.shape[1] - 1)]) for g in range(A.shape[1])]  # type: ignore[misc]
    for g in [*range(len(columns))] * _ROUNDS:
        scale = columns[g].scale.double()
        moved = rescaled(columns[g], (scale + b[:, g] / A[:, g, g]).clamp(min=0).float())
        step = moved.scale.double() - scale
        better = step * (2 * b[:, g] - step * A[:, g, g]) > 0
        columns[g] = rescaled(columns[g], torch.where(better, moved.scale, columns[g].scale).float())
        b -= A[:, g] * torch.where(better, step, 0)[:, None]
    return rescaled(params, torch.stack([column.scale for column in columns], 1).float())
