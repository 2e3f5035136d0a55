"""A GGUF file while it is made: where its parts are staged, and how it is put in place.

Not here: what it holds (formats/gguf.py), its bytes (container.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Sink, disk
from llmq.gguf import container, mixture
from llmq.gguf.architecture import Architecture
from llmq.gguf.tokenizer import Vocabulary
from llmq.recipe import Recipe

REPORT = "llmq.report"


@dataclass(frozen=True)
class Blueprint:
    """A GGUF file before its tensors are written.

    types: the ggml type of every tensor that is staged, by the checkpoint's names. split: bytes of a file at most.
    """

    architecture: Architecture
    vocabulary: Vocabulary
    mix: str
    types: Mapping[str, str]
    split: int = 0


class GgufSink(Sink):
    """The parts of a GGUF file while they are made; they are staged in a folder beside OUT."""

    def check(self) -> None:
        """Raise LlmqError unless OUT can become a GGUF file, or is one that may be replaced."""
        container.check_out(self.out, overwrite=self.overwrite)

    def target(self, name: str) -> Path:
        """Return where a staged file will lie."""
        return self.out.with_name(name)

    def put(self, names: list[str]) -> None:
        """Give the files their names: each in one step, the first shard, which a reader opens, last."""
        for name in reversed(names):
            if (self.stage / name).exists():
                disk.put_file(self.stage / name, self.target(name))

    def stale(self, names: list[str]) -> list[Path]:
        """Return the old file, or its shards, that the new ones do not replace by name; the telling first one last."""
        old = [self.out, *container.shards(self.out)]
        return [p for p in reversed(old) if p.exists() and p.name not in names]

    def contents(self, plan: Blueprint) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the file by ggml's name, as it will be written."""
        return container.contents(plan.architecture, self._planned(plan))

    def write(self, plan: Blueprint, name: str, keys: Mapping[str, str | int]) -> list[Path]:
        """Write what OUT will be from the staged parts, with `keys` beside the model's own; return the staged files."""
        return container.write(self.stage, self.out, _header(plan, name, keys), self._planned(plan), plan.split)

    def _planned(self, plan: Blueprint) -> list[container.Part]:
        return [container.Part(t, plan.types[t.name]) for t in self.staged() if t.name in plan.types]


def _header(plan: Blueprint, name: str, keys: Mapping[str, str | int]) -> container.Header:
    return container.Header(plan.architecture, plan.vocabulary, name, mixture.file_type(plan.mix), keys)


def keys(recipe: Recipe) -> dict[str, str | int]:
    """Return llmq's own keys, which say how the file was made; REPORT, the record of the run, comes beside them."""
    own: dict[str, str | int] = {"llmq.version": __version__, "llmq.recipe": recipe.to_yaml()}
    return own | ({"quantize.imatrix.file": recipe.imatrix} if recipe.imatrix else {})
