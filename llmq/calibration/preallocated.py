"""A float key-value cache with room for all tokens from the start.

transformers' `DynamicCache` makes new, slightly larger tensors for every layer and token. Buffers of ever new sizes
leave gaps in the heap, and memory peaks where chance has it.
Not here: quantized caches (integrations/cache.py).
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def preallocated_cache(config: Any, tokens: int) -> DynamicCache:
    """Return an empty cache for a model's config, with room for `tokens` in every layer of full attention."""
    cache = DynamicCache(config=config)
    cache.layers = [_PreallocatedLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _PreallocatedLayer(DynamicLayer):
    """Keys and values `[B, H, T, D]` as views of the first T tokens of buffers."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens `[B, H, T, D]`, no more in all than there is room for, and return views of all."""
        if not self.is_initialized or self.rooms is None:
            self.lazy_initialization(key_states, value_states)
            self.rooms = self._room(key_states), self._room(value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def _room(self, like_BHTD: Tensor) -> Tensor:
        B, H, _, D = like_BHTD.shape
        return like_BHTD.new_empty(B, H, self.tokens, D)
