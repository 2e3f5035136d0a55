"""A GGUF file opened: keys, and tensors as views into the mapped file.

    "GGUF" | u32 version (2, 3) | u64 tensors | u64 keys | key ... | tensor ... | padding | data
    key      string name, u32 type, value: a number, a string, or an array: u32 type, u64 count, values
    tensor   string name, u32 dimensions, u64 of each (the first is the row's), u32 type, u64 offset in data
    string   u64 length, UTF-8

Any file may lie. Each byte of the header is looked at once, counts are held against the bytes that are left before
anything is made of them, and arrays and strings stay where they are in the file until they are asked for: time and
memory are linear in the header, whatever it says. (gguf-py's own reader takes a minute and gigabytes for an array of
20 million bytes.)
Source: the GGUF specification of ggml; llama.cpp `ggml/src/gguf.cpp` for what it refuses.
Not here: what the keys mean to a runtime (architecture.py, tokenizer.py), decoding a type (grids/).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from llmq.errors import LlmqError, one_line, printable
from llmq.gguf.kinds import BY_NUMBER, Kind
from llmq.guard.reading import field, parse_json

_KEYS, _TENSORS, _DIMENSIONS = 2**16, 2**17, 4
_STRINGS = 2**22  # in all arrays together; the largest vocabularies have half a million merges
_NAME = 2**16  # bytes
_NUMBERS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip
_PLAIN = {kind: np.dtype(f"<{code}") for kind, code in {
    "F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
}.items()}  # fmt: skip
LAYOUT = "llmq.layout"
"""The key of what llmq wrote: the file type, and the bytes of the first file's tensors."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. shape: as ggml has it, the length of a row first.

    data: a view of the file as gguf-py's decoders take it, numbers `[..., N, K]` or uint8 `[..., N, row bytes]`.
    """

    name: str
    tensor_type: Kind
    shape: tuple[int, ...]
    data_offset: int
    n_bytes: int
    data: np.ndarray

    @property
    def n_elements(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


class GgufFile:
    """The keys and tensors of one file.

    Raises LlmqError for a file that is missing, not GGUF, or not what its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise LlmqError(f"{path} is not a file; give a .gguf file")
        try:
            with path.open("rb") as f:
                magic = f.read(4)
            if magic != b"GGUF":
                raise LlmqError(f"{path} is not a GGUF file (it does not begin with GGUF)")
            self._bytes = np.memmap(path, mode="r")
            self._keys, self.tensors = _parse(_Cursor(self._bytes))
        except _DamagedError as e:
            raise LlmqError(f"{path} is truncated or damaged ({e}); download or write it again") from e
        except OSError as e:
            raise LlmqError(f"cannot read {path} ({one_line(e)})") from e

    def value(self, key: str) -> Any:
        """Return the value of a key, None where the file does not have it.

        An array of numbers is an ndarray, of strings a list. Raises LlmqError for a string that is not UTF-8.
        """
        value = self._keys.get(key)
        try:
            if isinstance(value, memoryview):
                return str(value, "utf-8")
            return [str(s, "utf-8") for s in value] if isinstance(value, _Strings) else value
        except UnicodeDecodeError as e:
            raise LlmqError(f"{self.path}: the value of {printable(key, 100)} is not UTF-8 text") from e

    @property
    def remade(self) -> bool:
        """Whether another tool made the file from one of llmq's, whose keys it copied, as llama-quantize does.

        Both the file type and the bytes are others than llmq wrote; where one alone is, the file is damaged.
        """
        layout = self.value(LAYOUT)
        said = layout.split() if isinstance(layout, str) else []
        return len(said) == 2 and said[0] != str(self.value("general.file_type")) and said[1] != str(self.data_bytes())

    def report(self) -> dict[str, Any]:
        """Return the record of the run that wrote the file, empty where there is none. Raises LlmqError for junk.

        Older files hold the lines of the linears alone.
        """
        if self.remade:
            return {}
        text, where = self.value("llmq.report"), f"{self.path}, llmq.report"
        found = {} if text is None else parse_json(str(text), where)
        report = field({"llmq.report": found}, "llmq.report", dict, str(self.path))
        return report if "linears" in report or not report else {"linears": report}

    def keys(self) -> list[str]:
        """Return the names of all keys."""
        return list(self._keys)

    def kinds(self) -> Counter[str]:
        """Return how many tensors there are of each type."""
        return Counter(t.tensor_type.name for t in self.tensors.values())

    def data_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors.values())


class _DamagedError(Exception):
    pass


