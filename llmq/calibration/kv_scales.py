"""Static scales of keys and values: the largest magnitudes that attention puts into its cache over the calibration.

A decoder block hands its keys (rotated) and values to the cache it is given. `KvMaxima` is a cache that keeps their
maxima and nothing else, so that any transformers block is measured without a line of code of its own. The scale is that
of compressed-tensors, max / 448 for E4M3 and max / 127.5 for int8: one for the tensor, `[1]`, or one for each head,
`[H, 1, 1]`.
Not here: how they are named on disk (formats/compressed_tensors.py), reading them back (integrations/cache.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmq.model.lanes import Call
from llmq.team import Team
from llmq.types import LlmqError

_REACH = {"fp8": 448.0, "int8": 127.5}
_REMEDY = "leave --kv-bits out for this model"


def owner_of_cache(block: nn.Module, name: str) -> str:
    """Return the attention of a block, whose keys a linear of their own makes: the scales are stored beside it.

    Raises LlmqError, calling the block `name`, where it has none, or a state beside: a state space, or keys fused with
    queries.
    """
    keep = {n: m for n, m in block.named_modules() if n and hasattr(m, "layer_idx")}  # something in the cache
    owners = [n for n, m in keep.items() if hasattr(m, "k_proj")]
    if len(owners) != 1 or len(keep) != 1:
        raise LlmqError(f"{name} ({type(block).__name__}) is not one attention whose keys a k_proj makes; {_REMEDY}")
    return owners[0]


class KvMaxima(DynamicCache):
    """A cache that stores nothing but the largest magnitude of keys and values, for each head of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note `[B, H, T, D]` keys and values, and return them as they are."""
        seen = [t.detach().abs().amax((0, 2, 3)).float() for t in (key_states, value_states)]
        self.largest = [torch.maximum(a, b) for a, b in zip(self.largest or seen, seen, strict=True)]
        return key_states, value_states

    def meet(self, team: Team) -> None:
        """Take in what the other processes of a team have seen."""
        seen = [largest for largest in team.gather([t.cpu() for t in self.largest]) if largest]
        self.largest = [torch.stack(of_all).amax(0) for of_all in zip(*seen, strict=True)]

    def into(self, calls: Sequence[Call]) -> Sequence[Call]:
        """Return the calls of a block with this cache among their arguments."""
        return [(args, {**kwargs, "past_key_values": self}) for args, kwargs in calls]

    def tensors(self, block: nn.Module, strategy: str, entry: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return `k_scale` and `v_scale` by their names in the block, for entries that are "fp8" or "int8".

        Raises LlmqError where nothing was seen.
        """
        owner = owner_of_cache(block, type(block).__name__)
        if not self.largest:
            raise LlmqError(f"{type(block).__name__} puts no keys into its cache; {_REMEDY}")
        scales = {}
        for local, largest_H in zip(("k_scale", "v_scale"), self.largest, strict=True):
            top = largest_H[:, None, None] if strategy == "head" else largest_H.max()[None]
            scales[f"{owner}.{local}"] = (top / _REACH[entry]).clamp(min=1e-8).to(dtype)
        return scales
