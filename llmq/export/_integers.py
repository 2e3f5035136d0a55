"""MLX's integers, whose minima are floats of their own, as codes with zeros, for what holds no such minima.

Not here: which minima are products of a zero and a scale (grids/_biased.py).
"""

from dataclasses import replace
from typing import Any

from llmq.checkpoint.packed import PackedCheckpoint
from llmq.errors import LlmqError
from llmq.grids._biased import Biased, as_integers
from llmq.types import GgmlParams, LinearSpec, QTensor, Scheme


class OfIntegers(PackedCheckpoint):
    """A checkpoint whose integers have zeros. `qtensor` raises LlmqError for minima that no zero gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linears = {name: planned(spec) for name, spec in self.linears.items()}

    def qtensor(self, name: str) -> QTensor:
        """See `PackedCheckpoint.qtensor`."""
        try:
            return of_integers(super().qtensor(name))
        except LlmqError as e:
            raise LlmqError(f"{name}: {e}" if name not in str(e) else str(e)) from e


def planned(spec: LinearSpec) -> LinearSpec:
    """Return a linear with zeros for its minima."""
    grid = spec.scheme.weight
    if not isinstance(grid, Biased):
        return spec
    return replace(spec, scheme=Scheme(grid.integers, spec.scheme.activation))


def of_integers(q: QTensor) -> QTensor:
    """Return codes with biases of their own (MLX) as integers with zeros. Raises LlmqError where they are none."""
    if not isinstance(q.grid, Biased):
        return q
    params = as_integers(GgmlParams.of(q.params), q.grid.bits)
    if params is None:
        raise LlmqError("some of its minima are no multiple of their scale that a code could be the zero of")
    return replace(q, params=params, grid=q.grid.integers)
