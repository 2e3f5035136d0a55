"""Q5_0: 5-bit codes, one float16 scale per 32 columns (5.5 bits): `w = d * (code - 16)`.

22 bytes:
    d float16
    4 bytes, bit i of byte b is bit 4 of the code of column 8 b + i
    16 bytes, byte j holds the low 4 bits of columns j (low nibble) and j + 16 (high nibble)

Facts: block_q5_0 of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, merge, merge_bits, split, split_bits, spread
from llmq.grids._ggml_linear import Linear


class Q5_0(Linear):
    """32 levels from -16 to 15; the scale is negative where the largest value is positive."""

    bits = 5
    group_size = 32
    qblock = 32
    qblock_bytes = 22
    zero = 16
    starts = (*spread(-13.6, -18.4, 12), *spread(13.8, 15.6, 3))

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        nibbles = merge((codes & 15).unflatten(-1, (2, 16)), 4)
        return torch.cat([half_to_bytes(stored.d), merge_bits(codes >> 4), nibbles], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        d, high, nibbles = cut(blocks, (2, 4, 16))
        return split(nibbles, 4).flatten(-2) | split_bits(high) << 4, Stored(bytes_to_half(d)[..., 0])
