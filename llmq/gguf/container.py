"""The container: staged tensors into one GGUF file, or several under a size limit.

    "GGUF" | version | counts | keys and values | name, shape, type, offset of every tensor | data, aligned to 32 bytes

Tensors are staged block by block under their checkpoint's names and in their final types (packed rows are uint8), so
that writing them is renaming, reordering the rows of q and k, and copying; never more than a tensor is in memory. The
files appear under their final names when all are whole, the first shard last: a reader opens that one.
Source: the GGUF specification of ggml; the `gguf` package writes the header and the padding.
Not here: what a model or a tokenizer needs in the header (architecture.py, tokenizer.py), staging (checkpoint.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import torch
from torch import Tensor

from llmq.gguf.architecture import Architecture
from llmq.gguf.mixture import FLOATS
from llmq.gguf.tokenizer import Vocabulary
from llmq.reading import Entry
from llmq.types import LlmqError

_SIZE = re.compile(r"(\d+)([MG])")
_BEFORE_KEYS = 24  # bytes: magic, version, and the counts of tensors and keys
_FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZATION_VERSION = gguf.GGML_QUANT_VERSION


@dataclass(frozen=True)
class Header:
    """What stands before the tensors. file_type: of the mixture; keys: more strings and integers, by full name."""

    architecture: Architecture
    vocabulary: Vocabulary
    name: str
    file_type: int
    keys: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Where a staged tensor lies, under the checkpoint's name, and the ggml type that its bytes are."""

    entry: Entry
    kind: str


def parse_size(text: str | None) -> int:
    """Return the bytes that `500M` or `4G` means (decimal, as llama-gguf-split counts), 0 for None.

    Raises LlmqError for anything else.
    """
    if text is None:
        return 0
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise LlmqError(f"--split-max-size {text!r} does not read; write a number with M or G, e.g. 4G")
    return int(found[1]) * {"M": 10**6, "G": 10**9}[found[2]]


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise LlmqError unless OUT can become a GGUF file."""
    if out.is_dir():
        raise LlmqError(f"{out} is a folder; name the file to write, e.g. {out / 'model.gguf'}")
    if out.suffix != ".gguf":
        raise LlmqError(f"{out} does not end in .gguf, by which llama.cpp's tools know its files; rename it")
    taken = [p for p in (out, *shards(out)) if p.exists()]
    if taken and not overwrite:
        raise LlmqError(f"{taken[0]} exists; give another name or --overwrite")


def shards(out: Path) -> list[Path]:
    """Return the files of an earlier split write of OUT."""
    return sorted(p for p in out.parent.glob(f"{out.stem}-*-of-*.gguf") if re.fullmatch(r".*-\d{5}-of-\d{5}", p.stem))


def write(stage: Path, out: Path, header: Header, parts: Sequence[Part], split: int = 0) -> list[Path]:
    """Write the staged tensors to OUT (or its shards) by way of `stage`, a folder on the same disk; return the files.

    split: bytes of tensors in a shard at most, 0 for one file.
    Raises LlmqError where a tensor has no place in the architecture or the disk is full; OUT is then untouched.
    """
    arch = header.architecture
    named = _named(arch, parts)
    with _writing(out):
        writer = gguf.GGUFWriter(stage / out.name, arch.name, split_max_size=split)
        _describe(writer, header)
        extra = arch.extra()
        for ggml, tensor in extra.items():
            writer.add_tensor_info(ggml, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
        for ggml, part in named:
            _declare(writer, ggml, part)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        files = writer.format_shard_names(stage / out.name)
        for _, tensor in contents(arch, parts):
            writer.write_tensor_data(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        writer.close()
        for old in (out, *shards(out)):
            old.unlink(missing_ok=True)
        for file in reversed(files):
            file.rename(out.with_name(file.name))
    return [out.with_name(f.name) for f in files]


def contents(arch: Architecture, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by ggml's name, as it is written: converted, its rows in order."""
    yield from arch.extra().items()
    for ggml, part in _named(arch, parts):
        yield ggml, _load(arch, part)


def metadata_digest(stage: Path, header: Header) -> str:
    """Return the sha256 of the header's keys and values as they lie in the file, one after another."""
    file = stage / "header"
    with _writing(file):
        writer = gguf.GGUFWriter(file, header.architecture.name)
        _describe(writer, header)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return hashlib.sha256(file.read_bytes()[_BEFORE_KEYS:]).hexdigest()


def _named(arch: Architecture, parts: Sequence[Part]) -> list[tuple[str, Part]]:
    return [(ggml, part) for part in parts if (ggml := arch.tensor(part.entry.name)) is not None]


def _describe(writer: gguf.GGUFWriter, header: Header) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(header.name)
    writer.add_file_type(header.file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in header.keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    header.architecture.describe(writer)
    header.vocabulary.describe(writer)


def _declare(writer: gguf.GGUFWriter, name: str, part: Part) -> None:
    kind = gguf.GGMLQuantizationType[part.kind]
    shape = list(part.entry.shape)
    if part.kind not in FLOATS:
        shape = list(gguf.quant_shape_from_byte_shape(shape, kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    nbytes = torch.Size(shape).numel() // block * size
    writer.add_tensor_info(name, shape, torch.empty(0).numpy().dtype, nbytes, raw_dtype=kind)


def _load(arch: Architecture, part: Part) -> Tensor:
    tensor = part.entry.read()
    if part.kind in FLOATS:
        tensor = as_float(tensor, part.kind, part.entry.name)
    rows = arch.rows(part.entry.name)
    return tensor if rows is None else tensor[rows]


def as_float(tensor: Tensor, kind: str, name: str) -> Tensor:
    """Return a float tensor as F32, F16 or BF16. Raises LlmqError for a value that F16 cannot hold."""
    out = tensor.to(_FLOAT_TYPES[kind])
    if kind == "F16" and torch.isinf(out).any():
        raise LlmqError(f"{name} holds values beyond float16's 65504; take BF16 or F32 in place of F16")
    return out


@contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as e:
        raise LlmqError(f"cannot write {path} ({e.strerror or e}); is the disk full?") from e
