"""What the stored rows of a ggml type mean: gguf-py's decoders, and of Q2_0, which it does not know, ggml's by hand."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor


def values_of(rows: Tensor | np.ndarray, kind: str) -> Tensor:
    """Return the float32 values `[..., K]` of stored rows, uint8 `[..., row bytes]`."""
    stored = np.asarray(rows)
    if kind != "Q2_0":
        return torch.from_numpy(np.array(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])))
    values = [_q2_0(bytes(row)) for row in stored.reshape(-1, stored.shape[-1])]
    return torch.tensor(values, dtype=torch.float32).reshape(*stored.shape[:-1], -1)


def _q2_0(row: bytes) -> list[float]:
    """Return the values of one row (`dequantize_row_q2_0` of ggml-quants.c): of 64 columns in 18 bytes."""
    values = []
    for at in range(0, len(row), 18):
        d = float(np.frombuffer(row, "<f2", 1, at)[0])
        values += [((row[at + 2 + j // 4] >> 2 * (j % 4)) % 4 - 1) * d for j in range(64)]
    return values
