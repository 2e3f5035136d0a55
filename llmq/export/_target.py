"""What an export is asked: a target is one file of this folder, with one public dataclass whose fields are its options.

    llmq export IN OUT --to gguf:Q4_0:embeddings=Q6_K      llmq/export/gguf.py: Gguf(type="Q4_0", embeddings="Q6_K")

    target.open(src, requantize)     the checkpoint, its headers read and checked
    target.check(opened)             refuses, before any work, what the target cannot hold; returns warnings
    target.write(opened, out, step)  stages the tensors and closes OUT around them; returns what is recorded
    target.verify(out)               reads again what was staged, by code of its own

A target of packed codes derives from `OfCodes`, which opens the checkpoint as `Packed`; there a linear is a `QTensor`
(types.py), whatever format it lay in, and is read when it is asked for.
Not here: the run around them (_run.py), any target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from llmq import extras, registry
from llmq.checkpoint import Sink, Source, resolve
from llmq.checkpoint.decoding import decoded_on_load
from llmq.checkpoint.hub_metadata import NO_CARD, SourceCard, source_card
from llmq.checkpoint.packed import PackedCheckpoint, PackedWeights, Packing
from llmq.checkpoint.place import is_gguf, recorded, user_path
from llmq.errors import LlmqError
from llmq.export._integers import OfIntegers
from llmq.model.pretrained import blank_model, model_config, tokenizer_of
from llmq.progress import Progress
from llmq.types import LinearSpec, Params, QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT, REQUANTIZED = "values exact", "requantized"
"""What became of a linear, in words that a table counts; a target has more of its own."""


@dataclass
class Opened:
    """A checkpoint that is open for export. warnings: what a user should know of it. card: what its model card says."""

    source: Source
    warnings: list[str] = field(default_factory=list)
    card: SourceCard = NO_CARD


@dataclass
class Packed(Opened):
    """A checkpoint of packed linears, all of it known from headers; weights are read when they are asked for.

    config: transformers' config, which says whether the head is tied. packed: its linears as QTensors, and its floats.
    skipped: the model's linears that are float.
    requantize: what a linear whose codes cannot be kept is rounded to anew, as the user wrote it; None refuses it.
    made: llmq's own record of how the codes were found (quantization.json), None of a peer's checkpoint.
    """

    config: Any = None
    packed: PackedWeights = field(kw_only=True)
    skipped: list[str] = field(default_factory=list)
    requantize: str | None = None
    made: dict[str, Any] | None = None

    @property
    def linears(self) -> list[LinearSpec]:
        """The packed linears, in the order of the model: shape, grid and activation of each."""
        return list(self.packed.linears.values())

    @property
    def method(self) -> str:
        """The format that the checkpoint is in."""
        return str((self.source.quantization or {})["quant_method"])

    @property
    def folder(self) -> Path:
        """Where tokenizer, chat templates and generation settings lie."""
        return self.source.path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises LlmqError, one line, where there is none."""
        return tokenizer_of(self.folder)

    def stored(self) -> Source:
        """Return the tensors by the names under which they lie there, where a copy keeps them."""
        return Source(self.source.path)

    def weights(self, step: Progress) -> Iterator[tuple[str, QTensor | Tensor]]:
        """Yield every linear (a QTensor) and every float tensor by its name in a float checkpoint, block by block."""
        names = [*self.packed.names()]
        for i, (name, found) in enumerate(self.packed):
            step(i, len(names), name)
            yield name, found
        step(len(names), len(names), "writing")


OpenedT = TypeVar("OpenedT", bound=Opened)


class Target(ABC, Generic[OpenedT]):
    """What a checkpoint is exported to.

    bare: the option that a first value without a name is for: `gguf:Q4_0` is `gguf:type=Q4_0`.
    packages: what it needs beside llmq, which comes with `extra` of llmq-quant. sink: the class of OUT while it is
    made. suffix: that of OUT, "" where OUT is a folder.
    """

    bare: ClassVar[str | None] = None
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    sink: ClassVar[type[Sink]] = Sink
    suffix: ClassVar[str] = ""

    def said(self) -> str:
        """Return the text that names this target with its options."""
        return registry.dump(self)

    def with_options(self, given: Mapping[str, str], said: str) -> Self:
        """Return the target with the options beside it on the command line; `said` is the text that named it."""
        return registry.filled(self, given, said)

    def require(self) -> None:
        """Raise LlmqError, with the command that installs it, where a package that the target needs is missing."""
        extras.require(self.packages, self.extra, f"--to {self.extra} is written")

    @abstractmethod
    def open(self, src: str, requantize: str | None) -> OpenedT:
        """Return SRC, its headers read. Raises LlmqError for what this target is not made of."""

    @abstractmethod
    def check(self, opened: OpenedT) -> list[str]:
        """Raise LlmqError, before any work, for what the target cannot hold; return what a user should know."""

    @abstractmethod
    def write(self, opened: OpenedT, out: Sink, step: Progress) -> dict[str, Any]:
        """Stage OUT, whole but for its place. Returns what the run says: bytes, outcomes by number, warnings, files.

        Raises LlmqError for a linear whose codes cannot be kept, with the reason and the remedy.
        """

    @abstractmethod
    def verify(self, out: Sink) -> None:
        """Raise LlmqError unless what was staged is right."""

    def seen(self, source: Source) -> Any:
        """Return what tells that the checkpoint is the one that an unfinished run began with."""
        from llmq.checkpoint.stage import fingerprint, look

        return look(source.path) if source.path.is_file() else fingerprint(source.path)


