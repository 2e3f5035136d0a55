"""Q3_K: 3-bit codes in superblocks of 16 groups of 16 columns (3.4375 bits): `w = d * sc * (code - 4)`.

110 bytes:
    32 bytes, bit i of byte j is bit 2 of the code of column 32 i + j
    64 bytes, byte 32 h + j holds the low 2 bits of columns 128 h + j + (0, 32, 64, 96) from bit 0 on
    12 bytes of `sc + 32`, 6 bits each: the low 4 bits of groups j and j + 8 in the nibbles of byte j < 8, the
        high 2 bits of groups j + (0, 4, 8, 12) in byte 8 + j
    d float16

Facts: block_q3_K of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, held, merge, split, spread
from llmq.grids._ggml_linear import Linear


class Q3_K(Linear):
    """8 levels from -4 to 3; signed 6-bit scales."""

    bits = 3
    group_size = 16
    qblock = 256
    qblock_bytes = 110
    zero = 4
    starts = (*spread(-3.3, -5, 12), *spread(3.1, 3.8, 3))
    small_range = (-32, 31)
    sc_starts = (-32, -31, -30, -28, -26, 31, 30, 29, 27)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        small = (held(stored.sc) + 32).to(torch.uint8)
        low, high = merge((small & 15).unflatten(-1, (2, 8)), 4), merge((small >> 4).unflatten(-1, (4, 4)), 2)
        top = merge((codes >> 2).unflatten(-1, (8, 32)), 1)
        qs = merge((codes & 3).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        return torch.cat([top, qs, low, high, half_to_bytes(stored.d)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        top, qs, low, high, d = cut(blocks, (32, 64, 8, 4, 2))
        small = split(low, 4).flatten(-2) | split(high, 2).flatten(-2) << 4
        codes = split(qs.unflatten(-1, (2, 32)), 2).flatten(-3) | split(top, 1).flatten(-2) << 2
        return codes, Stored(bytes_to_half(d)[..., 0], sc=small.to(torch.int16) - 32)
