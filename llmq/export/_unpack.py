"""Blocks of ggml as codes on the grids that other formats have: _repack.py the other way round.

    Q4_0 Q5_0 Q8_0    symmetric integers, groups of 32      scale d, float16
    Q2_0              symmetric integers, groups of 64      scale d, or -d with the codes turned round, float16
    Q3_K Q6_K         symmetric integers, groups of 16      scale d * sc, float32
    Q4_1 Q5_1         codes with minima, groups of 32       scale d, minimum -dmin, float16
    Q4_K Q5_K         the same                              scale d * sc, minimum -dmin * m, float32
    Q2_K              the same, groups of 16
    MXFP4 NVFP4       themselves

Levels of Q2_0 are -1 .. 2, those of symmetric integers of 2 bits -2 .. 1: where the level 2 is in use, `d * level` is
`-d * -level`. A group whose scale is 0 gets a scale above 0 and codes that mean its one value, since other formats have
no scales of 0. IQ4_NL and IQ4_XS take their levels from a table that no other format has: they stay themselves, which
no target holds.
Not here: the file, names and order of rows (_gguf_codes.py); MLX's and these minima as zeros (_integers.py).
"""

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.gguf import kinds
from llmq.grids._biased import Biased
from llmq.grids._ggml_affine import Affine
from llmq.grids._ggml_linear import Linear, Table
from llmq.grids.int import Int
from llmq.types import GgmlParams, Grid, Params, QTensor

_OF_ZEROS = 2.0**-10  # the scale of a group that has none; every dtype of scales holds it


def grid_of(kind: str) -> Grid:
    """Return the grid of the codes of a type that llmq has. Raises LlmqError for another."""
    if not kinds.has_grid(kind):
        raise LlmqError(f"of {kind} llmq reads the values, not the codes")
    stored = kinds.grid(kind)
    if isinstance(stored, Affine):
        return Biased(stored.bits, stored.group_size)
    if isinstance(stored, Linear) and not isinstance(stored, Table):
        dtype = torch.float16 if stored.qblock == stored.group_size else torch.float32
        return Int(stored.bits, True, stored.group_size, scale_dtype=dtype)
    return stored


def unpacked(rows: Tensor, kind: str, factor: float | None = None) -> QTensor:
    """Return the codes of stored rows, uint8 `[N, row bytes]`, on `grid_of(kind)`; their values are ggml's to the bit.

    factor: by which the rows are multiplied, of NVFP4 alone.
    """
    stored, grid = kinds.grid(kind), grid_of(kind)
    once = {} if factor is None else {"scale": torch.tensor([factor], dtype=torch.float32)}
    codes, params = stored.from_bytes(rows, once)
    if isinstance(grid, Biased):
        return _with_minima(codes, GgmlParams.of(params), grid)
    return (
        _symmetric(kind, codes, GgmlParams.of(params), grid) if isinstance(grid, Int) else QTensor(codes, params, grid)
    )


def _symmetric(kind: str, codes: Tensor, params: GgmlParams, grid: Int) -> QTensor:
    scale, middle = params.scale.to(grid.scale_dtype), 2 ** (grid.bits - 1)
    if kind == "Q2_0":
        turned = int(codes.max()) == 3
        codes, scale = (3 - codes, -scale) if turned else (codes + 1, scale)
    none = scale == 0
    codes = torch.where(_columns(none, codes), torch.tensor(middle, dtype=torch.uint8), codes)
    scale = scale.masked_fill(none, _OF_ZEROS)
    return QTensor(codes, Params(scale, torch.full(scale.shape, middle, dtype=torch.int32)), grid)


def _with_minima(codes: Tensor, params: GgmlParams, grid: Biased) -> QTensor:
    scale, minimum = params.scale, params.tensors()["offset"]
    if params.sc is None:
        scale, minimum = scale.half(), minimum.half()
    none = scale == 0
    codes = torch.where(_columns(none, codes), torch.tensor(0, dtype=torch.uint8), codes)
    return QTensor(codes, GgmlParams(scale.masked_fill(none, _OF_ZEROS), minimum), grid)


def _columns(groups: Tensor, codes: Tensor) -> Tensor:
    """Return what is said of groups `[N, G]`, said of each column."""
    return groups.repeat_interleave(codes.shape[1] // groups.shape[1], 1)
