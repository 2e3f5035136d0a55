"""What a format is asked, and what it answers: which matrices become what, and how codes become named tensors.

    form.assign(model, wanted) -> Assignment     what every matrix of a model becomes, before any work
    form.check(linears)                          refuses what the format cannot hold, warns of what readers do not take
    form.pack(q, linear) -> {"qweight": ...}     the words of one linear;  form.unpack goes back
    assignment.join(out, ...), .close(out, ...)  what makes of them a checkpoint that loads

Not here: the formats (formats/), how OUT is written (checkpoint/sink.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmq.guard.patterns import Pattern
from llmq.guard.reading import Entry
from llmq.readers import Reader
from llmq.types import LinearSpec, QTensor, Scheme


@dataclass(frozen=True)
class FloatModel:
    """A float model as formats see it before any work.

    name: what it is called. folder: where it lies. saved: its config.json. config: transformers' config of it.
    tokenizer: loads transformers' tokenizer. shapes: of every tensor that the model reads. linears: the modules of its
    blocks that hold a matrix. head: the output head, which has no tensor of its own where it is tied to the embedding.
    embedding: of the input tokens. written: gives the name by which runtimes look for a tensor.
    carried: tensors that the model does not read.
    """

    name: str
    folder: Path
    saved: Mapping[str, object]
    config: object
    tokenizer: Callable[[], object]
    shapes: Mapping[str, Sequence[int]]
    linears: Sequence[str]
    head: str
    embedding: str
    written: Callable[[str], str]
    carried: Sequence[str] = ()


@dataclass(frozen=True)
class Wanted:
    """What a recipe wants of any model, for a format to say what that means for one.

    schemes: what its base scheme, overrides and skips make of linears; those that stay float are left out. Raises
        LlmqError for an override or a skip that matches none.
    override, skip: as they were written, and compiled, for a format that names tensors in another way.
    head: whether the output head is asked for. weighs: whether the method weighs errors by activations.
    leaves: whether linears whose shape the format cannot hold stay float, rather than being refused.
    embedding: what the embedding becomes, and a head of its own that is not asked for; None leaves both to the format.
    """

    schemes: Callable[[Sequence[str]], dict[str, Scheme]]
    override: Sequence[str]
    skip: Sequence[Pattern]
    head: bool
    weighs: bool
    leaves: bool = False
    embedding: Scheme | None = None


class Out(Protocol):
    """OUT while it is made, as formats see it; checkpoint/sink.py says more.

    out: where it will lie. stage: the folder of its files so far. digests: the checksum of every tensor by its name.
    """

    out: Path
    stage: Path
    digests: dict[str, str]

    def text(self, name: str, content: str) -> None:
        """Write a text file."""

    def json(self, name: str, values: Mapping[str, object]) -> None:
        """Write a JSON file."""

    def copy_files(self, source: Path) -> None:
        """Copy what lies beside the weights of a checkpoint."""

    def staged(self) -> list[Entry]:
        """Return where each tensor lies that was staged."""

    def join(self) -> int:
        """Join what was staged into shards. Returns the bytes of all tensors."""

    def files(self) -> list[Path]:
        """Return the files that OUT will hold."""


@dataclass(frozen=True, kw_only=True)
class Assignment(ABC):
    """What becomes of every matrix of a model, decided before any work; and how OUT is closed around them.

    schemes: by the full name of the module; a matrix that is not named stays float.
    importance: what the squared error of each input channel counts, `[K]`, by module, where the user gave it.
    names: what OUT calls a tensor, where that is not the model's name.
    """

    schemes: Mapping[str, Scheme]
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def staged(self, name: str) -> str:
        """Return what a tensor of the model is called where it is staged."""
        return name

    def float_bytes(self, name: str, shape: Sequence[int], nbytes: int) -> int:
        """Return the bytes that OUT has of a tensor of the model that stays float; 0 for one that it leaves out.

        nbytes: those of the model.
        """
        return nbytes

    def more_bytes(self) -> int:
        """Return the bytes of tensors of OUT that no checkpoint holds."""
        return 0

    def channels(self, name: str, vector: Tensor) -> Tensor:
        """Return a value for each input channel of a linear, `[K]`, in the order that OUT has them in."""
        return vector

    def tensor(self, name: str) -> str | None:
        """Return the tensor of OUT that a linear lies in, where all that lie in one are alike and overrides name it."""
        return None

    def possible(self, linear: LinearSpec) -> dict[str, LinearSpec | None]:
        """Return what a linear may become under a budget of bits, by what an override says, None for float.

        Nothing where that is what the recipe says of any linear.
        """
        return {}

    @abstractmethod
    def join(self, out: Out, config: Mapping[str, object], recipe: str) -> int:
        """Write what makes of the staged tensors a model that loads. Returns the bytes of all tensors.

        config: the format's `quantization_config`. recipe: what repeats the run, as YAML.
        `out.digests` are then those of the tensors as OUT has them.
        """

    @abstractmethod
    def close(self, out: Out, record: dict[str, object], recipe: str, readers: Sequence[Reader]) -> dict[str, object]:
        """Write the record of the run, which seals the rest. Returns it with what is now known of the files.

        readers: which runtimes take what was written.
        """


class Format(Protocol):
    """Bits on disk, pure per linear. A dataclass whose fields are the options of the format.

    quant_method: the name in `quantization_config`. sink: the class of OUT while it is made, `checkpoint.Sink` or one
    derived from it.
    """

    quant_method: str
    sink: ClassVar[type]

    @property
    def derived(self) -> frozenset[str]:
        """Local names of tensors that follow from the config and the rest, so that a peer's file may lack them."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which this format stores scales; the grid is fitted in it."""

    def assign(self, model: FloatModel, wanted: Wanted) -> Assignment:
        """Return what every matrix becomes under a recipe. Raises LlmqError for what the model does not admit."""

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Before writing: refuse, by LlmqError, what the format cannot hold; return warnings about runtimes.

        skipped: the linears of the model that stay float.
        """

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """Return which runtimes take these linears, and why not: what `check` warns of, and what none need know."""

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear by their local names, without its bias."""

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor when one is missing or has a wrong shape."""

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return meta tensors of the names, shapes and dtypes that `pack` gives; files may hold other float widths."""

    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a matrix whose rows were packed in several parts, one above the other."""

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, object]:
        """Return the `quantization_config`; `skipped` are the linears of the model that stay float."""

    def embedding(self, name: str) -> Scheme | None:
        """Return what the config that was read makes of an embedding, None where it is float."""

    @classmethod
    def read(cls, config: Mapping[str, object]) -> tuple[Format, Callable[[str], Scheme | None]]:
        """Return the format of a `quantization_config` and `scheme(name)`, None for a module that is float."""


def packed_bytes(form: Format, linear: LinearSpec) -> int:
    """Return the bytes of a linear's tensors on disk, its bias apart."""
    return sum(prod(t.shape) * t.element_size() for t in form.layout(linear).values())
