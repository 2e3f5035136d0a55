"""Q4_K: 4-bit codes in superblocks of 8 groups of 32 columns (4.5 bits): `w = d * sc * code - dmin * m`.

144 bytes:
    d float16
    dmin float16
    12 bytes of sc and m, 6 bits each (`pack_six`)
    128 bytes, byte 32 h + j holds the codes of columns 64 h + j (low nibble) and 64 h + j + 32 (high nibble)

Facts: block_q4_K of ggml-common.h. Not here: the search (_ggml_affine.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, merge, pack_six, split, spread, unpack_six
from llmq.grids._ggml_affine import Affine


class Q4_K(Affine):
    """16 codes; 6-bit scales and minima."""

    bits = 4
    group_size = 32
    qblock = 256
    qblock_bytes = 144
    starts = spread(14.1, 18, 12)
    small_range = (0, 63)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        qs = merge(codes.unflatten(-1, (4, 2, 32)), 4).flatten(-2)
        return torch.cat([half_to_bytes(stored.d, stored.dmin), pack_six(stored.sc, stored.m), qs], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        halves, small, qs = cut(blocks, (4, 12, 128))
        codes = split(qs.unflatten(-1, (4, 32)), 4).flatten(-3)
        sc, m = unpack_six(small)
        d, dmin = bytes_to_half(halves).unbind(-1)
        return codes, Stored(d, dmin, sc, m)
