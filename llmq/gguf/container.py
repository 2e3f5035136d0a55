"""The container: staged tensors into one GGUF file, or several under a size limit.

    "GGUF" | version | counts | keys and values | name, shape, type, offset of every tensor | data, aligned to 32 bytes

Tensors are staged block by block under their checkpoint's names and in their final types (packed rows are uint8), so
that writing them is renaming, bringing each into the form that llama.cpp reads (architecture.py) and copying; never
more than a tensor of the file is in memory, which of experts has those of a block.
Several files do not change hands in one step, so a split write never takes the names of an older one: where it would
have as many shards, the first holds no tensors (as llama.cpp's converter writes it on request), and there is one more.
Source: the GGUF specification of ggml; the `gguf` package writes the header and the padding.
Not here: what a model or a tokenizer needs in the header (architecture.py, tokenizer.py), staging (checkpoint/sink.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from llmq.checkpoint.disk import writing
from llmq.checkpoint.place import one_file
from llmq.errors import LlmqError, one_line
from llmq.gguf import seal
from llmq.gguf.architecture import Architecture
from llmq.gguf.kinds import KINDS
from llmq.gguf.mixture import FLOATS
from llmq.gguf.reader import LAYOUT, GgufFile
from llmq.gguf.tokenizer import Vocabulary
from llmq.guard.reading import Entry

_SIZE = re.compile(r"(\d+)([MG])")
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZATION_VERSION = gguf.GGML_QUANT_VERSION


@dataclass(frozen=True)
class Header:
    """What stands before the tensors. file_type: of the mixture; keys: more strings and integers, by full name."""

    architecture: Architecture
    vocabulary: Vocabulary
    name: str
    file_type: int
    keys: Mapping[str, str | int | list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Where a staged tensor lies, under the checkpoint's name, and the ggml type that its bytes are."""

    entry: Entry
    kind: str


REPORT = "llmq.report"
"""The key of the record of the run."""
_EXTRA = "general.tensor_extra"  # keys of what llama.cpp is told of single tensors
_Named = Sequence[tuple[str, list[Part]]]  # by ggml's name; of experts all, in their order


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
    """Raise LlmqError unless OUT can become a GGUF file: it is not there, or is a GGUF file that may be replaced."""
    if out.is_dir():
        raise LlmqError(f"{out} is a folder; name the file to write, e.g. {out / 'model.gguf'}")
    if not one_file(out):
        raise LlmqError(f"{out} does not end in .gguf, by which llama.cpp's tools know its files; rename it")
    taken = [p for p in (out, *shards(out)) if p.exists()]
    if taken and not overwrite:
        raise LlmqError(f"{taken[0]} exists; give another name or --overwrite")
    if out.exists() and not _is_gguf(out):
        raise LlmqError(f"{out} is no GGUF file; it is not overwritten. Remove it, or give another name")


