"""A forward through a model of which one block at a time is in memory: all batches pass it before the next is read.

    forward = Forward(skeleton, [ids], device)
    for i in range(len(skeleton)):
        forward.step(i)                      # forward.hidden is what the batches are behind block i
    with outside_loaded(skeleton, device, head=True):
        logits(skeleton, forward.hidden[0])

Not here: a block that is quantized meanwhile (lanes.py), gradients (calibration/token_gradients.py).
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.batches import Batches
from llmq.model.ends import entering
from llmq.model.experts import Passing
from llmq.model.lanes import Call, run
from llmq.model.skeleton import Skeleton

Keep = Callable[[Iterable[Tensor]], Sequence[Tensor]]
"""Where hidden states wait between two blocks: takes them as they come."""


class Forward:
    """Batches of tokens, int64 `[B, S]` each, on their way through a model that is loaded block by block.

    hidden: what they are behind the last block that they passed, `[B, S, H]`, a list or what else `keep` makes of them.
    experts: whether those of a block are in memory together, or each is read where a batch comes to it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Iterable[Tensor],
        device: torch.device,
        keep: Keep = list,
        *,
        experts: bool = True,
    ) -> None:
        self.skeleton, self._device, self._keep, self._experts = skeleton, device, keep, experts
        self._calls: list[Sequence[Call]] = []
        self._reads = skeleton.reads(range(len(skeleton)), device, experts=experts)
        with torch.no_grad():
            self.hidden = keep(self._entering(batches))

    def _entering(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for hidden, calls in entering(self.skeleton, batches, self._device):
            self._calls.append(calls)
            yield hidden

    def step(self, i: int) -> None:
        """Move all batches past block `i`, the one behind the last that they passed."""
        read = partial(self.skeleton.tensor, i, device=self._device)
        loaded = self.skeleton.loaded(i, self._device, experts=self._experts, read=next(self._reads))
        with loaded as block, Passing(block, read), torch.no_grad():
            calls = (c[i] for c in self._calls)
            self.hidden = self._keep(run(block, h, c) for h, c in zip(self.hidden, calls, strict=True))


class Files:
    """Keeps hidden states in files of a folder: those before a block until those behind it are written.

    Raises LlmqError where the disk is full.
    """

    def __init__(self, folder: Path, count: int, device: torch.device) -> None:
        self._next = Batches(folder / "00000", "hidden", range(count), device)
        self._held: Batches | None = None

    def __call__(self, batches: Iterable[Tensor]) -> Batches:
        """Write the batches, and forget those before."""
        before = self._held
        self._held = self._next.filled(batches) if before is None else before.moved(batches)
        if before is not None:
            shutil.rmtree(before.folder)
        return self._held
