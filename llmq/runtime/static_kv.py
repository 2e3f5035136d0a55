"""Quantized keys and values in memory that never moves, for a step that is recorded once and then replayed.

What `kv.Store` and its window hold, with the same codes and scales, in tensors of a fixed shape. How many tokens there
are is a number on the device, and nothing that Python does depends on it:

    packed   every token is quantized as it comes, also while it is still in the window; of a run that is not whole the
             codes are written anew with each of its tokens, and nobody reads them
    ring     the latest tokens in float, token t in row t mod the window
    read     everything packed is decoded, and the ring taken from the first token on that is still in the window

Tokens that have not come yet read as something finite: the mask of a static cache hides them.
Not here: the arithmetic and the layout (kv.py), transformers' cache (integrations/static_cache.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmq.runtime.kv import KVGrid, Packed, dequantize, quantize


class StaticStore:
    """Tokens of one layer, keys or values: room for `tokens` of them, `[B, H, T, D]` each like `like`.

    window: rows of the ring; 0, or a multiple of `grid.run` that is not 0 where that is more than 1.
    """

    def __init__(self, grid: KVGrid, window: int, like_BHTD: Tensor, tokens: int) -> None:
        B, H, _, D = like_BHTD.shape
        self.grid, self.window, self.tokens = grid, window, tokens
        self.runs = -(-tokens // grid.run)
        one = quantize(like_BHTD.new_zeros(B, H, grid.run, D), grid)

        def room(part: Tensor, rows: int) -> Tensor:
            return part.new_zeros(B, H, rows, part.shape[3])

        scale = one.scale if grid.static is not None else room(one.scale, self.runs)
        low = None if one.low is None else room(one.low, self.runs)
        self.packed = Packed(room(one.codes, self.runs * grid.run), scale, low)
        self.ring = like_BHTD.new_zeros(B, H, window, D)

    def write(self, x_BHTD: Tensor, before: Tensor) -> None:
        """Add tokens behind the `before` that are there (int64, on the device)."""
        new = x_BHTD.shape[2]
        if self.grid.run == 1:
            at = row = before + torch.arange(new, device=x_BHTD.device)
            source = x_BHTD
        else:
            row, at = self._runs(new, before)
            source = self._whole_runs(x_BHTD, at, before)
        packed = quantize(source, self.grid)
        self.packed.codes.index_copy_(2, at, packed.codes)
        if self.grid.static is None:
            self.packed.scale.index_copy_(2, row, packed.scale)
        if self.packed.low is not None and packed.low is not None:
            self.packed.low.index_copy_(2, row, packed.low)
        if kept := min(new, self.window):
            latest = before + torch.arange(new - kept, new, device=x_BHTD.device)
            self.ring.index_copy_(2, latest % self.window, x_BHTD[:, :, new - kept :])

    def _runs(self, new: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most runs that so many new tokens can fall into, and the tokens of these; the last may repeat."""
        run = self.grid.run
        count = (new + 2 * run - 2) // run
        row = (before // run + torch.arange(count, device=before.device)).clamp(max=self.runs - 1)
        return row, (row[:, None] * run + torch.arange(run, device=before.device)).flatten()

    def _whole_runs(self, x_BHTD: Tensor, at: Tensor, before: Tensor) -> Tensor:
        """Return the tokens `at`: old ones out of the ring, new ones out of `x`, anything behind those."""
        new = x_BHTD.index_select(2, (at - before).clamp(0, x_BHTD.shape[2] - 1))
        return torch.where((at < before)[:, None], self.ring.index_select(2, at % self.window), new)

    def read(self, length: Tensor, step: int) -> Tensor:
        """Return all `tokens` in the ring's dtype, of which the first `length` have come.

        step: so many leave the window at once, the longer run of keys and values.
        """
        whole = dequantize(self.packed, self.grid, self.ring.dtype)
        if self.window:  # chosen value by value, which torch.compile makes part of decoding
            left = ((length - self.window).clamp(min=0) + step - 1) // step * step
            at = torch.arange(whole.shape[2], device=length.device)
            whole = torch.where((at >= left)[:, None], self.ring.index_select(2, at % self.window), whole)
        return whole[:, :, : self.tokens]

    def tensors(self) -> Iterator[Tensor]:
        """Yield what changes as tokens come."""
        yield self.packed.codes
        if self.grid.static is None:
            yield self.packed.scale
        if self.packed.low is not None:
            yield self.packed.low
        yield self.ring
