"""Q6_K: 6-bit codes in superblocks of 16 groups of 16 columns (6.5625 bits): `w = d * sc * (code - 32)`.

210 bytes:
    128 bytes, byte 64 h + j holds the low 4 bits of columns 128 h + j (low nibble) and 128 h + j + 64 (high
        nibble)
    64 bytes, byte 32 h + j holds the high 2 bits of columns 128 h + j + (0, 32, 64, 96) from bit 0 on
    16 bytes, int8 sc of each group
    d float16

Facts: block_q6_K of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, held, merge, split, spread
from llmq.grids._ggml_linear import Linear


class Q6_K(Linear):
    """64 levels from -32 to 31; signed 8-bit scales."""

    bits = 6
    group_size = 16
    qblock = 256
    qblock_bytes = 210
    zero = 32
    starts = (*spread(-20.8, -35, 12), *spread(20.8, 31.4, 8))
    small_range = (-128, 127)
    sc_starts = (-128, -126, -123, 127, 125, 122)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        low = merge((codes & 15).unflatten(-1, (2, 2, 64)), 4).flatten(-2)
        high = merge((codes >> 4).unflatten(-1, (2, 4, 32)), 2).flatten(-2)
        sc = held(stored.sc).to(torch.int8).view(torch.uint8)
        return torch.cat([low, high, sc, half_to_bytes(stored.d)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        low, high, sc, d = cut(blocks, (128, 64, 16, 2))
        low, high = split(low.unflatten(-1, (2, 64)), 4), split(high.unflatten(-1, (2, 32)), 2)
        codes = low.flatten(-3) | high.flatten(-3) << 4
        return codes, Stored(bytes_to_half(d)[..., 0], sc=sc.contiguous().view(torch.int8).to(torch.int16))
