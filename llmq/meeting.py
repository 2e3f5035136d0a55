"""Where the processes of a run meet: in a part of their store where those of an earlier attempt never were.

torchrun keeps one store for all restarts (torch 2.13), with what the killed processes wrote: whoever reads such an
address before the new one is written waits for ever for a process that is gone. So the first process names a part of
the store anew, and tells it to who asks:

    call 2   = "9f31..."             process 2 draws a word of its own, which no earlier attempt can have answered
    answer 2 = "9f31... c07a..."     the first process repeats it, with the name
    came 2   = "c07a..."             process 2 has read it; the first one goes on when all have

Not here: what is sent there (team.py).
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, Store

_PAUSE = 0.02  # seconds between two looks


def meet(store: Store, rank: int, size: int) -> PrefixStore:
    """Return the part of a store that the processes of this attempt share, once all are there."""
    from torch.distributed import PrefixStore

    return PrefixStore(_lead(store, size) if rank == 0 else _follow(store, rank), store)


def _lead(store: Store, size: int) -> str:
    """Name the part of the store, and tell it to all others."""
    name, others = secrets.token_hex(8), set(range(1, size))
    while others:
        for rank in sorted(others):
            if call := _said(store, f"call {rank}"):
                store.set(f"answer {rank}", f"{call} {name}")
        others -= {rank for rank in others if _said(store, f"came {rank}") == name}
        time.sleep(_PAUSE)
    return name


def _follow(store: Store, rank: int) -> str:
    """Ask the first process for the name."""
    call = secrets.token_hex(8)
    store.set(f"call {rank}", call)
    while True:
        answered, _, name = _said(store, f"answer {rank}").partition(" ")
        if answered == call:
            store.set(f"came {rank}", name)
            return name
        time.sleep(_PAUSE)


def _said(store: Store, key: str) -> str:
    """Return what stands under a key; "" where nothing does."""
    return store.get(key).decode() if store.check([key]) else ""
