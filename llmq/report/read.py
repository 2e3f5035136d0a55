"""What is known of one checkpoint: its record, its figures, its times, and its weights, which are read when asked for.

    told = read("./my-llama-int4", against="./my-llama")
    told.lines                      the record's line of each linear, told.line(name).block, .leaf, .error("output")
    told.weights.read(name)         codes and scales of one of them (weights.py)

A checkpoint of another tool has no record: what its files say is all there is, and each plot says what it lacks.
Not here: what is made of it (plots/).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.place import beside, is_gguf, recorded, user_path
from llmq.errors import LlmqError, printable
from llmq.evaluation import kept
from llmq.gguf.reader import GgufFile
from llmq.guard.reading import field as read_field
from llmq.guard.reading import number
from llmq.report import timings
from llmq.report.figures import figures
from llmq.report.timings import Timings
from llmq.report.weights import OfFolder, OfGguf, PackedLinear, Weights

_PLACE = re.compile(r"(?:.*\.)?(?:layers|blocks|h)\.(\d{1,9})\.(.+)")
KINDS = ("output", "weight")
"""The two errors of a linear (docs/record.md), the one that says more first."""


@dataclass(frozen=True)
class Line:
    """What is recorded of one linear.

    block: its number, None of what lies outside of the blocks. leaf: its name there, an expert's with a star for its
    number. said: the line of the record.
    """

    name: str
    block: int | None
    leaf: str
    said: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, said: Mapping[str, Any]) -> Line:
        """Return the line of a linear's full name."""
        found = _PLACE.fullmatch(name)
        leaf = name if found is None else re.sub(r"experts\.\d+\.", "experts.*.", found[2])
        return cls(name, None if found is None else int(found[1]), leaf, said)

    def error(self, kind: str) -> float | None:
        """Return its squared relative error, "output" or "weight"; None where it was not measured."""
        return number(self.said.get(f"{kind}_error"))

    @property
    def bits(self) -> float | None:
        """Bits of a code."""
        return number(self.said.get("bits"))

    @property
    def trouble(self) -> dict[str, str]:
        """What went wrong with its numbers, in words, by kind."""
        found = self.said.get("trouble")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Channels:
    """What is recorded of the channels of one input (docs/record.md, activations).

    site: the linears that read it, in short, `gate, up`. step: the transform that saw it, "" as it was solved. kind:
    "max", "mean" or "rms". before, after: the least, quartiles, 99 % and the largest; after is None where nothing was
    scaled. channel: the number of the largest.
    """

    block: int
    linears: tuple[str, ...]
    site: str
    step: str
    kind: str
    before: tuple[float, ...]
    after: tuple[float, ...] | None
    channel: int

    @classmethod
    def of(cls, entry: Any, where: str) -> Channels:
        """Return an entry of the record. Raises LlmqError, naming `where`, for one that is not as llmq writes it."""
        entry = read_field({where: entry}, where, dict, where)
        kind = next((k for k in ("max", "mean", "rms") if k in entry), "max")
        linears = tuple(str(n) for n in read_field(entry, "linears", list, where))
        lists = [_numbers(entry, key, where) for key in (kind, "after") if key in entry or key == kind]
        block, channel = (read_field(entry, key, int, where) for key in ("block", "channel"))
        site = ", ".join(Line.of(n, {}).leaf.rpartition(".")[2].removesuffix("_proj") for n in linears)
        return cls(
            block, linears, site, read_field(entry, "step", str, where, ""), kind, lists[0], (*lists, None)[1], channel
        )

    @property
    def above(self) -> float:
        """The largest over the median, after a fold where there was one."""
        now = self.after or self.before
        return now[5] / now[2] if now[2] > 0 else 0.0


