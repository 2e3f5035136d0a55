"""The one reader of small structured files: JSON, YAML, also before a Markdown text, and headers of safetensors files.

A file may lie, so nothing here trusts one: sizes, depth and types are checked, and every failure is an LlmqError that
names the file. What the values mean is the caller's; `field` takes one out of an object by its type.

    safetensors    u64 length of the header | JSON {"name": {"dtype", "shape", "data_offsets"}} | data, without gaps

Not here: which files make a checkpoint (checkpoint/), GGUF (gguf/reader.py), calibration text (calibration/).
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from llmq.errors import LlmqError, one_line, printable

JSON_BYTES = 256 * 2**20  # tokenizer.json of the largest vocabularies is a tenth of this
YAML_BYTES = 2**20
MARKDOWN_BYTES = 2**22  # model cards with tables of results; those with pictures link them
HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
_DEEPEST = 200
_LARGEST = 1e100
_FRONT = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r|\n|$)", re.DOTALL)  # as the Hub's own

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, by safetensors' name of its dtype."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""torch's dtype for those that it has."""

_YAML_NODES = 20_000  # the parser is slow: a megabyte of small ones takes it half a minute
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
T = TypeVar("T")


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text. Raises LlmqError, naming `where`, for one that is broken, deep or no Unicode."""
    try:
        # json.loads itself lets bytes through that are half of a surrogate pair
        said = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        value = json.loads(said)
        if "\\u" in said:  # an escape can be half a pair, too
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as e:
        raise LlmqError(f"{where} is nested too deep to be read") from e
    except ValueError as e:  # JSONDecodeError, UnicodeError, integers of thousands of digits
        raise LlmqError(f"{where} is not valid JSON ({one_line(e, 200)})") from e
    _check_depth(value, where)
    return value


def json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises LlmqError where it is missing, too large, or holds another thing."""
    return _object(parse_json(_bytes(file, JSON_BYTES), str(file)), file)


def yaml_object(file: Path) -> dict[str, Any]:
    """Return the object in a YAML (or JSON) file; an empty file is an empty object.

    Raises LlmqError as `json_object`, and for aliases: a few of them can stand for gigabytes.
    """
    return _yaml_object(_bytes(file, YAML_BYTES), file)


def front_matter(file: Path) -> dict[str, Any]:
    """Return the object that a Markdown file begins with, in YAML between two lines of dashes; empty where it has none.

    Raises LlmqError as `yaml_object`.
    """
    text = _bytes(file, MARKDOWN_BYTES).decode(errors="replace").removeprefix("\ufeff")
    found = _FRONT.match(text)
    return {} if found is None else _yaml_object(found[1][: YAML_BYTES + 1].encode(), file)


def _yaml_object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        if len(data) > YAML_BYTES:
            raise ValueError(f"more than {YAML_BYTES / 2**20:.0f} MiB")
        value = yaml.load(data.decode(), _Yaml)  # noqa: S506  (a SafeLoader)
    except RecursionError as e:
        raise LlmqError(f"{file} is nested too deep to be read") from e
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as e:
        # whatever a tag's constructor raises: of `!!bool x` a KeyError
        raise LlmqError(f"{file} is not valid YAML ({one_line(e, 200)})") from e
    _check_depth(value, str(file))
    return _object({} if value is None else value, file)


class _Yaml(yaml.SafeLoader):
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > _YAML_NODES:
            raise yaml.YAMLError(f"more than {_YAML_NODES:,} values")
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        if node.tag in _NUMBERS and len(node.value) > 100:  # 0xfff... has no limit of its own, nor has 1:30:00...
            raise yaml.YAMLError(f"a number of {len(node.value):,} characters")
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in keys.items() if count > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def field(found: Mapping[str, Any], key: str, kind: type[T], where: str, default: T | None = None) -> T:
    """Return `found[key]`, `default` where it is missing. Raises LlmqError where it is of another type, or missing.

    A bool is no int here; an int will do for a float.
    """
    value = found.get(key, default)
    good = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not good or (isinstance(value, bool) and kind is not bool):
        said = f"is {printable(repr(value), 80)}" if key in found else "is missing"
        raise LlmqError(f"{where}: {key} {said}; it must be of type {kind.__name__}")
    return value  # type: ignore[return-value]


