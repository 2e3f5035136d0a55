"""Q8_0: 8-bit codes, one float16 scale per 32 columns (8.5 bits): `w = d * (code - 128)`.

34 bytes:
    d float16
    32 bytes, int8 `code - 128` of column j

Facts: block_q8_0 of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, spread
from llmq.grids._ggml_linear import Linear


class Q8_0(Linear):
    """256 levels from -128 to 127."""

    bits = 8
    group_size = 32
    qblock = 32
    qblock_bytes = 34
    zero = 128
    starts = (127, *spread(-112, -132, 6), *spread(112, 126, 3))

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        return torch.cat([half_to_bytes(stored.d), codes ^ 128], dim=-1)  # code - 128 in two's complement

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        d, qs = cut(blocks, (2, 32))
        return qs ^ 128, Stored(bytes_to_half(d)[..., 0])
