"""Keys and values on a GPU: stored by our Triton kernels (llmq_kernels.kv) and attended to as they are stored.

`KernelStore` has the interface of `kv.Store` and the grids of the kernels, one for each token and head: 8 bits
symmetric with a scale of max|x| / 127.5 or a given one, 4 bits asymmetric with an integer zero; 4 bytes of scale and
zero a token and head. `attend` reads two of them and the float window behind them, and never decodes either in memory.
Not here: keys per channel, 2 bits and other devices (kv.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from llmq.gpu import DEVICES, refuses_device, warn
from llmq.runtime.kv import STEP, KVGrid, Store

if TYPE_CHECKING:
    from collections.abc import Callable


class KernelStore:
    """Quantized tokens of one layer, keys or values: words int16 `[B, H, T, DP * bits / 16]`, params int32 `[B, H, T]`.

    DP: the channels of a head, padded to a power of two of at least 64.
    """

    devices: ClassVar[frozenset[str]] = DEVICES

    def __init__(self, grid: KVGrid) -> None:
        self.grid, self.sym = grid, grid.bits == 8
        self.length = 0
        self.D = 0
        self._room: tuple[Tensor, Tensor] | None = None

    @classmethod
    def refuses(cls, grids: tuple[KVGrid, KVGrid], x_BHTD: Tensor) -> str | None:
        """Return why the kernels cannot hold such keys and values, None where they can."""
        reason = refuses_device(x_BHTD.device, cls.devices)
        if reason:
            return reason
        if any(g.fp8 for g in grids):
            return "the kernels take integers, not fp8 entries"
        if any(g.axis != "token" or g.bits == 2 for g in grids):
            return "the kernels take 8 or 4 bits with a scale for each token and head (keys='token')"
        if x_BHTD.shape[-1] > 256:
            return f"heads of {x_BHTD.shape[-1]} channels are beyond the kernels' 256"
        if x_BHTD.device.type != "cpu" and x_BHTD.dtype not in (torch.float16, torch.bfloat16):
            return f"the kernels take float16 and bfloat16, not {x_BHTD.dtype}"
        return None

    @property
    def room(self) -> tuple[Tensor, Tensor]:
        """Words and params, with room to grow."""
        if self._room is None:
            raise RuntimeError("nothing was appended")
        return self._room

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize tokens and add them."""
        import llmq_kernels.kv  # noqa: F401  registers the operator

        B, H, T, self.D = x_BHTD.shape
        if self._room is None or self.length + T > self._room[0].shape[2]:
            self._grow(x_BHTD, -(-(self.length + T) // STEP) * STEP)
        static = self.grid.static
        if static is not None:
            static = static.float().flatten().to(x_BHTD.device).expand(H).contiguous()
        lengths = torch.full((B,), self.length, dtype=torch.int32, device=x_BHTD.device)
        torch.ops.llmq.kv_append(x_BHTD, *self.room, lengths, static, self.grid.bits, self.sym)
        self.length += T

    def _grow(self, like_BHTD: Tensor, tokens: int) -> None:
        from llmq_kernels import kv

        B, H, _, D = like_BHTD.shape
        words = like_BHTD.new_zeros(B, H, tokens, kv.padded(D) * self.grid.bits // 16, dtype=torch.int16)
        room = words, like_BHTD.new_zeros(B, H, tokens, dtype=torch.int32)
        if self._room is not None:
            for to, old in zip(room, self._room, strict=True):
                to[:, :, : self.length] = old[:, :, : self.length]
        self._room = room

    def decode(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Return tokens `start` to `end` in `dtype`, `[B, H, T, D]`."""
        from llmq_kernels import kv

        words, params = (t[:, :, start : self.length if end is None else end] for t in self.room)
        return kv.dequantize(words, params, self.D, self.grid.bits, sym=self.sym).to(dtype)

    def truncate(self, length: int) -> None:
        """Forget what comes after `length` tokens; the room stays."""
        self.length = length

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Apply `f`, which may change the batch or the device, to both tensors."""
        if self._room is not None:
            self._room = (f(self._room[0]), f(self._room[1]))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._room is None else sum(t.nbytes for t in self._room)


def stores(grids: tuple[KVGrid, KVGrid], x_BHTD: Tensor) -> tuple[Store, Store] | tuple[KernelStore, KernelStore]:
    """Return empty stores for keys and values like `x`: the kernels' where they can hold them, else `Store`s.

    On a GPU the reason against the kernels is logged, once.
    """
    reason = KernelStore.refuses(grids, x_BHTD)
    if reason is None:
        return KernelStore(grids[0]), KernelStore(grids[1])
    if x_BHTD.device.type != "cpu":
        warn("the key-value cache is kept and read", reason)
    return Store(grids[0]), Store(grids[1])


def attend(
    query: Tensor, keys: KernelStore, values: KernelStore, window: tuple[Tensor, Tensor], scaling: float
) -> Tensor:
    """Return causal attention `[B, Hq, Q, D]` of the latest Q tokens over the stores and the float window behind."""
    from llmq_kernels import attention
    from llmq_kernels.kv import KVCache

    packed = KVCache(*keys.room, *values.room, keys.D, keys.grid.bits, keys.sym)
    lengths = torch.full((len(query),), keys.length, dtype=torch.int32, device=query.device)
    return attention.attend(query, packed, lengths, scaling, window if window[0].shape[2] else None)