def number(value: Any) -> float | None:
    """Return a value of a file as a float, None where it is no number: infinite, a bool, larger than figures are.

    Sums and ratios of what it returns are finite, too: what is smaller than 1e-100 is 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:  # nor NaN
        return None
    return float(value) if abs(value) >= 1 / _LARGEST else 0.0


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: where its bytes lie and what they are. dtype: in safetensors' spelling."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """Return the tensor. Raises LlmqError where torch has no such dtype or the file has shrunk."""
        return self._bytes(self.start, self.nbytes).view(self.meta().dtype).reshape(self.shape)

    def read_slice(self, i: int) -> Tensor:
        """Return what the first dimension has at `i`, an expert's matrix of many, without reading the rest."""
        size = self.nbytes // self.shape[0]
        return self._bytes(self.start + i * size, size).view(self.meta().dtype).reshape(self.shape[1:])

    def _bytes(self, start: int, count: int) -> Tensor:
        data = torch.empty(count, dtype=torch.uint8)
        try:
            with self.file.open("rb") as f:
                f.seek(start)
                got = f.readinto(data.numpy())  # type: ignore[arg-type]  # an array is a buffer
        except OSError as e:
            raise LlmqError(f"cannot read {self.file} ({one_line(e)})") from e
        if got != count:
            raise LlmqError(f"{self.file} ended early at tensor {self.name}; was it changed while it was being read?")
        return data

    def meta(self) -> Tensor:
        """Return the tensor's shape and dtype without its data. Raises LlmqError where torch has no such dtype."""
        if self.dtype not in DTYPES:
            raise LlmqError(f"{self.file}: tensor {self.name} is {self.dtype}, which torch does not have")
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


def tensor_entries(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name, from its header, which is read once.

    Raises LlmqError for a file that is truncated or no safetensors file.
    """
    header, data, size = _header(file)
    entries = {n: _entry(file, n, e, data) for n, e in header.items() if n != "__metadata__"}
    at = data
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != at:
            raise LlmqError(f"{_damaged(file)} (tensor {entry.name} leaves a gap or an overlap); download it again")
        at += entry.nbytes
    if at != size:
        raise LlmqError(f"{_damaged(file)} (its tensors end at byte {at:,} of {size:,}); download it again")
    return entries


def metadata(file: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors. Raises LlmqError as `tensor_entries` does."""
    return dict(_header(file)[0].get("__metadata__", {}))


def _damaged(file: Path) -> str:
    return f"{file} is truncated or not safetensors"


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return a safetensors file's header, where its data begins and where it ends."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            text = f.read(length) if 0 < length <= min(HEADER_BYTES, size - 8) else b""
    except OSError as e:
        raise LlmqError(f"cannot read {file} ({one_line(e)})") from e
    if not text:
        raise LlmqError(f"{_damaged(file)} (its header does not fit the file); download it again")
    header = parse_json(text, f"the header of {file}")
    if not isinstance(header, dict):
        raise LlmqError(f"{_damaged(file)} (its header is no object); download it again")
    notes = field(header, "__metadata__", dict, f"the header of {file}", {})
    if not all(isinstance(v, str) for v in notes.values()):  # the library that loads the model refuses these
        raise LlmqError(f"{_damaged(file)} (its metadata is not text); download it again")
    return header, 8 + length, size


def _entry(file: Path, name: str, said: Any, data: int) -> Entry:
    where = f"{file}, tensor {printable(name, 200)}"
    if not isinstance(said, dict):
        raise LlmqError(f"{where}: its header is no object; download the file again")
    dtype = field(said, "dtype", str, where)
    shape, offsets = field(said, "shape", list, where), field(said, "data_offsets", list, where)
    whole = all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *offsets))
    if dtype not in BITS or not whole or len(offsets) != 2 or len(shape) > 16:
        raise LlmqError(f"{where}: no dtype, shape or place that llmq knows ({dtype}); download the file again")
    nbytes = offsets[1] - offsets[0]
    if 8 * nbytes != prod(shape) * BITS[dtype]:
        raise LlmqError(f"{where}: {nbytes} bytes are not {dtype} {shape}; download the file again")
    return Entry(file, name, dtype, tuple(shape), data + offsets[0], nbytes)


def is_file(file: Path) -> bool:
    """Say whether there is a plain file of that name; no name is too long to ask for."""
    try:
        return file.is_file()
    except OSError:
        return False


def _bytes(file: Path, limit: int) -> bytes:
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise LlmqError(f"{file} is not a plain file")
    try:
        with file.open("rb") as f:
            data = f.read(limit + 1)
    except (OSError, ValueError) as e:
        raise LlmqError(f"cannot read {file} ({one_line(e)})") from e
    if len(data) > limit:
        raise LlmqError(f"{file} is larger than {limit / 2**20:.0f} MiB, which no such file should be")
    return data


def _object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise LlmqError(f"{file} must hold an object of named values, not {printable(repr(value), 60)}")
    return value


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise LlmqError(f"{where} is nested more than {_DEEPEST} deep, too deep to be read")
