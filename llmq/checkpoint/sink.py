"""A checkpoint written: part by part, joined into shards, moved into place when whole.

`Sink` stages everything beside OUT, one part file for each block as it is finished, joins the parts into shards of
bounded size by copying bytes (never more than a buffer in memory), and renames the folder to OUT at the very end: OUT
is whole or absent.
Not here: what the tensors mean (formats), reading a checkpoint (source.py).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmq.checkpoint.source import ADAPTER, side_files
from llmq.errors import LlmqError, one_line
from llmq.reading import BITS, DTYPES, Entry, tensor_entries
from llmq.records import digest

SHARD_BYTES = 5 * 10**9
_REPLACED = ("config.json", ADAPTER, "*.index.json", "quantize_config.json", "quantization.json")


class Sink:
    """The output folder while it is being made. A context manager: leaving it by an error removes what was staged."""

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.refuse(out, overwrite=overwrite)
        self.out = out
        self.stage = out.with_name(out.name + ".partial")
        self.digests: dict[str, str] = {}  # sha256 of every tensor, by name, taken from memory
        self._parts: list[Path] = []

    def __enter__(self) -> Self:
        try:
            if self.stage.exists():
                shutil.rmtree(self.stage)
            self.stage.mkdir(parents=True)
        except OSError as e:
            raise LlmqError(f"cannot write {self.stage} ({e.strerror})") from e
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)

    def refuse(self, out: Path, *, overwrite: bool) -> None:
        """Raise LlmqError unless OUT can be written."""
        if out.exists() and not overwrite:
            raise LlmqError(f"{out} exists; give another folder or --overwrite")
        if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
            raise LlmqError(f"{out} is not a checkpoint folder; it is not overwritten")

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: the tensors of a block, contiguous, on any device."""
        part = self.stage / f"part-{len(self._parts):05d}"
        own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        seen: set[int] = set()
        for name, tensor in own.items():
            if tensor.data_ptr() in seen:  # linears of a site share a g_idx or an input scale; a file holds copies
                own[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        with writing(part):
            save_file(own, part)
        self._parts.append(part)
        self.digests |= {name: digest(tensor) for name, tensor in own.items()}

    def replace(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors in the place of those of the same name in the joined shards, in the dtype that they have there.

        In place: no byte of the stage counts before all of it is whole.
        """
        entries = {n: e for f in self.stage.glob("*.safetensors") for n, e in tensor_entries(f).items()}
        for name, tensor in tensors:
            entry = entries[name]
            own = tensor.detach().cpu().to(DTYPES[entry.dtype]).contiguous()
            with writing(entry.file), entry.file.open("r+b") as f:
                f.seek(entry.start)
                f.write(own.reshape(-1).view(torch.uint8).numpy().data)
            self.digests[name] = digest(own)

    def require(self, need: int) -> None:
        """Raise LlmqError where the disk has less than `need` bytes free."""
        free = shutil.disk_usage(self.stage).free
        if free < need:
            raise LlmqError(f"{self.out} needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; make room")

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        with writing(self.stage / name):
            (self.stage / name).write_text(content)

    def copy_files(self, source: Path) -> None:
        """Copy tokenizer, chat template, generation and preprocessor files: all that is not weights or config."""
        for file in side_files(source):
            target = self.stage / file.relative_to(source)
            if not any(file.match(p) for p in _REPLACED):
                with writing(target):
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)

    def files(self) -> list[Path]:
        """Return the staged files that OUT will hold."""
        return sorted(p for p in self.stage.rglob("*") if p.is_file())

    def staged(self) -> list[Entry]:
        """Return where each staged tensor lies, in the order they were added."""
        return [t for part in self._parts for t in tensor_entries(part).values()]

    def join(self, shard_bytes: int = SHARD_BYTES) -> int:
        """Join the parts into shards (and an index where there are several). Returns the bytes of all tensors."""
        tensors = self.staged()
        shards = list(_fill(tensors, shard_bytes))
        width, weight_map = len(shards), {}
        for i, shard in enumerate(shards):
            name = "model.safetensors" if width == 1 else f"model-{i + 1:05d}-of-{width:05d}.safetensors"
            with writing(self.stage / name):
                _write_shard(self.stage / name, shard)
            weight_map.update({t.name: name for t in shard})
        total = sum(t.nbytes for t in tensors)
        if width > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        for part in self._parts:
            part.unlink()
        return total

    def commit(self) -> None:
        """Move the staged folder to OUT."""
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".old")
            self.out.rename(old)
            self.stage.rename(self.out)
            shutil.rmtree(old)
        else:
            self.stage.rename(self.out)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what fails while a file is written into one line."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise LlmqError(f"cannot write {path} ({one_line(e)}); is the disk full?") from e


def _fill(tensors: list[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    for t in tensors:
        if shard and sum(s.nbytes for s in shard) + t.nbytes > shard_bytes:
            yield shard
            shard = []
        shard.append(t)
    if shard:
        yield shard


def _write_shard(path: Path, tensors: list[Entry]) -> None:
    """Write a safetensors file: u64 header length, JSON header, data; wide dtypes first, so that all stay aligned."""
    tensors = sorted(tensors, key=lambda t: (-BITS[t.dtype], t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            with t.file.open("rb") as f:
                f.seek(t.start)
                _copy(f, out, t.nbytes)


def _copy(source: BinaryIO, target: BinaryIO, n: int) -> None:
    while n:
        chunk = source.read(min(n, 1 << 22))
        if not chunk:
            raise LlmqError(f"{source.name} ended early while shards were being joined; was it changed from outside?")
        target.write(chunk)
        n -= len(chunk)
