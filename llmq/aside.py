"""Work beside the run, in a thread: what comes next is read while what is there is worked on.

    for block in ahead(read, range(32)):      # block 1 is read while block 0 is in use
        ...

One thing at a time, and one ahead: that is one more of them in memory. Reading a file, copying and hashing run without
the interpreter's lock. An error in the thread is raised where its result is asked for.
Not here: compiled loops over several threads (jit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """Yield `make(n)` for each number, in order; the next is made while the last one is in use.

    Close it where it is not run to its end: it then waits for what is being made.
    """
    with ThreadPoolExecutor(1) as pool:
        coming: Future[T] | None = None
        for n in numbers:
            made, coming = coming, pool.submit(make, n)
            if made is not None:
                yield made.result()
        if coming is not None:
            yield coming.result()