class OfCodes(Target[Packed]):
    """A target that keeps codes.

    falls: whether it holds negative scales, which half the groups of a searched symmetric grid have; one that does not,
    or has not been seen to, refuses them by name before any work. runtime: what reads it, for that message. scales: the
    dtype of those that it holds, None for any.
    """

    falls: ClassVar[bool] = True
    scales: ClassVar[str | None] = None
    runtime: ClassVar[str] = ""

    def open(self, src: str, requantize: str | None) -> Packed:
        """Return a checkpoint of GPTQ, AWQ, compressed-tensors ..., ours or a peer's, as its linears' codes.

        Raises LlmqError for a float checkpoint and for one that llmq does not read.
        """
        return open_packed(src, requantize)

    def foresee(self, opened: Packed) -> list[str]:
        """Do as `check` for linears that are planned and not solved yet: grids and groups are known, no values."""
        return self.check(opened)

    def refuse_falling(self, opened: Packed, linears: Sequence[str] | None = None) -> None:
        """Raise LlmqError for the first linear with negative scales, unless this target holds them.

        linears: those to look at, all where None.
        """
        if self.falls:
            return
        for name in opened.packed.linears if linears is None else linears:
            params = opened.packed.qtensor(name).params
            if isinstance(params, Params) and (n := int((params.scale < 0).sum())):
                raise LlmqError(
                    f"{name}: {n:,} of {params.scale.numel():,} scales are negative, which {self.runtime} does not "
                    "hold: quantize the float model again with --range mse:shift=false, whose scales are positive"
                )


def open_packed(src: str, requantize: str | None = None, *, minima: bool = False) -> Packed:
    """Return a quantized checkpoint, its headers read and checked: a folder, `org/name[@REVISION]` or a GGUF file.

    minima: whether the target takes minima that are floats of their own (MLX, Q4_1) as they are; else they are zeros,
    or refused where they are none.
    """
    if is_gguf(src):
        from llmq.export._gguf_codes import open_gguf_codes

        opened = open_gguf_codes(user_path(src), requantize)
        return opened if minima else replace(opened, packed=OfIntegers(opened.packed))
    source = _packed_source(src)
    config: Any = model_config(source)
    model = blank_model(source, config)
    packed = PackedCheckpoint.open(source, model)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed.linears]
    card, told = source_card(source.path)
    about = Opened(source, [*source.warnings, *told], card)
    held = packed if minima else OfIntegers(packed)
    return Packed(
        **vars(about), config=config, packed=held, skipped=skipped, requantize=requantize, made=recorded(source.path)
    )


def _packed_source(src: str) -> Source:
    source = Source(resolve(src))
    if source.quantization is None:
        raise LlmqError(f"{src} is a float checkpoint; write it with llmq quantize {src} OUT --format FORMAT")
    if decoded_on_load(source.quantization):
        raise LlmqError(
            f"{src} holds narrow floats ({source.quantization['quant_method']}), whose codes no target keeps; "
            f"decode and round them: llmq quantize {src} OUT --format FORMAT, or llmq export {src} OUT --to float"
        )
    Packing(source.quantization)  # refuses in one line what llmq does not read
    return source


def refuse_rounding(requantize: str | None, to: str, through: str) -> None:
    """Raise LlmqError for a rounding that a target does not do, with the way by a format that does."""
    if requantize is not None:
        raise LlmqError(
            f"--to {to} rounds no linear anew; do that on the way: llmq export IN MID --to {through} --requantize "
            f"{requantize}, then llmq export MID OUT --to {to}"
        )


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor. Raises LlmqError where it is float and holds NaN or Inf."""
    if tensor.is_floating_point() and tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LlmqError(
            f"tensor {name} holds NaN or Inf in {kind}; the checkpoint is damaged, or its values are beyond {kind}: "
            "--dtype bfloat16 and float32 reach further than float16"
        )
    return tensor


def stage(out: Sink, tensors: Iterable[tuple[str, Tensor]], at_once: int) -> None:
    """Stage tensors, some bytes of them at a time."""
    part, size = dict[str, Tensor](), 0
    for name, tensor in tensors:
        part[name] = tensor
        size += tensor.nbytes
        if size >= at_once:
            out.add(part)
            part, size = {}, 0
    if part:
        out.add(part)
