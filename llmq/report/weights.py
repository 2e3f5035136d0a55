"""The packed weights of a checkpoint as codes and scales, one linear at a time, beside the floats they were made from.

    weights.names()             the linears that are packed
    weights.read(name)          PackedLinear: codes [N, K], scale [N, G], and which codes lie at the ends of the grid
    weights.floats(name)        the float weight before rounding, folds and rotations made again; None without a source

A folder's are read by its format (checkpoint/packed.py), those of a GGUF file by the grid of their ggml type, rows in
the order of the model.
Not here: how they are drawn (plots/).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint import Source
from llmq.checkpoint.decoding import as_floats
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.errors import LlmqError
from llmq.gguf import kinds
from llmq.gguf.reader import GgufFile
from llmq.model.adapter import Adapted, Adapter
from llmq.model.folding import floats_of
from llmq.model.pretrained import blank_model, model_config
from llmq.model.skeleton import Skeleton
from llmq.types import Params, QTensor
from llmq.verify.ggml import Gguf, shards
from llmq.verify.report import Report


@dataclass(frozen=True)
class PackedLinear:
    """A packed linear, read. q: its codes and parameters, rows in the order of the model."""

    name: str
    q: QTensor

    @property
    def grid(self) -> str:
        """Return its grid in words: `Int, 4 bits, groups of 128`."""
        K, G = self.q.codes.shape[1], self.q.params.scale.shape[1]
        shared = "one scale per row" if G == 1 else f"groups of {K // G}"
        return f"{type(self.q.grid).__name__.upper()}, {self.q.grid.bits} bits, {shared}"

    def values(self) -> Tensor:
        """Return what a runtime multiplies with, float32 `[N, K]`."""
        return self.q.dequantize()

    def levels(self) -> list[float]:
        """Return what each code stands for, in parts of the scale, code 0 first; NaN for a code that is no number.

        Of integers with zeros that differ it is the code itself.
        """
        codes = torch.arange(2**self.q.grid.bits)
        if isinstance(self.q.params, Params):
            return codes.float().tolist()
        first = self.q.params.decoding().map(lambda p: p[:1, :1].float())
        unit = {n: torch.full_like(t, float(n == "scale")) for n, t in first.tensors().items()}
        return self.q.grid.decode(codes[None], type(first)(**unit))[0].tolist()

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the least and the largest value of each group, float32 `[N, G]` each."""
        levels = np.array(self.levels())
        low, high = int(np.nanargmin(levels)), int(np.nanargmax(levels))
        params = self.q.params.decoding()
        found = [self.q.grid.decode(torch.full(params.scale.shape, code), params) for code in (low, high)]
        return torch.minimum(*found), torch.maximum(*found)

    def positions(self, W_NK: Tensor) -> Tensor:
        """Return where floats lie in the range of their group: 0 at its least value, 1 at its largest, `[N, K]`.

        Groups without a range (a scale of 0) are NaN.
        """
        low, high = (end[:, self.q.group_K] if end.shape[1] > 1 else end for end in self.ends())
        return torch.where(high > low, (W_NK - low) / (high - low), torch.nan)


class Weights(ABC):
    """The packed linears of a checkpoint. Whatever cannot be read raises LlmqError when it is asked for."""

    def __init__(self, source: Source | None, record: Mapping[str, Any]) -> None:
        self._source, self._record = source, record

    @abstractmethod
    def names(self) -> list[str]:
        """Return the linears that are packed, in the order of the model."""

    @abstractmethod
    def read(self, name: str) -> PackedLinear:
        """Return a linear."""

    def floats(self, name: str) -> Tensor | None:
        """Return the float weight that was rounded, float32 `[N, K]`; None where no source is at hand.

        Raises LlmqError where the source is not the one that the record tells of.
        """
        found = None if self._source is None else self._floats.get(f"{name}.weight")
        return None if found is None else found.to(torch.float32)

    @cached_property
    def _floats(self) -> Any:
        source: Any = self._source
        if source.quantization is not None:
            as_floats(source)
        if source.adapter is not None:
            source = Adapted(Skeleton(source, torch.float32), Adapter(source.adapter))
        return floats_of(source, self._record, set(self.names()), "the record")


class OfFolder(Weights):
    """The linears of a checkpoint folder, of any format that llmq reads."""

    def __init__(self, own: Source, source: Source | None, record: Mapping[str, Any]) -> None:
        super().__init__(source, record)
        self._own = own

    @cached_property
    def _packed(self) -> PackedCheckpoint:
        return PackedCheckpoint.open(self._own, blank_model(self._own, model_config(self._own)))

    def names(self) -> list[str]:
        """See `Weights.names`."""
        return list(self._packed.linears)

    def read(self, name: str) -> PackedLinear:
        """See `Weights.read`."""
        return PackedLinear(name, self._packed.qtensor(name))


class OfGguf(Weights):
    """The packed tensors of a GGUF file, by their names in transformers."""

    def __init__(self, path: Path, source: Source | None, record: Mapping[str, Any]) -> None:
        super().__init__(source, record)
        self._files = [GgufFile(p) for p in shards(GgufFile(path))]

    def size(self) -> int:
        """Return the bytes of all tensors."""
        return sum(file.data_bytes() for file in self._files)

    @cached_property
    def _model(self) -> Gguf:
        report = Report()
        found = Gguf(self._files, {}, report)
        if report.failures:
            raise LlmqError(f"{self._files[0].path}: {report.failures[0]}")
        return found

    def names(self) -> list[str]:
        """See `Weights.names`."""
        return [n for n in (t.removesuffix(".weight") for t in self._model.tensors) if n in self._model.packed]

    def read(self, name: str) -> PackedLinear:
        """See `Weights.read`. Raises LlmqError for a type that llmq has no grid of."""
        stored = self._model.tensors[f"{name}.weight"]
        kind = stored.tensor_type.name
        if not kinds.has_grid(kind) or (grid := kinds.grid(kind)).once:
            raise LlmqError(f"{name} is {kind}, whose codes llmq does not take apart")
        codes, params = grid.from_bytes(torch.from_numpy(np.array(stored.data)))
        if (factor := self._model.factor(f"{name}.weight")) is not None:
            params = params.decoding().map(lambda p: p * factor)

        def order(rows: Tensor) -> Tensor:
            return torch.from_numpy(self._model.in_order(f"{name}.weight", rows.numpy()))

        return PackedLinear(name, QTensor(order(codes), params.map(order), grid))