def shards(out: Path) -> list[Path]:
    """Return the files of earlier split writes of OUT: those that their first shard, by name and content, counts."""
    found = []
    for count in sorted(_counts(out)):
        files = [out.with_name(f"{out.stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
        if files[0].is_file() and _split_count(files[0]) == count:
            found += [f for f in files if f.exists()]
    return found


def _split_count(file: Path) -> object:
    try:
        return GgufFile(file).value("split.count")
    except LlmqError:
        return None


def _counts(out: Path) -> set[int]:
    """Return the numbers of shards that files beside OUT have in their names: names that a new write must not take."""
    name = re.compile(rf"{re.escape(out.stem)}-\d{{5}}-of-(\d{{5}})\.gguf")
    beside = out.parent.iterdir() if out.parent.is_dir() else ()
    return {int(found[1]) for p in beside if (found := name.fullmatch(p.name))}


def _is_gguf(path: Path) -> bool:
    """Say whether a file is one that this module writes. An empty one holds nothing to lose."""
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except OSError as e:
        raise LlmqError(f"cannot read {path} ({one_line(e)})") from e
    return start in (b"", b"GGUF")


def typed(staged: Sequence[Entry], types: Mapping[str, str]) -> list[Part]:
    """Return the parts of a file. types: what each tensor is stored in; those not named are left out."""
    return [Part(entry, types[entry.name]) for entry in staged if entry.name in types]


def write(stage: Path, out: Path, header: Header, parts: Sequence[Part], split: int = 0) -> list[Path]:
    """Write the staged tensors into the folder `stage`, as the file or the shards that OUT will be; return the files.

    split: bytes of tensors in a shard at most, 0 for one file.
    Raises LlmqError where a tensor has no place in the architecture or the disk is full.
    """
    arch = header.architecture
    named = _named(arch, parts)
    with writing(stage / out.name):
        writer = _declared(stage / out.name, header, named, split, False)
        if len(writer.tensors) > 1 and len(writer.tensors) in _counts(out):
            writer = _declared(stage / out.name, header, named, split, True)
        if len(writer.tensors) > 1 and len(writer.tensors) in _counts(out):
            raise LlmqError(f"{out} has shards of two numbers already; remove the older ones, or give another name")
        size = sum(tensor.nbytes for tensor in writer.tensors[0].values())
        writer.add_string(LAYOUT, f"{header.file_type} {size}")
        writer.add_string(seal.KEY, seal.blank(len(writer.tensors)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        files = writer.format_shard_names(stage / out.name)
        for _, tensor in contents(arch, parts):
            writer.write_tensor_data(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        writer.close()
        seal.seal(files)
    return files


def _declared(path: Path, header: Header, named: _Named, split: int, empty_first: bool) -> gguf.GGUFWriter:
    """Return a writer that knows all keys and the place of every tensor; nothing is written yet."""
    writer = gguf.GGUFWriter(path, header.architecture.name, split_max_size=split, small_first_shard=empty_first)
    _describe(writer, header)
    for ggml, tensor in header.architecture.extra().items():
        writer.add_tensor_info(ggml, tensor.shape, tensor.numpy().dtype, tensor.nbytes)
    for ggml, parts in named:
        _declare(writer, ggml, parts, header.architecture)
    if precise := _precise(named):
        writer.add_array(f"{_EXTRA}.name", precise)
        writer.add_array(f"{_EXTRA}.prec_a4", [False] * len(precise))
    return writer


def _precise(named: _Named) -> list[str]:
    """Return the tensors of 4-bit floats whose inputs are not to be rounded to 4 bits, as GPUs of NVIDIA else do.

    Of a weight whose inputs were meant to be, the file says a scale (NAME.input_scale).
    """
    kinds = {ggml: parts[0].kind for ggml, parts in named}
    small = [ggml for ggml, kind in kinds.items() if kind in ("MXFP4", "NVFP4")]
    return [ggml for ggml in small if f"{ggml.removesuffix('weight')}input_scale" not in kinds]


def contents(arch: Architecture, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by ggml's name, as it is written: converted, its rows in order."""
    yield from arch.extra().items()
    for ggml, several in _named(arch, parts):
        tensors = [_load(arch, part) for part in several]
        yield ggml, tensors[0] if arch.expert(several[0].entry.name) is None else torch.stack(tensors)


def _named(arch: Architecture, parts: Sequence[Part]) -> _Named:
    found: dict[str, list[Part]] = {}
    for part in parts:
        if (ggml := arch.tensor(part.entry.name)) is not None:
            found.setdefault(ggml, []).append(part)
    return [(ggml, sorted(several, key=lambda p: arch.expert(p.entry.name) or 0)) for ggml, several in found.items()]


def _describe(writer: gguf.GGUFWriter, header: Header) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(header.name)
    writer.add_file_type(header.file_type)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    for key, value in header.keys.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    header.architecture.describe(writer)
    header.vocabulary.describe(writer)


def _declare(writer: gguf.GGUFWriter, name: str, parts: Sequence[Part], arch: Architecture) -> None:
    part = parts[0]
    kind = KINDS[part.kind]
    shape = list(part.entry.shape)
    if part.kind in FLOATS:
        shape = list(arch.shape(part.entry.name, shape))
    else:
        shape[-1] = shape[-1] // kind.size * kind.columns
    if arch.expert(part.entry.name) is not None:
        shape = [len(parts), *shape]
    nbytes = torch.Size(shape).numel() // kind.columns * kind.size
    number: Any = kind.number  # written as it is, whether gguf-py knows it or not
    writer.add_tensor_info(name, shape, torch.empty(0).numpy().dtype, nbytes, raw_dtype=number)


def _load(arch: Architecture, part: Part) -> Tensor:
    tensor = part.entry.read()
    if part.kind in FLOATS:
        tensor = as_float(tensor, part.kind, part.entry.name)
    return arch.stored(part.entry.name, tensor, part.kind)


def as_float(tensor: Tensor, kind: str, name: str) -> Tensor:
    """Return a float tensor as F32, F16 or BF16. Raises LlmqError for a value that F16 cannot hold."""
    out = tensor.to(FLOAT_TYPES[kind])
    if kind == "F16" and torch.isinf(out).any():
        raise LlmqError(f"{name} holds values beyond float16's 65504; take BF16 or F32 in place of F16")
    return out
