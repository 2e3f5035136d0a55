"""Stand-ins for the blocks of a model: transformers' own forward runs around them, and no block is needed.

    with standing_in(model, "model.layers", [Recorder(block, last=True)]):
        model(input_ids=ids)                            # raises Reached when the hidden states come to the block

Not here: what is loaded around the blocks (ends.py), what follows them (tail.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.lanes import Call


class Reached(Exception):  # noqa: N818, an arrival, not an error
    """Ends a forward: what lies behind is not needed."""


class StandIn(nn.Module):
    """Stands in for a block: transformers reads attributes of it, such as attention_type."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)


class Recorder(StandIn):
    """Keeps what it is called with and hands the hidden states through."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__(block)
        self.last = last
        self.entered = torch.empty(0)
        self.call: Call = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states as they came."""
        self.entered, self.call = hidden, (args, kwargs)
        if self.last:
            raise Reached
        return _first_of_all(hidden)


class Given(StandIn):
    """Returns the hidden states that it was made with, whatever it is called with."""

    def __init__(self, block: nn.Module, hidden: Tensor) -> None:
        super().__init__(block)
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the given hidden states."""
        return _first_of_all(self.hidden)


class _Output(Tensor):
    """What a block returns: hidden states, or, to a model that takes apart a tuple, the first of several things."""

    def __getitem__(self, key: Any) -> Any:
        return self if type(key) is int else super().__getitem__(key)


def _first_of_all(hidden: Tensor) -> Tensor:
    return hidden.as_subclass(_Output)


@contextmanager
def standing_in(model: nn.Module, blocks: str, others: Sequence[nn.Module]) -> Iterator[None]:
    """Put others in the place of the blocks of a model, whose list has that name."""
    parent, _, leaf = blocks.rpartition(".")
    owner, own = model.get_submodule(parent), model.get_submodule(blocks)
    setattr(owner, leaf, nn.ModuleList(others))
    try:
        yield
    finally:
        setattr(owner, leaf, own)
