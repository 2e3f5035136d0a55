"""Q5_1: 5-bit codes, float16 scale and minimum per 32 columns (6 bits): `w = d * code + m`, m = -dmin.

24 bytes:
    d float16
    m float16
    4 bytes, bit i of byte b is bit 4 of the code of column 8 b + i
    16 bytes, byte j holds the low 4 bits of columns j (low nibble) and j + 16 (high nibble)

Facts: block_q5_1 of ggml-common.h. Not here: the search (_ggml_affine.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import (
    Stored,
    bytes_to_half,
    cut,
    half_to_bytes,
    held,
    merge,
    merge_bits,
    split,
    split_bits,
    spread,
)
from llmq.grids._ggml_affine import Affine


class Q5_1(Affine):
    """32 codes between a minimum and a maximum."""

    bits = 5
    group_size = 32
    qblock = 32
    qblock_bytes = 24
    starts = spread(30.1, 35.6, 12)

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        nibbles = merge((codes & 15).unflatten(-1, (2, 16)), 4)
        return torch.cat([half_to_bytes(stored.d, -held(stored.dmin)), merge_bits(codes >> 4), nibbles], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        halves, high, nibbles = cut(blocks, (4, 4, 16))
        d, m = bytes_to_half(halves).unbind(-1)
        return split(nibbles, 4).flatten(-2) | split_bits(high) << 4, Stored(d, -m)
