"""Hidden states on the disk: the batches of the calibration where they stand between two blocks, one file each.

    state = Batches(folder / "00000", "hidden", range(2), device).filled(tensors)     00000/hidden-000000, -000001
    state[0]                                    the first batch, read whole; as often as it is asked for
    after = state.moved(outputs)                00001/hidden-000000, -000001

A file is named by the number of its batch in the whole calibration, whoever holds it. Files are read and written whole,
not mapped: pages that are mapped count as memory of the process, those that were read are the page cache's, which gives
them back when memory is short. Where a GPU computes, the batch after the one that is asked for is read meanwhile, and
one is written while the next is made.
Not here: what the batches go through (model/lanes.py), when a state is no longer needed (journal.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmq import aside
from llmq.checkpoint import shards
from llmq.checkpoint.disk import writing
from llmq.guard.reading import tensor_entries

_CPU = torch.device("cpu")


class Batches(Sequence[Tensor]):
    """Batches of one kind, such as hidden states `[B, S, H]`, in files of one folder, which is called by a number.

    numbers: those of the batches, in the order in which they are held. device: where they are read to.
    Raises LlmqError where the disk is full, or a file cannot be read.
    """

    def __init__(
        self, folder: Path = Path(), kind: str = "", numbers: Sequence[int] = (), device: torch.device = _CPU
    ) -> None:
        self.folder, self.kind, self.numbers, self.device = folder, kind, numbers, device
        self._ahead = aside.Ahead(self._read) if aside.pays(device) else None

    @classmethod
    def found(cls, folder: Path, kind: str, device: torch.device) -> Batches:
        """Return all batches of a kind that lie in a folder."""
        numbers = sorted(int(file.name.rpartition("-")[2]) for file in folder.glob(f"{kind}-*"))
        return cls(folder, kind, numbers, device)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]
        """Read a batch, or the list of several."""
        return self._get(range(len(self))[i]) if isinstance(i, int) else [self._get(n) for n in range(len(self))[i]]

    def filled(self, batches: Iterable[Tensor]) -> Batches:
        """Write the batches, one after the other as they come, and hold none meanwhile; return this."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        coming = iter(batches)
        with aside.behind(self.device) as do:
            for number in self.numbers:
                do(partial(self._write, number, next(coming)))
        next(coming, None)  # who makes them may finish
        return self

    def moved(self, batches: Iterable[Tensor]) -> Batches:
        """Write what a block made of these batches into the folder of the next number; return those."""
        folder = self.folder.with_name(f"{int(self.folder.name) + 1:0{len(self.folder.name)}d}")
        return Batches(folder, self.kind, self.numbers, self.device).filled(batches)

    def of(self, numbers: Sequence[int]) -> Batches:
        """Return other batches of the same kind and place, as another process may have written them."""
        return Batches(self.folder, self.kind, numbers, self.device)

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.kind}-{number:06d}"

    def _write(self, number: int, batch: Tensor) -> None:
        with writing(self._file(number)):
            shards.write(self._file(number), {"batch": batch.detach().cpu()})

    def _get(self, i: int) -> Tensor:
        number, *after = self.numbers[i : i + 2]
        batch = self._ahead.get(number, *after) if self._ahead else self._read(number)
        return batch.to(self.device, non_blocking=batch.is_pinned())

    def _read(self, number: int) -> Tensor:
        return aside.pinned(tensor_entries(self._file(number))["batch"].read(), self.device)