@dataclass(frozen=True)
class Told:
    """All that is known of one checkpoint.

    label: what it is called beside others. path: its folder or file. record: of the run, empty of another tool's. size:
    bytes of its tensors. method: its format. weights: its packed linears. linear: the one whose codes are shown, None
    for the worst. evaluations: figures that `llmq eval --keep` kept. timings: None where none were kept.
    """

    label: str
    path: Path
    record: Mapping[str, Any]
    size: int
    method: str
    weights: Weights
    linear: str | None = None
    evaluations: Sequence[Mapping[str, Any]] = ()
    timings: Timings | None = None

    @cached_property
    def lines(self) -> list[Line]:
        """The record's lines of the linears, in the order of the model."""
        found = self.of("linears", dict, {})
        return [Line.of(n, read_field(found, n, dict, f"the record of {self.path}")) for n in found]

    @cached_property
    def channels(self) -> list[Channels]:
        """What is recorded of the channels of activations."""
        where = f"activations in the record of {self.path}"
        return [Channels.of(entry, where) for entry in self.of("activations", list, [])]

    @cached_property
    def kind(self) -> str:
        """Which error of the linears is shown where one is: of outputs where any was measured."""
        return next((k for k in KINDS if any(line.error(k) is not None for line in self.lines)), KINDS[-1])

    @property
    def figures(self) -> Mapping[str, Any]:
        """The evaluation that is shown where one is: the first against a float model, else the first."""
        against = [e for e in self.evaluations if e.get("kl_mean") is not None]
        return (*against, *self.evaluations, {})[0]

    @property
    def steps(self) -> str:
        """The method, step by step, or the quality that stands for it."""
        recipe = self.of("recipe", dict, {})
        return str(recipe.get("method") or recipe.get("quality") or "")

    def of(self, key: str, kind: type, default: Any) -> Any:
        """Return what the record has under a key. Raises LlmqError where that is of another type."""
        return read_field(self.record, key, kind, f"the record of {self.path}", default)

    def sized(self, key: str) -> float:
        """Return a number of the record's `size`, 0 where it is not there."""
        said = self.of("size", dict, {}).get(key)
        if (found := number(0 if said is None else said)) is None:
            raise LlmqError(f"the record of {self.path}: {key} is {printable(repr(said), 80)}, no number")
        return found

    def mean(self, kind: str) -> float | None:
        """Return the mean error of the linears, None where none was measured."""
        known = [e for line in self.lines if (e := line.error(kind)) is not None]
        return sum(known) / len(known) if known else None

    def worst(self, count: int) -> list[Line]:
        """Return the linears with the largest errors."""
        known = [line for line in self.lines if line.error(self.kind) is not None]
        return sorted(known, key=lambda line: -(line.error(self.kind) or 0.0))[:count]

    def chosen(self) -> PackedLinear:
        """Return the linear whose codes are shown, read. Raises LlmqError where it cannot be."""
        return self._chosen

    @cached_property
    def _chosen(self) -> PackedLinear:
        there = self.weights.names()
        if not there:
            raise LlmqError(f"{self.path} holds no packed linear.")
        worst = [line.name for line in self.worst(len(self.lines)) if line.name in there]
        return self.weights.read(self.linear or (*worst, *there)[0])


def read(
    out: str | Path,
    label: str,
    *,
    linear: str | None = None,
    against: str | Path | None = None,
    adapter: str | Path | None = None,
) -> Told:
    """Return what is known of a checkpoint: a folder, `org/name`, or a GGUF file.

    linear: the one whose codes are shown. against: the float checkpoint that it was made from, whose weights are then
        read beside its own; adapter: what was added to those.
    Raises LlmqError where there is no such checkpoint, what lies there is broken, or it has no such linear.
    """
    added = None if adapter is None else resolve(str(adapter))
    source = None if against is None else Source(resolve(str(against)), added)
    path = user_path(out)
    weights: Weights
    if is_gguf(out):
        record, method = GgufFile(path).report(), "gguf"
        file = OfGguf(path, source, record)
        size, weights = file.size(), file
    else:
        own = Source(resolve(str(out)))
        path, size, method = own.path, own.bytes(), str((own.quantization or {}).get("quant_method", "float"))
        record = recorded(path) or {}
        weights = OfFolder(own, source, record)
    if linear is not None and linear not in (there := weights.names()):
        near = difflib.get_close_matches(linear, there, n=1, cutoff=0.0)
        raise LlmqError(
            f"{out} has no packed linear {linear!r}; did you mean {near[0] if near else 'another checkpoint'}?"
        )
    took = timings.read(beside(path, timings.FILE))
    return Told(label, path, record, size, method, weights, linear, [figures(e) for e in kept.read(path)], took)


def _numbers(entry: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    """Return a list of six numbers of an entry."""
    found = read_field(entry, key, list, where)
    numbers = tuple(x for v in found if (x := number(v)) is not None)
    if not len(found) == len(numbers) == 6:
        raise LlmqError(f"{where}: {key} is no list of six numbers")
    return numbers


def alike(told: Sequence[Told]) -> list[Told]:
    """Return several checkpoints with one linear chosen for all: the worst of the first that all have packed."""
    try:
        there = [set(one.weights.names()) for one in told[1:]]
    except LlmqError:  # whose plots say why
        return list(told)
    common = [line.name for line in told[0].worst(len(told[0].lines)) if all(line.name in names for names in there)]
    return [replace(one, linear=common[0]) for one in told] if there and common else list(told)


def labels(outs: Sequence[str | Path]) -> list[str]:
    """Return what to call checkpoints: the last part of each path, with as much before it as tells them apart.

    Example: `a/int4` and `b/int4` are called so; `out/q4` and `out/q8` are `q4` and `q8`.
    """
    parts = [str(out).rstrip("/").split("/") for out in outs]
    for depth in range(1, max(map(len, parts)) + 1):
        named = ["/".join(p[-depth:]) for p in parts]
        if len(set(named)) == len(named):
            return named
    return [f"{named} ({i + 1})" for i, named in enumerate(map(str, outs))]
