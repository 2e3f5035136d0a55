"""Q4_1: 4-bit codes, float16 scale and minimum per 32 columns (5 bits): `w = d * code + m`, m = -dmin.

20 bytes:
    d float16
    m float16
    16 bytes, byte j holds the codes of columns j (low nibble) and j + 16 (high nibble)

Facts: block_q4_1 of ggml-common.h. Not here: the search (_ggml_affine.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, held, merge, split, spread
from llmq.grids._ggml_affine import Affine


class Q4_1(Affine):
    """16 codes between a minimum and a maximum."""

    bits = 4
    group_size = 32
    qblock = 32
    qblock_bytes = 20
    starts = spread(14.1, 18, 12)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        halves = half_to_bytes(stored.d, -held(stored.dmin))
        return torch.cat([halves, merge(codes.unflatten(-1, (2, 16)), 4)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        halves, qs = cut(blocks, (4, 16))
        d, m = bytes_to_half(halves).unbind(-1)
        return split(qs, 4).flatten(-2), Stored(d, -m)
