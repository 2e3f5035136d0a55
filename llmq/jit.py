"""Loops that torch would run one small call at a time, compiled by numba.

Where numba is missing the caller has a torch path; compiled code is kept beside the package, or in the user's cache
folder, or, where neither can be written, made anew in each process.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Loop = Callable[..., None]


@functools.cache
def compiled(loop: Loop, kinds: str, *, reassociate: bool = False) -> Loop | None:
    """Return `loop` as machine code that runs without the interpreter's lock, or None where numba is not installed.

    kinds: the argument types, space-separated: scalars `f` float32, `i` int64, `w` int32, `u` uint8, `b` int8; with a
    number, `f1 u2`, contiguous arrays of that many dimensions. reassociate: sums may be taken in another order, in
    vector lanes.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    import numba

    scalars = {"f": numba.float32, "i": numba.int64, "w": numba.int32, "u": numba.uint8, "b": numba.int8}
    types = [numba.types.Array(scalars[k[0]], int(k[1:]), "C") if k[1:] else scalars[k] for k in kinds.split()]
    fastmath = {"reassoc", "contract"} if reassociate else False

    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    return cached(numba.njit, numba.void(*types), **options)(loop)  # type: ignore[no-any-return]


def cached(decorator: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Any], Any]:
    """Return numba's decorator with these arguments, which keeps the machine code on disk where a folder can be had."""

    def decorate(function: Any) -> Any:
        try:
            return decorator(*args, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder to keep its code in
            return decorator(*args, cache=False, **options)(function)

    return decorate


def in_threads(count: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` on equal runs of `range(count)`, in as many threads as torch uses.

    `work` is to call a compiled loop, which runs without the interpreter's lock. Raises what it raises.
    """
    parts = torch.get_num_threads()
    if parts == 1:
        work(0, count)
        return
    cuts = [count * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        for done in [pool.submit(work, a, b) for a, b in itertools.pairwise(cuts)]:
            done.result()
