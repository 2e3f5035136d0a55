"""Tensors that hold one projection, or two, of all experts: how they lie, and each expert's matrix read alone.

    gate_up_proj  [E, 2I, H]     rows of gate, then those of up; or one of each in turn (interleaved)
    down_proj     [E, H, I]
    the same      [E, H, 2I], [E, I, H]     transposed: a matrix is `[K, N]`
    biases        [E, 2I], [E, H]

Not here: the modules that hold them (model/experts.py), which stored tensor is which (names.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

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

    def joined(self, own: Sequence[Tensor], *, transposed: bool) -> Tensor:
        """Return what the tensor of all has of one expert. own: of its projections, in their order."""
        rows = torch.stack(list(own), 1).flatten(0, 1) if self.interleaved else torch.cat(list(own))
        return rows.T if transposed else rows


class Place(NamedTuple):
    """Where an expert's matrix or bias lies: in `whole`, by the model's names; `number` is its projection's there."""

    whole: str
    fused: Fused
    expert: int
    number: int


@dataclass(frozen=True)
class Part(Entry):
    """One expert's matrix `[N, K]`, or bias `[N]`, within a stored tensor of all. name: of the tensor that holds it.

    turned: whether the file has matrices the other way round.
    """

    whole: Entry
    place: Place
    turned: bool

    @property
    def transposed(self) -> bool:
        """Whether the file has `[K, N]`."""
        return _transposed(self.whole, self.place.fused, self.turned)

    def read(self) -> Tensor:
        """Return it, contiguous. Of the file no other expert is read. Raises LlmqError as `Entry.read`."""
        _, fused, expert, number = self.place
        one, several = self.whole.read_slice(expert), len(fused.projections)
        rows = one.T if self.transposed else one
        mine = rows[number::several] if fused.interleaved else rows.chunk(several)[number]
        return mine.clone(memory_format=torch.contiguous_format)

    def read_slice(self, i: int) -> Tensor:
        """Return one row."""
        return self.read()[i]


def part_of(whole: Entry, place: Place) -> Part:
    """Return a part of a stored tensor, whose shape is the model's or that of its matrices turned (`Fused.fits`)."""
    fused = place.fused
    turned = bool(fused.fits(whole.shape))
    N, *K = reversed(whole.shape[1:]) if _transposed(whole, fused, turned) else whole.shape[1:]
    shape = (N // len(fused.projections), *K)
    size = prod(shape) * BITS[whole.dtype] // 8
    return Part(whole.file, whole.name, whole.dtype, shape, whole.start, size, whole, place, turned)


def rejoined(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those of all experts in place of their parts, by the model's names of them.

    Parts stay apart where the weight that they belong to is not among the tensors, so that it is another's, packed.
    """
    found, parts = dict[str, Tensor](), dict[str, list[tuple[Part, Tensor]]]()
    for name, tensor in tensors.items():
        entry = entries.get(name)
        if isinstance(entry, Part) and f"{name.rpartition('.')[0]}.weight" in tensors:
            parts.setdefault(entry.place.whole, []).append((entry, tensor))
        else:
            found[name] = tensor
    return found | {whole: _whole(several) for whole, several in parts.items()}


def _whole(parts: list[tuple[Part, Tensor]]) -> Tensor:
    """Return the stored tensor that these are all the parts of."""
    parts = sorted(parts, key=lambda p: (p[0].place.expert, p[0].place.number))
    part, n = parts[0][0], len(parts[0][0].place.fused.projections)
    each = [[tensor for _, tensor in parts[i : i + n]] for i in range(0, len(parts), n)]
    return torch.stack([part.place.fused.joined(own, transposed=part.transposed) for own in each])


def _transposed(whole: Entry, fused: Fused, turned: bool) -> bool:
    return len(whole.shape) == 3 and fused.transposed != turned
