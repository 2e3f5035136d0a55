"""Fields of a few bits out of rows of words, by numpy alone; nothing is shared with the code that packs them."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray
_CHUNK = 2**26  # bits unpacked at a time, a byte each


def fields(words: Array, bits: int, n: int) -> tuple[Array, int]:
    """Return the first `n` fields of every row of int32 words, uint8 `[rows, n]`, and how many bits behind are set."""
    rows = len(words)
    out, stray = np.empty((rows, n), np.uint8), 0
    step = max(1, _CHUNK // max(1, 32 * words.shape[1]))
    for i in range(0, rows, step):
        raw = np.ascontiguousarray(words[i : i + step]).astype("<i4", copy=False).view(np.uint8)
        string = np.unpackbits(raw, axis=1, bitorder="little")
        stray += int(np.count_nonzero(string[:, n * bits :]))
        part = out[i : i + step]
        part[:] = string[:, 0 : n * bits : bits]
        for bit in range(1, bits):
            part |= string[:, bit : n * bits : bits] << np.uint8(bit)
    return out, stray
