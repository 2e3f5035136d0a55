"""How far the matrices of two checkpoints are from one another, of any two formats that llmq reads.

    error     |A - B|^2 / |B|^2       B: the baseline, float or quantized itself
    decibels  -10 log10(error)        the signal-to-noise ratio: 6 dB a bit
    largest   max |A - B|

Weights are compared as a runtime decodes them, one matrix at a time. Where A's record says that the float weights were
rotated or scaled before they were rounded, the same is done to B's: what is left is the rounding. A peer's checkpoint
has no record: of one that was scaled so (AWQ, SmoothQuant) the scaling counts as error.
Not here: whether the files are right (verify/), what the error does to the model's answers (evaluation/).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint import Source
from llmq.checkpoint.packed import natural
from llmq.checkpoint.place import is_gguf, recorded, user_path
from llmq.export._decoded import decoded
from llmq.export._from_gguf import Floats
from llmq.gguf.reader import GgufFile
from llmq.model.folding import Folded, floats_of
from llmq.progress import Progress
from llmq.types import LlmqError
from llmq.verify.against import error_of

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(.+)\.weight$")


@dataclass(frozen=True)
class Distance:
    """How far one matrix is from the baseline's, of the same name. block: its number, None of what lies in none."""

    name: str
    shape: list[int]
    error: float
    largest: float

    @property
    def decibels(self) -> float:
        """The signal-to-noise ratio; infinite of equal matrices."""
        return -10 * math.log10(self.error) if self.error > 0 else math.inf

    @property
    def block(self) -> int | None:
        """The number of its block, None of what lies in none."""
        found = _BLOCK.search(self.name)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """Its name within a block."""
        found = _BLOCK.search(self.name)
        return found[2] if found else self.name.removesuffix(".weight")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `json.dumps` takes them; `decibels` None where it is infinite."""
        return asdict(self) | {"decibels": self.decibels if self.error > 0 else None}


@dataclass(frozen=True)
class Distances:
    """All matrices of two checkpoints, in the order of their names.

    only_a, only_b: matrices that one of them alone has. misshapen: of the same name and other shapes.
    as_recorded: whether B was rotated and scaled as A's record says.
    """

    a: str
    b: str
    found: list[Distance]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    as_recorded: bool = False

    def worst(self) -> list[Distance]:
        """Return the matrices, those furthest off first."""
        return sorted(self.found, key=lambda d: -d.error)

    def by(self, key: str) -> dict[Any, list[Distance]]:
        """Return the matrices by `block` or `kind`."""
        groups: dict[Any, list[Distance]] = {}
        for d in self.found:
            groups.setdefault(getattr(d, key), []).append(d)
        return groups

    def to_json(self) -> dict[str, Any]:
        """Return all of it as `json.dumps` takes it."""
        return {**asdict(self), "found": [d.to_json() for d in self.found]}


def distances(a: str, b: str, progress: Progress | None = None) -> Distances:
    """Return how far the matrices of checkpoint `a` are from those of `b`, the baseline.

    a, b: folders, Hub ids or GGUF files. progress: called with matrices done, how many there are, and a name.
    Raises LlmqError for what llmq does not read, for a matrix that is not finite, and where no name is in both.
    """
    of_a, of_b = decoded(a, torch.float32), decoded(b, torch.float32)
    in_a, in_b = _matrices(of_a), _matrices(of_b)
    shared = [n for n in in_a if n in in_b]
    if not shared:
        raise LlmqError(f"{a} and {b} have no matrix of the same name; they are of different models")
    recorded = _record(a)
    truth = _truth(of_b, recorded)
    found, misshapen = list[Distance](), list[str]()
    for i, name in enumerate(shared):
        if progress:
            progress(i, len(shared), name)
        A, B = of_a.get(name), truth.get(name)
        if A.shape != B.shape:
            misshapen.append(f"{name} is {list(A.shape)} in {a}, {list(B.shape)} in {b}")
        else:
            found.append(_distance(name, A, B))
    return Distances(
        a, b, found, [n for n in in_a if n not in in_b], [n for n in in_b if n not in in_a], misshapen,
        as_recorded=isinstance(truth, Folded),
    )  # fmt: skip


def _matrices(source: Source) -> list[str]:
    """Return the names of all matrices, of many experts in one tensor too, in the order of blocks."""
    shapes = source.shapes() if isinstance(source, Floats) else {n: s for n, (_, s) in source.headers().items()}
    return sorted((n for n, shape in shapes.items() if len(shape) > 1 and min(shape) > 1), key=natural)


def _record(name: str) -> Mapping[str, Any]:
    """Return llmq's record of a checkpoint, empty where there is none."""
    if is_gguf(name):
        return GgufFile(user_path(name)).report()
    return recorded(user_path(name)) or {}


def _truth(of: Source, recorded: Mapping[str, Any]) -> Source | Folded:
    """Return the baseline as it was when it was rounded, where it is float and a record says what was done to it."""
    if not recorded.get("transforms") or of.decoded:
        return of
    return floats_of(of, recorded, recorded.get("linears", {}).keys(), "the record")


def _distance(name: str, a: Tensor, b: Tensor) -> Distance:
    A, B = a.float(), b.float()
    error = error_of(A, B)
    if not math.isfinite(error):
        raise LlmqError(f"{name} holds NaN or infinite values in one of the two; `llmq verify` tells which")
    return Distance(name, list(a.shape), error, float((A - B).abs().max()))


def lines(found: Distances) -> Iterator[str]:
    """Yield in words what is not in the table of matrices."""
    for where, names in ((found.a, found.only_a), (found.b, found.only_b)):
        if names:
            few = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"in {where} alone: {few}"
    yield from found.misshapen
    if found.as_recorded:
        yield f"{found.b} was rotated and scaled as the record of {found.a} says, so that rounding alone is compared"
