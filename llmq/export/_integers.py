"""Integers whose minima are floats of their own (MLX, GGUF's Q4_1) as codes with zeros, for what holds no such minima.

Not here: which minima are products of a zero and a scale (grids/_biased.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from llmq.checkpoint.packed import PackedWeights
from llmq.errors import LlmqError
from llmq.grids._biased import Biased, as_integers
from llmq.types import GgmlParams, LinearSpec, QTensor, Scheme


class OfIntegers:
    """Packed weights whose integers have zeros. `qtensor` raises LlmqError for minima that no zero gives."""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed
        self.linears = {name: planned(spec) for name, spec in packed.linears.items()}
        self.ordered, self.derived = packed.ordered, packed.derived
        self.stored, self.parts, self.names = packed.stored, packed.parts, packed.names

    def qtensor(self, name: str) -> QTensor:
        """See `PackedWeights.qtensor`."""
        return _named(name, self._packed.qtensor(name))

    def __iter__(self) -> Iterator[tuple[str, QTensor | Tensor]]:
        """See `PackedWeights.__iter__`."""
        for name, found in self._packed:
            yield name, _named(name.removesuffix(".weight"), found) if isinstance(found, QTensor) else found


def planned(spec: LinearSpec) -> LinearSpec:
    """Return a linear with zeros for its minima."""
    grid = spec.scheme.weight
    if not isinstance(grid, Biased):
        return spec
    return replace(spec, scheme=Scheme(grid.integers, spec.scheme.activation))


def of_integers(q: QTensor) -> QTensor:
    """Return codes with biases of their own as integers with zeros. Raises LlmqError where they are none."""
    if not isinstance(q.grid, Biased):
        return q
    params = as_integers(GgmlParams.of(q.params), q.grid.bits)
    if params is None:
        raise LlmqError("some of its minima are no multiple of their scale that a code could be the zero of")
    return replace(q, params=params, grid=q.grid.integers)


def _named(name: str, q: QTensor) -> QTensor:
    try:
        return of_integers(q)
    except LlmqError as e:
        raise LlmqError(f"{name}: {e}") from e
