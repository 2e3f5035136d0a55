"""IQ4_XS: the 16 uneven levels of IQ4_NL in superblocks of 8 groups of 32 columns (4.25 bits): `w = d * sc * level`.

136 bytes:
    d float16
    2 bytes, the high 2 bits of `sc + 32` of the 8 groups from bit 0 on
    4 bytes, its low 4 bits, of groups 2 j (low nibble) and 2 j + 1 in byte j
    128 bytes, byte 16 g + j holds the codes of columns 32 g + j (low nibble) and 32 g + j + 16 (high nibble)

Facts: block_iq4_xs of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, held, merge, split, spread
from llmq.grids._ggml_linear import Table


class IQ4_XS(Table):
    """16 levels, closer together near zero; signed 6-bit scales."""

    bits = 4
    group_size = 32
    qblock = 256
    qblock_bytes = 136
    starts = (*spread(-108, -152, 12), *spread(106, 122, 4))
    small_range = (-32, 31)
    sc_starts = (-32, -31, -30, -28, 31, 30, 29)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        small = (held(stored.sc) + 32).to(torch.uint8)
        high = merge((small >> 4).unflatten(-1, (2, 4)).mT, 2)
        low = merge((small & 15).unflatten(-1, (4, 2)).mT, 4)
        qs = merge(codes.unflatten(-1, (8, 2, 16)), 4).flatten(-2)
        return torch.cat([half_to_bytes(stored.d), high, low, qs], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        d, high, low, qs = cut(blocks, (2, 2, 4, 128))
        small = split(low, 4).mT.flatten(-2) | split(high, 2).mT.flatten(-2) << 4
        codes = split(qs.unflatten(-1, (8, 16)), 4).flatten(-3)
        return codes, Stored(bytes_to_half(d)[..., 0], sc=small.to(torch.int16) - 32)
