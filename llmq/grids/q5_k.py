"""Q5_K: 5-bit codes in superblocks of 8 groups of 32 columns (5.5 bits): `w = d * sc * code - dmin * m`.

176 bytes:
    d float16
    dmin float16
    12 bytes of sc and m, 6 bits each (`pack_six`)
    32 bytes, bit i of byte j is bit 4 of the code of column 32 i + j
    128 bytes, byte 32 h + j holds the low 4 bits of columns 64 h + j (low nibble) and 64 h + j + 32 (high
        nibble)

Facts: block_q5_K of ggml-common.h. Not here: the search (_ggml_affine.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, merge, pack_six, split, spread, unpack_six
from llmq.grids._ggml_affine import Affine


class Q5_K(Affine):
    """32 codes; 6-bit scales and minima."""

    bits = 5
    group_size = 32
    qblock = 256
    qblock_bytes = 176
    starts = spread(30.1, 35.6, 12)
    small_range = (0, 63)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        top = merge((codes >> 4).unflatten(-1, (8, 32)), 1)
        qs = merge((codes & 15).unflatten(-1, (4, 2, 32)), 4).flatten(-2)
        return torch.cat([half_to_bytes(stored.d, stored.dmin), pack_six(stored.sc, stored.m), top, qs], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        halves, small, top, qs = cut(blocks, (4, 12, 32, 128))
        codes = split(qs.unflatten(-1, (4, 32)), 4).flatten(-3) | split(top, 1).flatten(-2) << 4
        sc, m = unpack_six(small)
        d, dmin = bytes_to_half(halves).unbind(-1)
        return codes, Stored(d, dmin, sc, m)