class _Cursor:
    """A place in the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at, self._strings = data, 0, 0
        self._view = memoryview(data.data)

    def take(self, n: int) -> memoryview:
        """Return the next `n` bytes and pass over them."""
        if n > len(self._view) - self.at:
            raise _DamagedError(f"it ends at byte {len(self._view):,}, before its header does")
        self.at += n
        return self._view[self.at - n : self.at]

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, code: str, most: int, what: str) -> int:
        n = self.number(code)
        if n > most:
            raise _DamagedError(f"it says that it has {n:,} {what}, at most {most:,} are read")
        return n

    def name(self) -> str:
        try:
            return str(self.take(self.count("<Q", _NAME, "bytes in a name")), "utf-8")
        except UnicodeDecodeError as e:
            raise _DamagedError("a name is not UTF-8 text") from e

    def value(self) -> Any:
        """Read the value of a key: a number, an ndarray, a string as its bytes, or `_Strings`."""
        kind = self._type()
        if kind is GGUFValueType.STRING:
            return self.take(self.number("<Q"))
        if kind is not GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0].item()
        kind, n = self._type(), self.number("<Q")
        if kind is GGUFValueType.ARRAY:
            raise _DamagedError("it holds an array of arrays, which llama.cpp does not read either")
        return self._array_of_strings(n) if kind is GGUFValueType.STRING else self._numbers(kind, n)

    def _type(self) -> GGUFValueType:
        code = self.number("<I")
        try:
            return GGUFValueType(code)
        except ValueError as e:
            raise _DamagedError(f"a key is of the unknown type {code}") from e

    def _numbers(self, kind: GGUFValueType, n: int) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(n * dtype.itemsize), dtype)

    def _array_of_strings(self, n: int) -> _Strings:
        self._strings += n
        if self._strings > _STRINGS:
            raise _DamagedError(f"its arrays have {self._strings:,} strings, at most {_STRINGS:,} are read")
        start = self.at
        for _ in range(n):
            self.take(self.number("<Q"))
        return _Strings(self._view[start : self.at])


class _Strings:
    """An array of strings, left where it is in the file."""

    def __init__(self, stored: memoryview) -> None:
        self._stored = stored

    def __iter__(self) -> Iterator[memoryview]:
        at = 0
        while at < len(self._stored):
            (n,) = struct.unpack_from("<Q", self._stored, at)
            yield self._stored[at + 8 : at + 8 + n]
            at += 8 + n


def _parse(file: _Cursor) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return the keys' values, as a cursor reads them, and the tensors by name. Raises _DamagedError."""
    file.take(4)
    version = file.number("<I")
    if version not in (2, 3):
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise _DamagedError("its numbers are big-endian" if big else f"its version is {version}, 2 and 3 are read")
    n_tensors, n_keys = file.count("<Q", _TENSORS, "tensors"), file.count("<Q", _KEYS, "keys")
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        _add(keys, file.name(), file.value())
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError("general.alignment is no power of two")
    said: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = file.name()
        shape = tuple(file.number("<Q") for _ in range(file.count("<I", _DIMENSIONS, "dimensions of a tensor")))
        _add(said, name, (shape, file.number("<I"), file.number("<Q")))
    start = -(-file.at // alignment) * alignment
    tensors = {n: _tensor(file.data, n, shape, kind, start + at) for n, (shape, kind, at) in said.items()}
    end = start
    for t in sorted(tensors.values(), key=lambda t: (t.data_offset, t.n_bytes)):
        if t.data_offset < end or (t.data_offset - start) % alignment:
            raise _DamagedError(f"tensor {t.name} overlaps another, or is not aligned")
        end = t.data_offset + t.n_bytes
    return keys, tensors


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    if name in found:
        raise _DamagedError(f"it has two entries {printable(name, 100)}")
    found[name] = value


def _tensor(data: np.ndarray, name: str, shape: tuple[int, ...], code: int, start: int) -> Stored:
    """Return a tensor after checking that the file holds it. Raises _DamagedError."""
    kind = BY_NUMBER.get(code)
    if kind is None:
        raise _DamagedError(f"tensor {name} is of the unknown type {code}")
    K = shape[0] if shape else 1
    if K % kind.columns:
        raise _DamagedError(
            f"tensor {name}: rows of {K} columns do not hold {kind.name}, whose blocks are {kind.columns}"
        )
    n_bytes = prod(shape) // kind.columns * kind.size
    if start + n_bytes > len(data):
        raise _DamagedError(f"tensor {name} ends at byte {start + n_bytes:,} of {len(data):,}")
    dtype = _PLAIN.get(kind.name, np.dtype(np.uint8))
    rows = (*reversed(shape[1:]), K // kind.columns * kind.size // dtype.itemsize)
    view = np.frombuffer(data, dtype, n_bytes // dtype.itemsize, start).reshape(rows) if n_bytes else np.empty(0, dtype)
    return Stored(name, kind, shape, start, n_bytes, view)
