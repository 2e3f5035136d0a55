"""Q2_K: 2-bit codes in superblocks of 16 groups of 16 columns (2.625 bits): `w = d * sc * code - dmin * m`.

84 bytes:
    16 bytes, sc (low nibble) and m (high nibble) of each group
    64 bytes, byte 32 h + j holds the codes of columns 128 h + j + (0, 32, 64, 96) from bit 0 on
    d float16
    dmin float16

Facts: block_q2_K of ggml-common.h. Not here: the search (_ggml_affine.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, held, merge, split, spread
from llmq.grids._ggml_affine import Affine


class Q2_K(Affine):
    """4 codes; 4-bit scales and minima."""

    bits = 2
    group_size = 16
    qblock = 256
    qblock_bytes = 84
    starts = spread(2.1, 4.3, 14)
    small_range = (0, 15)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        small = (held(stored.sc) | held(stored.m) << 4).to(torch.uint8)
        qs = merge(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        return torch.cat([small, qs, half_to_bytes(stored.d, stored.dmin)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        small, qs, halves = cut(blocks, (16, 64, 4))
        sc, m = (small & 15).to(torch.int16), (small >> 4).to(torch.int16)
        d, dmin = bytes_to_half(halves).unbind(-1)
        return split(qs.unflatten(-1, (2, 32)), 2).flatten(-3), Stored(d, dmin, sc, m)
