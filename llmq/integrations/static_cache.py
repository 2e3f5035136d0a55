"""transformers: one layer of a quantized cache in fixed memory, which a compiled `generate` can record in a CUDA graph.

    cache = llmq.QuantizedCache(model.config, bits=8, max_cache_len=4096)
    model.generate(**inputs, past_key_values=cache, cache_implementation=None)

Attention sees what it sees of the cache that grows (cache.py), decoded whole at each step, as wide as there is room.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from llmq.errors import LlmqError
from llmq.runtime.kv import KVGrid
from llmq.runtime.static_kv import StaticStore


class StaticQuantizedLayer(StaticLayer):
    """Keys and values of `max_cache_len` tokens; the length is a number on the device, as in transformers' layer."""

    def __init__(self, key_grid: KVGrid, value_grid: KVGrid, window: int, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self._grids = key_grid, value_grid
        self.window, self.run = window, max(key_grid.run, value_grid.run)
        self._stores: tuple[StaticStore, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, for keys and values like these."""
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        states = zip(self._grids, (key_states, value_states), strict=True)
        self._stores = tuple(StaticStore(grid, self.window, x, self.max_cache_len) for grid, x in states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            given = [grid.static for grid in self._grids if grid.static is not None]
            for tensor in (*self._tensors(), *given, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens `[B, H, T, D]`; return the keys and values of all that there is room for.

        Raises LlmqError for more tokens at once than that; one beyond it, later, is an index out of range.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if new > self.max_cache_len:
            raise LlmqError(f"{new} tokens do not fit a cache of max_cache_len={self.max_cache_len}; make it larger")
        keys, values = self._stores
        keys.write(key_states, self.cumulative_length)
        values.write(value_states, self.cumulative_length)
        self.cumulative_length.add_(new)
        return keys.read(self.cumulative_length, self.run), values.read(self.cumulative_length, self.run)

    def _tensors(self) -> list[Tensor]:
        return [tensor for store in self._stores for tensor in store.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in self._tensors())

    def reset(self) -> None:
        """Empty the layer; its memory stays."""
        for tensor in (*self._tensors(), self.cumulative_length):
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search, in place."""
        for tensor in self._tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
