"""Safetensors files written: a part out of memory, a shard out of the bytes of parts.

    u64 length of the header | JSON {"name": {"dtype", "shape", "data_offsets"}} | data, wide dtypes first

Whoever wrote a file knows where its tensors lie (`Entry`), so no header is read again to join them.
Not here: reading a file (guard/reading.py), which tensors make a part or a shard (sink.py).
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from llmq.checkpoint.digest import raw
from llmq.errors import LlmqError
from llmq.guard.reading import BITS, DTYPES, Entry

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> list[Entry]:
    """Write tensors to a file, notes beside them. Returns where they lie in it, in that order."""
    lying = _wide_first(Entry(file, n, _NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for n, t in tensors.items())
    header = _header(lying, notes)
    with file.open("wb") as out:
        out.write(header)
        for entry in lying:
            out.write(raw(tensors[entry.name]))
    starts = accumulate((e.nbytes for e in lying), initial=len(header))
    return [replace(e, start=start) for e, start in zip(lying, starts, strict=False)]


def join(file: Path, entries: Iterable[Entry]) -> None:
    """Write tensors that lie in other files to one, by copying their bytes."""
    ordered = _wide_first(entries)
    with file.open("wb") as out:
        out.write(_header(ordered))
        for source, start, count in _runs(ordered):
            with source.open("rb") as f:
                f.seek(start)
                _copy(f, out, count)


def _wide_first(entries: Iterable[Entry]) -> list[Entry]:
    """Return tensors in the order of a file, in which all stay aligned."""
    return sorted(entries, key=lambda e: (-BITS[e.dtype], e.name))


def _header(entries: Iterable[Entry], notes: Mapping[str, str] | None = None) -> bytes:
    """Return the first bytes of a file that holds these tensors in this order."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
    at = 0
    for e in entries:
        said[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": (at, at + e.nbytes)}
        at += e.nbytes
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _runs(entries: Iterable[Entry]) -> Iterator[tuple[Path, int, int]]:
    """Yield the file, the first byte and the number of bytes of tensors that lie one behind the other."""
    file, start, end = Path(), 0, 0
    for e in entries:
        if (e.file, e.start) != (file, end):
            if end > start:
                yield file, start, end - start
            file, start = e.file, e.start
        end = e.start + e.nbytes
    if end > start:
        yield file, start, end - start


def _copy(source: BinaryIO, target: BinaryIO, n: int) -> None:
    while n:
        chunk = source.read(min(n, 1 << 22))
        if not chunk:
            raise LlmqError(f"{source.name} ended early while shards were being joined; was it changed from outside?")
        target.write(chunk)
        n -= len(chunk)
