"""The weights of a packed checkpoint as a graph asks for them: one at a time, and none forgotten.

Not here: what a file of the checkpoint means (checkpoint/packed.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.checkpoint.packed import CACHE, PackedWeights
from llmq.checkpoint.source import Source
from llmq.progress import Progress
from llmq.types import QTensor, RangedGrid


class Linear(NamedTuple):
    """A linear of a checkpoint: float `[N, K]` or solved, its bias `[N]`, and the grid of its input if that has one.

    exact: whether its values are those of the checkpoint to the last bit.
    """

    weight: Tensor | QTensor
    bias: Tensor | None = None
    activation: RangedGrid | None = None
    exact: bool = True


class Weights:
    """A settled checkpoint; `left` says what of it nobody asked for.

    laid: makes integers with zeros of a linear's codes (MLX has biases), by its name. step: told of each that is read.
    """

    def __init__(
        self, source: Source, packed: PackedWeights, laid: Callable[[QTensor, str], QTensor], step: Progress
    ) -> None:
        self._source, self._packed, self._laid, self._step = source, packed, laid, step
        self._asked = set(source.unread)
        self._read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def has(self, module: str) -> bool:
        """Say whether the checkpoint has a linear or a norm of that name, packed or not."""
        return module in self._packed.linears or f"{module}.weight" in self._source

    def tensor(self, name: str) -> Tensor:
        """Read a float tensor. Raises LlmqError where it is not there."""
        self._asked.add(name)
        return self._source.get(name)

    def linear(self, module: str) -> Linear:
        """Read a linear. Raises LlmqError where it is not there, or holds what no weight can have."""
        bias = self.tensor(name) if (name := f"{module}.bias") in self._source else None
        if module not in self._packed.linears:
            return Linear(self.tensor(f"{module}.weight"), bias)
        stored = self._packed_weight(module)
        q = self._laid(stored, module)
        exact = q is stored or torch.equal(q.dequantize(), stored.dequantize())
        return Linear(q, bias, self._packed.linears[module].scheme.activation, exact)

    def table(self, module: str) -> Tensor | QTensor:
        """Read an embedding, float `[V, H]` or as it is packed."""
        packed = module in self._packed.linears
        return self._packed_weight(module) if packed else self.tensor(f"{module}.weight")

    def _packed_weight(self, module: str) -> QTensor:
        self._asked |= {f"{module}.{local}" for local in self._packed.stored(module)}
        self._step(self._read, len(self._packed.linears), module)
        self._read += 1
        return self._packed.qtensor(module)

    def left(self) -> list[str]:
        """Return the tensors that nothing asked for, but for a cache's scales and what a format derives from others."""
        derived, modules = self._packed.derived, self._packed.linears
        return [
            name
            for name in self._source.names()
            if name not in self._asked
            and not name.endswith(CACHE)
            and not (name.rpartition(".")[0] in modules and name.rpartition(".")[2] in derived)
        ]
