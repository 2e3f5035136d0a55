"""Folds: a scale for each channel moved from what produces an activation into the linears that read it.

    x -> x / s  in the producer,   W[:, j] -> W[:, j] * s_j  in its readers:   W x stays what it was

A norm absorbs 1 / s in its gain and bias, a linear in its rows and bias. Where a row of a linear feeds several
channels, as a value does in grouped-query attention, these share one scale. A gain, stored as w or as what 1 lacks to
it, is rounded to the dtype that it is stored in first and the readers take the ratio that results, so that the rounding
cancels; channels whose gain is or becomes 0 keep scale 1.

`fold` makes a fold in a block while it is quantized, and again wherever the float weights as they stood before rounding
are wanted: a `Fold` is written to `quantization.json`, and `floats_of` repeats it on the checkpoint.
Not here: what can take a scale (producers.py), what chooses the scales (algorithms/), the other transform of a
checkpoint's weights (rotated.py).
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
from llmq.model.trial import OFFSETS
from llmq.steps import Rotation
from llmq.types import Producer

Stored = Callable[[str], torch.dtype]
"""Gives the dtype that a tensor of the checkpoint is stored in, by its name."""


@dataclass(frozen=True)
class Fold:
    """One fold, by the full names of its modules.

    step: the transform that chose it, as a recipe writes it. block: its number.
    scale: float32 `[K]`, by which the linears' columns are multiplied.
    """

    step: str
    block: int
    linears: tuple[str, ...]
    producer: Producer
    scale: Tensor

    def names(self) -> list[str]:
        """Return the tensors that it may change."""
        module = self.producer.module
        return [f"{module}.weight", f"{module}.bias", *(f"{n}.weight" for n in self.linears)]

    def fits(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Return whether it can be made in tensors of these shapes."""
        K, rows = len(self.scale), self.producer.rows
        N, *rest = shapes.get(f"{self.producer.module}.weight") or [0]
        fed = N == K if rows is None else len(rows) == K and all(0 <= row < N for row in rows)
        readers = [list(shapes.get(f"{n}.weight", [])) for n in self.linears]
        return len(rest) < 2 and fed and all(len(shape) == 2 and shape[1] == K for shape in readers)

    def to_json(self) -> dict[str, Any]:
        """Return its entry in `quantization.json`: rows as runs, the scales as little-endian float32 in base64."""
        text = base64.b64encode(self.scale.detach().cpu().numpy().astype("<f4").tobytes()).decode()
        by = self.producer
        facts = {"step": self.step, "block": self.block, "linears": list(self.linears), "producer": by.module}
        rows = {} if by.rows is None else {"rows": _runs(by.rows)}
        return facts | rows | ({"gain": by.gain} if by.gain == "1 + w" else {}) | {"scale": text}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], where: str, shapes: Mapping[str, Sequence[int]]) -> Fold:
        """Return the fold of an entry, in a checkpoint of these shapes.

        Raises LlmqError, naming `where`, for one that is not as `to_json` writes it.
        """
        step, producer, text = (field(entry, key, str, where) for key in ("step", "producer", "scale"))
        linears = tuple(str(n) for n in field(entry, "linears", list, where))
        try:
            scale = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
        except ValueError as e:
            raise LlmqError(f"{where}: the scales of {printable(producer, 80)} do not read ({one_line(e)})") from e
        gain = field(entry, "gain", str, where, "w")
        if gain not in OFFSETS:
            raise LlmqError(f"{where}: {printable(gain, 80)} is no way to store a gain")
        N = (shapes.get(f"{producer}.weight") or [0])[0]
        rows = _rows(entry, where, N, len(scale))
        return cls(step, field(entry, "block", int, where), linears, Producer(producer, rows, gain), scale)


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Return rows as runs of neighbours, `[first, how many]` each: [4, 5, 4, 5] -> [[4, 2], [4, 2]]."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([row, 1])
    return runs


def _rows(entry: Mapping[str, Any], where: str, N: int, K: int) -> tuple[int, ...] | None:
    """Return the rows of an entry; in older records `head_dim` says what heads of N rows feed K channels."""
    if "rows" in entry:
        runs = field(entry, "rows", list, where)
        pairs = all(isinstance(r, list) and len(r) == 2 and all(type(n) is int and n >= 0 for n in r) for r in runs)
        if not pairs or sum(n for _, n in runs) != K:
            raise LlmqError(f"{where}: rows are no runs of {K} channels")
        return tuple(row for first, n in runs for row in range(first, first + n))
    d = field(entry, "head_dim", int, where, 0)
    if N in (0, K) or d < 1 or K % N or N % d:
        return None
    return tuple(torch.arange(N).reshape(-1, 1, d).expand(-1, K // N, -1).flatten().tolist())


def fold(weights: Mapping[str, Tensor], by: Fold, stored: Stored) -> None:
    """Make a fold in float32 tensors, by their full names, in place."""
    name = f"{by.producer.module}.weight"
    producer, bias = weights[name], weights.get(f"{by.producer.module}.bias")
    scale_K = by.scale.to(producer.device)
    rows_K = by.producer.feeding(len(producer)).to(producer.device)
    factor_N = torch.ones(len(producer), device=producer.device).index_put((rows_K,), scale_K)
    if producer.dim() == 2:
        producer.div_(factor_N[:, None])
    else:
        factor_N = _fold_gain(producer, factor_N, OFFSETS[by.producer.gain], stored(name))
    if bias is not None:
        bias.div_(factor_N)
    for linear in by.linears:
        weights[f"{linear}.weight"].mul_(factor_N[rows_K])


def _fold_gain(w_N: Tensor, factor_N: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """Divide the gain `offset + w` of a norm, rounded as it is stored; return what it was divided by in truth."""
    new_N = ((w_N + offset) / factor_N - offset).to(dtype).to(w_N.dtype)
    gain_N = new_N + offset
    keep = (gain_N == 0) | ~torch.isfinite(gain_N)
    factor_N = torch.where(keep, torch.ones_like(factor_N), (w_N + offset) / gain_N)
    w_N.copy_(torch.where(keep, w_N, new_N))
    return factor_N


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
            folds.append(Fold.from_json(entry, here, shapes))
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
