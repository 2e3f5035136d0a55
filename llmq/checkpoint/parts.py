"""Tensors that hold one projection, or two, of all experts: how they lie, and each expert's matrix read alone.

    gate_up_proj  [E, 2I, H]     rows of gate, then those of up; or one of each in turn (interleaved)
    down_proj     [E, H, I]
    the same      [E, H, 2I], [E, I, H]     transposed: a matrix is `[K, N]`
    biases        [E, 2I], [E, H]

Not here: the modules that hold them (model/experts.py), which stored tensor is which (names.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llmq.guard.reading import BITS, Entry


@dataclass(frozen=True)
class Fused:
    """How a tensor holds projections of all experts.

    shape: the model's. projections: whose rows lie in it, in order. leaf: "weight" or "bias".
    """

    shape: tuple[int, ...]
    projections: tuple[str, ...]
    leaf: str
    transposed: bool = False
    interleaved: bool = False

    def names(self) -> Iterator[tuple[str, int, int]]:
        """Yield every part by its name below the experts' module, with the expert's number and its place in it."""
        for e in range(self.shape[0]):
            for place, projection in enumerate(self.projections):
                yield f"{e}.{projection}.{self.leaf}", e, place

    def fits(self, shape: tuple[int, ...]) -> bool | None:
        """Say whether a stored tensor of that shape is transposed against the model's; None where it is neither."""
        if shape == self.shape:
            return False
        return True if (*shape[:1], *shape[:0:-1]) == self.shape else None


@dataclass(frozen=True)
class Part(Entry):
    """One expert's matrix `[N, K]`, or bias `[N]`, within a stored tensor of all. name: of the tensor that holds it.

    expert: its number. place: of its projection in `fused`. turned: whether the file has matrices the other way round.
    """

    whole: Entry
    fused: Fused
    expert: int
    place: int
    turned: bool

    def read(self) -> Tensor:
        """Return it, contiguous. Of the file no other expert is read. Raises LlmqError as `Entry.read`."""
        one, several = self.whole.read_slice(self.expert), len(self.fused.projections)
        rows = one.T if _transposed(self.whole, self.fused, self.turned) else one
        mine = rows[self.place :: several] if self.fused.interleaved else rows.chunk(several)[self.place]
        return mine.clone(memory_format=torch.contiguous_format)

    def read_slice(self, i: int) -> Tensor:
        """Return one row."""
        return self.read()[i]


def part_of(whole: Entry, fused: Fused, expert: int, place: int) -> Part:
    """Return a part of a stored tensor, whose shape is the model's or that of its matrices turned (`Fused.fits`)."""
    turned = bool(fused.fits(whole.shape))
    N, *K = reversed(whole.shape[1:]) if _transposed(whole, fused, turned) else whole.shape[1:]
    shape = (N // len(fused.projections), *K)
    size = prod(shape) * BITS[whole.dtype] // 8
    return Part(whole.file, whole.name, whole.dtype, shape, whole.start, size, whole, fused, expert, place, turned)


def _transposed(whole: Entry, fused: Fused, turned: bool) -> bool:
    return len(whole.shape) == 3 and fused.transposed != turned
