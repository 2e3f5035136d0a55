"""Scales of small floats for solved codes, of those that a file stores, by coordinate descent.

With the codes fixed the loss of a row is quadratic in its scales (_int_refine.py): that of a group, the others as they
are, is best at s + b_g / A_gg, and the nearest to it that is stored is the best of those. It is taken where the loss
falls, the others are told of it, b -= A_g ds, and the next group follows: a few rounds over all groups, for all rows of
a chunk at once.
Not here: rounding the codes again (algorithms/descent.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmq.grids._int_refine import systems
from llmq.types import FloatParams

if TYPE_CHECKING:
    from llmq.grids._float import FloatGrid

_ROUNDS = 3


def refine(
    grid: FloatGrid, gradient_NK: Tensor, codes: Tensor, params: FloatParams, H_KK: Tensor, group_K: Tensor
) -> FloatParams:
    """Return params with better scales. gradient_NK: (W - Q) H. group_K: int64 `[K]`."""
    found, first = [], 0
    for A, b in systems(gradient_NK, grid.value.decode(codes), H_KK, group_K):
        rows = slice(first, first + len(b))
        found.append(_descended(A, b, grid, params.map(lambda p, rows=rows: p[rows])))  # type: ignore[misc]
        first = rows.stop
    return type(params).cat(found)


def _descended(A: Tensor, b: Tensor, grid: FloatGrid, params: FloatParams) -> FloatParams:
    scale = params.scale.double()
    for _ in range(_ROUNDS):
        for g in range(scale.shape[1]):
            best = scale[:, g] + b[:, g] / A[:, g, g]
            stored = grid.beside(best[:, None].float().clamp(min=0), params).scale[:, 0].double()
            step = stored - scale[:, g]
            step = torch.where(step * (2 * b[:, g] - step * A[:, g, g]) > 0, step, 0)
            scale[:, g] += step
            b -= A[:, g] * step[:, None]
    return grid.beside(scale.float(), params)
