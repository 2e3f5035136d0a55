"""Folds: a scale for each channel moved from what produces an activation into the linears that read it.

    x -> x / s  in the producer,   W[:, j] -> W[:, j] * s_j  in its readers:   W x stays what it was

A norm absorbs 1 / s in its gain, a linear in its rows and bias. Where the producer is the value projection of
grouped-query attention, each of its rows feeds one channel of several heads, and these channels share one scale. A
gain is rounded to the dtype that it is stored in first and the readers take the ratio that results, so that the
rounding cancels; channels whose gain is or becomes 0 keep scale 1.

`fold` makes a fold in a block while it is quantized, and again wherever the float weights as they stood before rounding
are wanted: a `Fold` is written to `quantization.json`, and `floats_of` repeats it on the checkpoint.
Not here: what chooses the scales (algorithms/), the other transform of a checkpoint's weights (rotated.py).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq import registry
from llmq.checkpoint import Source
from llmq.errors import LlmqError, one_line, printable
from llmq.guard.reading import field
from llmq.model.rotated import Rotated
from llmq.model.skeleton import Skeleton
from llmq.steps import Rotation

Stored = Callable[[str], torch.dtype]
"""Gives the dtype that a tensor of the checkpoint is stored in, by its name."""


@dataclass(frozen=True)
class Fold:
    """One fold, by the full names of its modules.

    step: the transform that chose it, as a recipe writes it. block: its number. head_dim: channels of one head.
    scale: float32 `[K]`, by which the linears' columns are multiplied.
    """

    step: str
    block: int
    linears: tuple[str, ...]
    producer: str
    head_dim: int
    scale: Tensor

    def names(self) -> list[str]:
        """Return the tensors that it may change."""
        return [f"{self.producer}.weight", f"{self.producer}.bias", *(f"{n}.weight" for n in self.linears)]

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether it can be made in tensors of these shapes."""
        K = len(self.scale)
        N, *rest = shapes.get(f"{self.producer}.weight") or [0]
        shared = N == K or (len(rest) == 1 and N > 0 and K % N == 0 and self.head_dim > 0 and N % self.head_dim == 0)
        readers = [list(shapes.get(f"{n}.weight", [])) for n in self.linears]
        return len(rest) < 2 and shared and all(len(shape) == 2 and shape[1] == K for shape in readers)

    def to_json(self) -> dict[str, Any]:
        """Return its entry in `quantization.json`: the scales are little-endian float32 in base64."""
        text = base64.b64encode(self.scale.detach().cpu().numpy().astype("<f4").tobytes()).decode()
        facts = {"step": self.step, "block": self.block, "linears": list(self.linears), "producer": self.producer}
        return facts | {"head_dim": self.head_dim, "scale": text}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], where: str) -> Fold:
        """Return the fold of an entry. Raises LlmqError, naming `where`, for one that is not as `to_json` writes it."""
        step, producer, text = (field(entry, key, str, where) for key in ("step", "producer", "scale"))
        block, head_dim = (field(entry, key, int, where) for key in ("block", "head_dim"))
        linears = tuple(str(n) for n in field(entry, "linears", list, where))
        try:
            scale = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
        except ValueError as e:
            raise LlmqError(f"{where}: the scales of {printable(producer, 80)} do not read ({one_line(e)})") from e
        return cls(step, block, linears, producer, head_dim, scale)


def fold(weights: Mapping[str, Tensor], by: Fold, stored: Stored) -> None:
    """Make a fold in float32 tensors, by their full names, in place."""
    name = f"{by.producer}.weight"
    producer, bias = weights[name], weights.get(f"{by.producer}.bias")
    scale_K = by.scale.to(producer.device)
    if producer.dim() == 2:
        N, K = len(producer), len(scale_K)
        rows_N = scale_K if N == K else scale_K.reshape(-1, K // N, by.head_dim)[:, 0].reshape(-1)
        producer.div_(rows_N[:, None])
    else:
        gain = (producer / scale_K).to(stored(name)).to(producer.dtype)
        keep = (gain == 0) | ~torch.isfinite(gain)
        gain = torch.where(keep, producer, gain)
        rows_N = scale_K = torch.where(keep, torch.ones_like(scale_K), producer / gain)
        producer.copy_(gain)
    if bias is not None:
        bias.div_(rows_N)
    for linear in by.linears:
        weights[f"{linear}.weight"].mul_(scale_K)


def floats_of(source: Source, record: Mapping[str, Any], quantized: Container[str], where: str) -> Folded:
    """Return the tensors that were rounded and written, from the float checkpoint, as a record says; see `Folded`.

    A record without transforms says that there were none. Raises LlmqError, naming `where`, for one that is not as llmq
    writes it.
    """
    folds, shapes = [], {name: shape for name, (_, shape) in source.headers().items()}
    for i, entry in enumerate(field(record, "transforms", list, where, [])):
        here = f"{where}, transforms[{i}]"
        if not isinstance(entry, dict):
            raise LlmqError(f"{here} is no object")
        if "scale" in entry:
            folds.append(Fold.from_json(entry, here))
            if not folds[-1].fits(shapes):
                raise LlmqError(f"{here} names other modules, or scales of another number, than {source.path} has")
        else:
            rotation = _rotation(field(entry, "step", str, here), here)
            source = Rotated(Skeleton(source, torch.float32), rotation)
    return Folded(source, folds, quantized)


def _rotation(text: str, where: str) -> Any:
    if text.partition(":")[0] in registry.names("algorithms"):  # a file's word imports nothing else
        step = registry.load("algorithms", text)
        if isinstance(step, Rotation):
            return step
    raise LlmqError(f"{where}: {printable(text, 80)} is no rotation of llmq's own, and cannot be repeated")


class Folded:
    """A checkpoint's tensors as they stood before rounding: the folds made, what stays float as it is stored.

    source: the checkpoint, in another basis where it was rotated. quantized: the linears that were rounded, by name.
    The weights that the folds of one block change are in memory at a time.
    """

    def __init__(self, source: Source, folds: Sequence[Fold], quantized: Container[str]) -> None:
        self.source, self.quantized = source, quantized
        self._folds: dict[int, list[Fold]] = {}
        for f in folds:
            self._folds.setdefault(f.block, []).append(f)
        self._block = {name: f.block for f in folds for name in f.names()}
        self._at: int | None = None
        self._weights: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """Return a tensor: float32 where it was rounded, else in the dtype that it is stored in."""
        block = self._block.get(name)
        if block is None:
            tensor = self.source.get(name)
        else:
            if block != self._at:
                self._at, self._weights = block, self._of_block(self._folds[block])
            tensor = self._weights[name]
        rounded = name.removesuffix(".weight") in self.quantized
        return tensor.to(torch.float32 if rounded else self.source.dtype_of(name))

    def _of_block(self, folds: Sequence[Fold]) -> dict[str, Tensor]:
        names = {n for f in folds for n in f.names() if n in self.source}
        weights = {n: self.source.get(n).to(torch.float32, copy=True) for n in names}
        for f in folds:
            fold(weights, f, self.source.dtype_of)
        return weights
