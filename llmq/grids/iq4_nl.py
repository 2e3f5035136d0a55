"""IQ4_NL: 4-bit codes into a table of 16 uneven levels, one float16 scale per 32 columns (4.5 bits): `w = d * level`.

18 bytes:
    d float16
    16 bytes, byte j holds the codes of columns j (low nibble) and j + 16 (high nibble)

Facts: block_iq4_nl of ggml-common.h. Not here: the search (_ggml_linear.py).
"""

import torch
from torch import Tensor

from llmq.grids._ggml import Stored, bytes_to_half, cut, half_to_bytes, merge, split, spread
from llmq.grids._ggml_linear import Table


class IQ4_NL(Table):
    """16 levels, closer together near zero."""

    bits = 4
    group_size = 32
    qblock = 32
    qblock_bytes = 18
    starts = (*spread(-108, -152, 12), *spread(106, 122, 4))

    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        return torch.cat([half_to_bytes(stored.d), merge(codes.unflatten(-1, (2, 16)), 4)], dim=-1)

    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        d, qs = cut(blocks, (2, 16))
        return split(qs, 4).flatten(-2), Stored(bytes_to_half(d)[..., 0])
