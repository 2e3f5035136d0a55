"""Tensors that a run sets aside for itself, on the disk that it writes to: too much for memory, and no part of OUT.

Not here: what is written (sink.py).
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.disk import writing
from llmq.guard.reading import tensor_entries


class Scratch:
    """A folder of tensors, one a file, each under one name or several. Raises LlmqError where the disk is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}

    def keep(self, names: Iterable[str], tensor: Tensor) -> None:
        """Set a tensor aside."""
        file = self._folder / f"{len(self._files):06d}"
        with writing(file):
            self._folder.mkdir(exist_ok=True)
            save_file({"kept": tensor.detach().cpu().contiguous()}, file)
        self._files |= dict.fromkeys(names, file)

    def get(self, name: str) -> Tensor | None:
        """Return the tensor of that name, None where there is none."""
        file = self._files.get(name)
        return None if file is None else tensor_entries(file)["kept"].read()

    def drop(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
