"""The checksum of a GGUF file, inside the file: what anything in it, header, tokenizer or weight, is held against.

The key `llmq.sha256` of the first shard holds one sha256 in hex for each shard, one after the other. They are taken of
the files as they are, but with the digits of this very string read as zeros: so it is written as zeros, and put in
place when the files are whole.
Not here: checksums of single tensors and linears (pipeline/records.py), who compares (verify/).
"""

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import gguf

KEY = "llmq.sha256"
_MARK = struct.pack("<Q", len(KEY)) + KEY.encode() + struct.pack("<I", gguf.GGUFValueType.STRING)
_HEAD = 2**28  # bytes in which the key is looked for; no header is as long
_DIGITS = 64
_BUFFER = 2**20


def blank(shards: int) -> str:
    """Return what the key holds while the files are being written."""
    return "0" * (_DIGITS * shards)


def seal(files: Sequence[Path]) -> None:
    """Put the checksums of the shards into the first of them."""
    place = _place(files[0])
    if place is None or place[1] != _DIGITS * len(files):
        raise ValueError(f"{files[0]} has no room for {len(files)} checksums")
    digits = _digests(files, place)
    with files[0].open("r+b") as f:
        f.seek(place[0])
        f.write(digits.encode())


def broken(files: Sequence[Path]) -> list[Path] | None:
    """Return the shards that are not as they were sealed, None where the first holds no checksums of them.

    It holds those of other files where another tool has split or joined them since, keys copied (llama-gguf-split).
    """
    place = _place(files[0])
    if place is None or place[1] != _DIGITS * len(files):
        return None
    with files[0].open("rb") as f:
        f.seek(place[0])
        said = f.read(place[1])
    found = _digests(files, place).encode()
    return [p for i, p in enumerate(files) if said[i * _DIGITS :][:_DIGITS] != found[i * _DIGITS :][:_DIGITS]]


def _place(file: Path) -> tuple[int, int] | None:
    """Return the first byte and the length of the key's string, found by its bytes: parsing a tokenizer takes long."""
    with file.open("rb") as f:
        head = f.read(_HEAD)
    at = head.find(_MARK)
    if at < 0 or len(head) < at + len(_MARK) + 8:
        return None
    (length,) = struct.unpack_from("<Q", head, at + len(_MARK))
    return at + len(_MARK) + 8, min(length, file.stat().st_size)


def _digests(files: Sequence[Path], place: tuple[int, int]) -> str:
    return "".join(_digest(file, place if i == 0 else (0, 0)) for i, file in enumerate(files))


def _digest(file: Path, place: tuple[int, int]) -> str:
    found = hashlib.sha256()
    start, length = place
    with file.open("rb") as f:
        found.update(f.read(start))
        found.update(b"0" * len(f.read(length)))
        while piece := f.read(_BUFFER):
            found.update(piece)
    return found.hexdigest()
