"""What the C library keeps of freed memory, given back to the system, where glibc is the library.

glibc holds freed pieces for reuse, and raises the size from which a piece is mapped on its own, and unmapped when it is
freed, up to 32 MB as it sees larger ones freed. So peaks creep up among tensors of a few megabytes that come and go.
Not here: which tensors there are.
"""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def trim() -> None:
    """Hand freed pages back.

    A block frees hundreds of middling tensors among long-lived ones; without this, 22 blocks of 44 M weights peaked
    0.7 GB above 6 of them.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def map_tensors() -> None:
    """Have every tensor from 1 MiB on go back to the system when it is freed, in this process, from now on.

    It costs time: the system clears the pages of each new one. On activations alone, a tenth to a half more.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, 2**20)
