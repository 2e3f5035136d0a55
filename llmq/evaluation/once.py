"""A baseline whose states are run once, for however many models are measured against it.

The states of every window wait in files of a folder; what made them, the blocks, is then let go, and the head alone is
kept, which makes logits of them for each model anew.
Not here: the measuring (several.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.batches import Batches
from llmq.evaluation.tokens import Predicts


class Once:
    """What predicts, run at the first of equal calls of `each`; see `Predicts`. room: an empty folder for the states.

    Raises LlmqError where the disk is full.
    """

    def __init__(self, of: Predicts, room: Path) -> None:
        self._of, self._room = of, room
        self._held: Batches | None = None
        self.model, self.name, self.vocab, self.kv_bits = of.model, of.name, of.vocab, of.kv_bits
        self._device = _device(of.model)

    def each(self, windows: Sequence[list[int]]) -> Iterator[Tensor]:
        """Yield the states of each window."""
        if self._held is None:
            held = Batches(self._room / "00000", "states", range(len(windows)), self._device)
            self._held = held.filled(self._of.each(windows))
            self._of.rest()
            self.model = None
        with self._of.ready():
            yield from self._held

    def log_probs(self, states: Tensor) -> Tensor:
        """See `Predicts.log_probs`."""
        return self._of.log_probs(states)

    def ready(self) -> AbstractContextManager[None]:
        """See `Predicts.ready`."""
        return self._of.ready()

    def rest(self) -> None:
        """See `Predicts.rest`; it rests already."""


def _device(model: Any) -> torch.device:
    """Return where the states of a model are; one that is streamed lies on no device itself."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device
