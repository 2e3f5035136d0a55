"""Q2_0: 2-bit codes, one float16 scale per 64 columns (2.25 bits): `w = d * (code - 1)`.

18 bytes:
    d float16
    16 bytes, byte j holds the codes of columns 4 j (lowest bits) to 4 j + 3

Facts: block_q2_0 of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, merge, split, spread
from llmq.grids._ggml_linear import Linear


class Q2_0(Linear):
    """4 levels from -1 to 2; the scale is negative where the largest value is."""

    bits = 2
    group_size = 64
    qblock = 64
    qblock_bytes = 18
    zero = 1
    starts = (*spread(0.8, 3.2, 15), *spread(-0.5, -2.0, 6))

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        return torch.cat([half_to_bytes(stored.d), merge(codes.unflatten(-1, (16, 4)).mT, 2)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        d, qs = cut(blocks, (2, 16))
        return split(qs, 2).mT.flatten(-2), Stored(bytes_to_half(d)[..., 0])
