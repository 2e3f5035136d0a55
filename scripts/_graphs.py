"""CUDA graphs on a CPU: a back-end of torch.compile that records what it is given once, and then replays it.

As mode "reduce-overhead" does on a GPU: inputs of a fixed address (parameters, a static cache) are part of a graph and
others are copied into it, so that another address or another shape is recorded anew; a graph that changes an input of
no fixed address is no graph, and everything in it is called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

REPLAY = {"replay": 1, "input copied": 3}
"""What a token of `generate` launches: its id, its position and the mask go into the graph."""


class Graphs:
    """Counts in `counts` what Python launches: "record" and "replay" of a graph, "input copied" for each one beside.

    What a replay does on the device is done here by the functions that were recorded, and is not counted; with
    `computing` False it is not done, and the outputs are those of the recording.
    """

    def __init__(self, counts: Counter[str], *, computing: bool = True) -> None:
        self.counts, self.computing = counts, computing
        self._compile = aot_autograd(fw_compiler=self._graph, keep_inference_input_mutations=True)

    def __deepcopy__(self, _memo: Any) -> Graphs:
        """Return itself: `generate` copies the settings that name it, and compiles anew for other ones."""
        return self

    def __call__(self, module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return what torch.compile calls in place of a traced function."""
        return self._compile(module, inputs)  # type: ignore[no-any-return]

    def _graph(self, function: Any, _inputs: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.try_get()
        found = None if context is None else context.fw_metadata
        if found is None:
            raise RuntimeError("torch.compile says nothing about the inputs of a graph")
        static = set(found.static_input_indices)
        changed = [*found.mutated_graph_handled_indices, *found.mutated_inp_runtime_indices]
        if not static.issuperset(changed):
            return function  # type: ignore[no-any-return]
        recorded: dict[tuple[Any, ...], Any] = {}

        def call(*inputs: Any) -> Any:
            key = tuple(_address(x) if i in static else _shape(x) for i, x in enumerate(inputs))
            if key not in recorded:
                self.counts["record"] += 1
                recorded[key] = function(*inputs)
                return recorded[key]
            self.counts["replay"] += 1
            self.counts["input copied"] += sum(isinstance(x, Tensor) for x in inputs) - len(static)
            return self._replayed(function, inputs) if self.computing else recorded[key]

        return call

    def _replayed(self, function: Any, inputs: Sequence[Any]) -> Any:
        before = dict(self.counts)
        outputs = function(*inputs)
        self.counts.clear()
        self.counts.update(before)
        return outputs


def _address(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, Tensor) else x


def _shape(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else x


class Steps:
    """A streamer that keeps what was counted up to each token."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self.seen: list[Counter[str]] = []

    def put(self, ids: Tensor) -> None:
        """Note what was counted up to a token, or to the prompt."""
        self.seen.append(Counter(self.counts))

    def end(self) -> None:
        """Do nothing."""

    @property
    def tokens(self) -> list[Counter[str]]:
        """What was counted for each token behind the first, which is the prompt's."""
        return [after - before for before, after in pairwise(self.seen[1:])]
