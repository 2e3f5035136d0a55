"""ggml's blocks of small floats: MXFP4 and NVFP4.

    mxfp4   17 bytes, 32 columns   the E8M0 scale; 16 bytes, byte j holds the codes of columns j (low nibble) and j + 16
    nvfp4   36 bytes, 64 columns   the E4M3 scales of 4 groups of 16; of each 8 bytes, byte j: its columns j and j + 8

ggml halves a scale and doubles the values, which is the same; its -0 is 0. A divisor does not fit in: its reciprocal
lies beside the rows, as NAME.scale, float32 [1], by which llama.cpp multiplies what the weight gave.
Facts: block_mxfp4 and block_nvfp4 of ggml-common.h, `ggml_e8m0_to_fp32_half` and `ggml_ue4m3_to_fp32` of ggml-impl.h.
Not here: which scales (mxfp4.py, nvfp4.py).
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llmq.grids._ggml import cut, held, merge, split
from llmq.stored import StoredGrid
from llmq.types import FloatParams, Parameters


class FloatBlocks(StoredGrid):
    """Codes of 4 bits behind the scales of their groups. qblock: the columns of a block."""

    qblock: ClassVar[int]

    @property
    def _group(self) -> int:
        return self.granularity.columns(0)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a stored weight, scales included."""
        return 4 + 8 / self._group

    def row_bytes(self, K: int) -> int:
        """See `StoredGrid.row_bytes`."""
        if K % self.qblock:
            raise ValueError(f"{self.kind} stores {self.qblock} columns together, which do not divide K = {K}")
        return K // 2 + K // self._group

    def to_bytes(self, codes: Tensor, params: Parameters) -> Tensor:
        """See `StoredGrid.to_bytes`."""
        N, K = codes.shape
        blocks, scales = K // self.qblock, held(FloatParams.of(params).stored)
        halves = codes.to(torch.uint8).reshape(N, -1, 2, self._group // 2)
        parts = scales.reshape(N, blocks, -1), merge(halves, 4).reshape(N, blocks, -1)
        return torch.cat(parts, dim=-1).reshape(N, self.row_bytes(K))

    def from_bytes(self, rows: Tensor, once: Mapping[str, Tensor] | None = None) -> tuple[Tensor, FloatParams]:
        """See `StoredGrid.from_bytes`."""
        N, groups = len(rows), self.qblock // self._group
        scales, nibbles = cut(rows.reshape(N, -1, groups + self.qblock // 2), (groups, self.qblock // 2))
        codes = split(nibbles.reshape(N, -1, self._group // 2), 4)
        return codes.reshape(N, -1), self.read(scales.reshape(N, -1), once or {})

    @abstractmethod
    def read(self, scales: Tensor, once: Mapping[str, Tensor]) -> FloatParams:
        """Return the parameters of stored scales, uint8 `[N, G]`, with what lies beside the rows."""
