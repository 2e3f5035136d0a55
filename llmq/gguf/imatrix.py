"""Importance, as llama.cpp exchanges it: the mean square of every input channel of a linear, the diagonal of H.

    NAME.in_sum2   float32 [1, K]   sum over tokens of x^2         imatrix.datasets, .chunk_count, .chunk_size
    NAME.counts    float32 [1, 1]   tokens                         general.type = "imatrix"

llama.cpp's own writer drops the leading 1, so both `[1, K]` and `[K]` are read; experts have a row each. NAME is ggml's
(`blk.0.attn_q.weight`). A quantizer divides the one by the other; the order of rows plays no part.
Source: llama.cpp `tools/imatrix/imatrix.cpp` (save_imatrix) and `common/imatrix-loader.cpp`.
Not here: what weighs errors by it (grids/), where the sums come from (stats.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint.disk import writing
from llmq.checkpoint.place import user_path
from llmq.errors import LlmqError
from llmq.gguf.reader import GgufFile, Stored

Sums = Mapping[str, Sequence[tuple[Tensor, int]]]
"""By ggml's tensor name, once or for each expert: the sum of squares of each channel, `[K]`, and of how many tokens."""


def write(path: Path, sums: Sums, datasets: list[str], chunk: int) -> None:
    """Write an importance matrix; `chunk` is the length of a calibration sequence. Raises LlmqError on a full disk."""
    with writing(path):
        writer = gguf.GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", datasets)
        writer.add_uint32("imatrix.chunk_count", max(n for several in sums.values() for _, n in several) // chunk)
        writer.add_uint32("imatrix.chunk_size", chunk)
        for name, several in sorted(sums.items()):
            totals = [total.float().cpu() for total, _ in several]
            writer.add_tensor(f"{name}.in_sum2", torch.stack(totals).numpy())
            writer.add_tensor(f"{name}.counts", np.array([[count] for _, count in several], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(name: str | Path) -> dict[str, Tensor]:
    """Return the mean square of every channel, float32 `[K]`, by ggml's tensor name; of experts `[E, K]`.

    A tensor that no token reached is not there; an expert is NaN.
    Raises LlmqError for a file that is not an importance matrix in GGUF form, or holds numbers that cannot be one.
    """
    path = user_path(name)
    if path.suffix == ".dat" and path.is_file():
        raise LlmqError(
            f"{path} is an importance matrix in llama.cpp's old form; llama-imatrix --in-file {path} -o NEW.gguf turns "
            "it into the one that is read"
        )
    file = GgufFile(path)
    if str(file.value("general.type")) != "imatrix":
        raise LlmqError(
            f"{path} is a GGUF file, but no importance matrix; make one with llama-imatrix or --imatrix-out"
        )
    means = {}
    for entry in file.tensors.values():
        name, _, kind = entry.name.rpartition(".")
        if kind != "in_sum2":
            continue
        counts = file.tensors.get(f"{name}.counts")
        rows = entry.n_elements // max(1, entry.shape[0])
        if counts is None or not rows or len(entry.shape) > 2 or counts.n_elements != rows:
            raise LlmqError(f"{path}: {entry.name} is not a row of sums for each of its counts; make it again")
        count = _numbers(path, counts)
        mean = torch.where(count[:, None] > 0, _numbers(path, entry).view(rows, -1) / count[:, None], torch.nan)
        if (count > 0).any():
            means[name] = mean[0] if rows == 1 else mean
    if not means:
        raise LlmqError(f"{path} holds no sums; make the importance matrix again")
    return means


def _numbers(path: Path, stored: Stored) -> Tensor:
    """Return the numbers of a tensor, float32 `[K]`. Raises LlmqError for another type, and for what no sum can be."""
    if stored.tensor_type.name != "F32":
        raise LlmqError(
            f"{path}: {stored.name} is {stored.tensor_type.name}, not F32; make the importance matrix again"
        )
    numbers = torch.from_numpy(np.array(stored.data.reshape(-1), np.float32))
    if not torch.isfinite(numbers).all() or (numbers < 0).any():
        raise LlmqError(f"{path}: {stored.name} holds negative or infinite sums; make the importance matrix again")
    return numbers
