"""A GGUF file as codes for other formats: what a PackedCheckpoint is to a folder, by transformers' names and rows.

    source = GgufSource(path, None)
    codes = GgufCodes(source, blank_model(source, config))
    codes.qtensor("model.layers.0.mlp.up_proj")     of Q4_0 symmetric codes of 4 bits, in groups of 32

Rows of q and k, value heads of linear attention and experts lie here as transformers has them, codes with their scales.
Tokenizer and config are made of the file's keys, in a folder that goes when the export ends.
Not here: what a type's codes are elsewhere (_unpack.py), names, config and floats (_from_gguf.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.checkpoint.packed import natural
from llmq.checkpoint.source import Source
from llmq.errors import LlmqError
from llmq.export._from_gguf import GgufSource
from llmq.export._target import Packed
from llmq.export._unpack import grid_of, unpacked
from llmq.gguf import kinds
from llmq.gguf.hf_tokenizer import tokenizer_from
from llmq.model.pretrained import blank_model, model_config
from llmq.types import LinearSpec, QTensor, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_gguf_codes(path: Path, requantize: str | None) -> Packed:
    """Return a GGUF file, its keys and headers read. Raises LlmqError where llmq does not read it, or has no codes."""
    source = GgufSource(path, None)
    if not source.packed:
        raise LlmqError(f"{path} holds floats alone; write it with --to float, and quantize that")
    config: Any = model_config(source)
    model = blank_model(source, config)
    codes = GgufCodes(source, model)
    skipped = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in codes.linears]
    made = source.first.report() or None
    return PackedGguf(
        source, source.warnings, config=config, packed=codes, skipped=skipped, requantize=requantize, made=made
    )


@dataclass
class PackedGguf(Packed):
    """A GGUF file that is open for export."""

    @property
    def method(self) -> str:
        """See `Packed.method`."""
        return "gguf"

    @cached_property
    def _room(self) -> tempfile.TemporaryDirectory[str]:
        room = tempfile.TemporaryDirectory()
        try:
            self.tokenizer().save_pretrained(room.name)
        except LlmqError as e:
            self.warnings.append(f"OUT has no tokenizer: {e}")
        return room

    @property
    def folder(self) -> Path:
        """See `Packed.folder`; a file without a tokenizer that llmq makes has an empty one, and a warning."""
        return Path(self._room.name)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Packed.tokenizer`."""
        first: Any = self.source
        return tokenizer_from(first.first)

    def stored(self) -> Source:
        """See `Packed.stored`."""
        return self.source


class GgufCodes:
    """The linears, embeddings and float tensors of a GGUF file; see `PackedWeights`.

    Raises LlmqError for a type whose codes llmq does not know.
    """

    ordered = False
    derived: frozenset[str] = frozenset()

    def __init__(self, source: GgufSource, model: Any) -> None:
        self._source, self._file = source, source.file
        modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
        packed = [(n, m) for n, m in modules if f"{n}.weight" in source.packed]
        self.linears = {n: self._planned(n, m) for n, m in packed}
        if beside := source.packed - {f"{n}.weight" for n in self.linears}:
            raise LlmqError(f"{source.path}: {min(beside)} is packed and no linear; llmq dequantize decodes it")

    def stored(self, name: str) -> dict[str, Tensor]:
        """See `PackedWeights.stored`."""
        linear = self.linears[name]
        groups = linear.scheme.weight.granularity.groups(linear.K)
        dtype = getattr(linear.scheme.weight, "scale_dtype", torch.float32)
        return {
            "weight": torch.empty(linear.N, linear.K, dtype=torch.uint8, device="meta"),
            "scale": torch.empty(linear.N, groups, dtype=dtype, device="meta"),
        }

    def parts(self, name: str) -> list[str]:
        """See `PackedWeights.parts`."""
        return [f"{name}.weight"]

    def qtensor(self, name: str) -> QTensor:
        """See `PackedWeights.qtensor`."""
        weight = f"{name}.weight"
        stored = self._file.tensors[weight]
        q = unpacked(torch.from_numpy(np.array(stored.data)), stored.tensor_type.name, self._file.factor(weight))
        q = QTensor(self._ordered(weight, q.codes), q.params.map(lambda p: self._ordered(weight, p)), q.grid)
        if not all(bool(p.isfinite().all()) for p in q.params.tensors().values() if p.is_floating_point()):
            raise LlmqError(f"{self._source.path}: the scales of {stored.name} hold NaN or Inf; download it again")
        return q

    def names(self) -> list[str]:
        """See `PackedWeights.names`."""
        return sorted(self._source.names(), key=natural)

    def __iter__(self) -> Iterator[tuple[str, QTensor | Tensor]]:
        """See `PackedWeights.__iter__`."""
        for name in self.names():
            module = name.removesuffix(".weight")
            yield name, self.qtensor(module) if module in self.linears else self._source.get(name)

    def _planned(self, name: str, module: nn.Linear | nn.Embedding) -> LinearSpec:
        kind = self._source.kinds[f"{name}.weight"]
        if not kinds.has_grid(kind):
            raise LlmqError(
                f"{name} is {kind}, of which llmq reads the values, not the codes: llmq dequantize decodes it"
            )
        N, K = module.weight.shape
        return LinearSpec(name, N, K, Scheme(grid_of(kind)), isinstance(module, nn.Embedding))

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Return rows, or what is said of their groups, in transformers' order. Raises LlmqError where groups split."""
        try:
            return torch.from_numpy(self._file.in_order(name, rows.numpy()))
        except ValueError as e:
            raise LlmqError(f"{name}: its groups reach over heads that the file has in another order") from e
