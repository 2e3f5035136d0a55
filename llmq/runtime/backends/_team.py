"""How machine code of numba's runs in torch's OpenMP threads. Importing needs numba.

A loop is a function of `data`, of the thread's number and of how many there are: `data` points at pointers, the first
to the sizes (int64), the others to the arrays. It has two entries of the type ENTRY, `one_thread` and, made when first
asked for because its symbols need not exist, `of_many`. They stand in the loop's own file, line by line alike in each:
numba tells by the file of a function whether the machine code that it kept of it is old.

Threads of our own would share the cores with torch's, which spin for some milliseconds after every parallel region: a
decode step took four times as long. Not here: the loops (_int_loops.py,
_float_loops.py).
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from numba import types
from torch import Tensor

ENTRY = types.void(types.CPointer(types.voidptr))
thread = types.ExternalFunction("omp_get_thread_num", types.int32())
threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def run(one_thread: Callable[[], int], of_many: Callable[[], int], sizes: tuple[int, ...], *arrays: Tensor) -> None:
    """Run a loop in torch's threads where they can be had, else in this one; arrays are contiguous.

    one_thread, of_many: return the addresses of the entries.
    """
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    data = (ctypes.c_void_p * (1 + len(arrays)))(ctypes.addressof(numbers), *(t.data_ptr() for t in arrays))
    count = torch.get_num_threads()
    fork = omp_fork() if count > 1 else None
    if fork is None:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(one_thread())(data)
    else:
        fork(of_many(), data, count, 0)


@cache
def omp_fork() -> Any:
    """Return what runs a function in torch's OpenMP threads, None where torch brings another runtime than GNU OpenMP.

    `GOMP_parallel(function, data, threads, flags)` is the entry that compilers call (gcc, libgomp ABI).
    """
    process: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not all(hasattr(process, n) for n in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")):
        return None
    fork = process.GOMP_parallel
    fork.argtypes, fork.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return fork
