"""Work beside the run, in a thread: what comes next is read, and what is done is written, while the run goes on.

    for block in ahead(read, range(32)):      # block 1 is read while block 0 is in use
        ...
    with behind(device) as do:
        do(partial(write, "a", x))            # returns at once; the next `do` waits until this is written

One thing at a time, and one ahead or behind: that is one more of them in memory. So it is done where a GPU computes and
the processor waits (`pays`). Files are read and written, bytes hashed and copied from and to a GPU without the
interpreter's lock. An error in the thread is raised where the run waits for it: where the result is asked for, at the
next `do`, at the end.
Not here: compiled loops over several threads (jit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def pays(device: torch.device) -> bool:
    """Say whether work beside the run pays where it computes: on the CPU the two would take turns."""
    return device.type == "cuda"


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return it in memory that `device` copies from without the processor, if it is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Ahead(Generic[T]):
    """What `make` gives for a number; who asks for one says which comes next, and that is made meanwhile."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(1)
        self._coming: tuple[int, Future[T]] | None = None

    def get(self, number: int, after: int | None = None) -> T:
        """Return what is made for a number; begin with the one `after` it."""
        coming, self._coming = self._coming, None
        made = coming[1].result() if coming and coming[0] == number else self._make(number)
        if after is not None:
            self._coming = after, self._pool.submit(self._make, after)
        return made

    def close(self) -> None:
        """Wait for what is being made."""
        self._pool.shutdown()


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """Yield `make(n)` for each number, in order; the next is made while the last one is in use.

    Close it where it is not run to its end: it then waits for what is being made.
    """
    order = list(numbers)
    made = Ahead(make)
    try:
        for n, after in zip_longest(order, order[1:]):
            yield made.get(n, after)
    finally:
        made.close()


@contextmanager
def behind(device: torch.device) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yield what does work in the thread, once that before it is done; on leaving all is done.

    Where that does not pay, it works at once.
    """
    if not pays(device):
        yield lambda work: work()
        return
    last: list[Future[None]] = []

    def do(work: Callable[[], None]) -> None:
        while last:
            last.pop().result()
        last.append(pool.submit(work))

    with ThreadPoolExecutor(1) as pool:
        yield do
        for work in last:
            work.result()
