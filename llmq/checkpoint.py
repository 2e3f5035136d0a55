"""Checkpoints on disk: read tensor by tensor, written part by part, moved into place when whole.

`Source` answers with one tensor at a time straight from the safetensors shards. `Sink` stages everything in
`OUT.partial`, one part file for each block as it is finished, joins the parts into shards of bounded size by copying
bytes (never more than a buffer in memory), and renames the folder to OUT at the very end: OUT is whole or absent.
Not here: what the tensors mean (stream, formats).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmq.types import LlmqError

SHARD_BYTES = 5 * 10**9
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_REPLACED = ("config.json", "*.index.json", "quantize_config.json", "quantization.json")
_WIDTH = {"I64": 8, "F64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}  # bytes of safetensors' dtypes; others: 1
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def resolve(name: str) -> Path:
    """Return the local folder of a checkpoint: `name` itself, or a download of that Hub id.

    Downloads configuration, tokenizer and safetensors only. Raises LlmqError where there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise LlmqError(f"{name} is a file; give the folder that holds config.json and the .safetensors files")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise LlmqError(f"{name} is not a folder; give a checkpoint folder or a Hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*_COPIED, "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise LlmqError(f"{name} is not a local folder and the Hub did not deliver it ({reason})") from e


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json. Raises LlmqError where it is missing, broken, or asks for the checkpoint's own code."""
    file = path / "config.json"
    if not file.is_file():
        raise LlmqError(f"{path} has no config.json; a transformers checkpoint folder is needed")
    try:
        config = json.loads(file.read_text())
    except ValueError as e:
        raise LlmqError(f"{file} is not valid JSON ({e})") from e
    if "auto_map" in config:
        raise LlmqError(f"{path} needs code from the checkpoint (auto_map in config.json); llmq never runs such code")
    return config


class Source:
    """A checkpoint's tensors by name.

    Raises LlmqError for a missing, truncated or pickle-only file, each by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self._place: dict[str, tuple[str, str]] = {}  # the file of a tensor, and its name there
        for file in self._files():
            with _open(path / file) as f:
                self._place |= {name: (file, name) for name in f.keys()}  # noqa: SIM118, not a dict

    def _files(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError) as e:
                raise LlmqError(f"{index} is not a valid index ({e}); download it again") from e
        elif (self.path / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            files = sorted(f.name for f in self.path.glob("*.safetensors"))
        if not files and (list(self.path.glob("*.bin")) or list(self.path.glob("*.pt*"))):
            raise LlmqError(
                f"{self.path} holds pickle files only (.bin, .pt), which can run code when read; convert them where "
                "you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        if not files:
            raise LlmqError(f"{self.path} holds no .safetensors file")
        for file in files:
            if not (self.path / file).is_file():
                raise LlmqError(f"shard {file} is missing from {self.path}; download it again")
        return files

    def names(self) -> list[str]:
        """Return all tensor names."""
        return list(self._place)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def get(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype. Raises LlmqError where the checkpoint does not have it."""
        if name not in self._place:
            raise LlmqError(f"tensor {name} is missing from {self.path}; the checkpoint does not match its config.json")
        file, there = self._place[name]
        with _open(self.path / file) as f:
            return f.get_tensor(there)

    @property
    def dtype(self) -> torch.dtype:
        """What the checkpoint is stored in: the dtype of its first tensor."""
        return Source.get(self, next(iter(self._place))).dtype

    def headers(self) -> dict[str, tuple[str, list[int]]]:
        """Return the dtype (in safetensors' spelling) and shape of every tensor, without reading any."""
        out = {}
        for name, (file, there) in self._place.items():
            with _open(self.path / file) as f:
                view = f.get_slice(there)
                out[name] = (view.get_dtype(), list(view.get_shape()))
        return out

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every tensor."""
        return {name: prod(shape) * _WIDTH.get(dtype, 1) for name, (dtype, shape) in self.headers().items()}

    def bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.path / f).stat().st_size for f in {file for file, _ in self._place.values()})

    def check(self) -> None:
        """Read every tensor once. Raises LlmqError naming the first that is not float or not finite."""
        for name in self._place:
            tensor = self.get(name)
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise LlmqError(f"tensor {name} is {kind}; llmq quantizes float32, bfloat16 and float16 checkpoints")
            if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():  # NaN is a minimum
                raise LlmqError(f"tensor {name} holds NaN or Inf; the checkpoint is damaged, or its training diverged")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise LlmqError(f"{path} is truncated or not safetensors ({e}); download it again") from e


class Sink:
    """The output folder while it is being made. A context manager: leaving it by an error removes what was staged."""

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.refuse(out, overwrite=overwrite)
        self.out = out
        self.stage = out.with_name(out.name + ".partial")
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
        with _writing(part):
            save_file(own, part)
        self._parts.append(part)

    def require(self, need: int) -> None:
        """Raise LlmqError where the disk has less than `need` bytes free."""
        free = shutil.disk_usage(self.stage).free
        if free < need:
            raise LlmqError(f"{self.out} needs {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free; make room")

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        with _writing(self.stage / name):
            (self.stage / name).write_text(content)

    def copy_files(self, source: Path) -> None:
        """Copy tokenizer, chat template, generation and preprocessor files: all that is not weights or config."""
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if not any(file.match(p) for p in _REPLACED):
                    with _writing(self.stage / file.name):
                        shutil.copyfile(file, self.stage / file.name)

    def staged(self) -> list[tuple[Path, str]]:
        """Return where each staged tensor lies: its part file and its name there, in the order they were added."""
        return [(part, t.name) for part in self._parts for t in _header(part)]

    def join(self, shard_bytes: int = SHARD_BYTES) -> int:
        """Join the parts into shards (and an index where there are several). Returns the bytes of all tensors."""
        tensors = [t for part in self._parts for t in _header(part)]
        shards = list(_fill(tensors, shard_bytes))
        width, weight_map = len(shards), {}
        for i, shard in enumerate(shards):
            name = "model.safetensors" if width == 1 else f"model-{i + 1:05d}-of-{width:05d}.safetensors"
            with _writing(self.stage / name):
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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise LlmqError(f"cannot write {path} ({getattr(e, 'strerror', None) or e}); is the disk full?") from e


class _Stored:
    """A tensor in a part file: header entry and where its bytes lie."""

    def __init__(self, part: Path, name: str, entry: dict[str, Any], data_start: int) -> None:
        self.part, self.name, self.dtype, self.shape = part, name, entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        self.begin, self.nbytes = data_start + begin, end - begin


def _header(part: Path) -> Iterator[_Stored]:
    with part.open("rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        for name, entry in json.loads(f.read(size)).items():
            if name != "__metadata__":
                yield _Stored(part, name, entry, 8 + size)


def _fill(tensors: list[_Stored], shard_bytes: int) -> Iterator[list[_Stored]]:
    shard: list[_Stored] = []
    for t in tensors:
        if shard and sum(s.nbytes for s in shard) + t.nbytes > shard_bytes:
            yield shard
            shard = []
        shard.append(t)
    if shard:
        yield shard


def _write_shard(path: Path, tensors: list[_Stored]) -> None:
    """Write a safetensors file: u64 header length, JSON header, data; wide dtypes first, so that all stay aligned."""
    tensors = sorted(tensors, key=lambda t: (-_WIDTH.get(t.dtype, 1), t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            with t.part.open("rb") as f:
                f.seek(t.begin)
                _copy(f, out, t.nbytes)


def _copy(source: BinaryIO, target: BinaryIO, n: int) -> None:
    while n:
        chunk = source.read(min(n, 1 << 22))
        if not chunk:
            raise LlmqError(f"{source.name} ended early while shards were being joined; was it changed from outside?")
        target.write(chunk)
        n -= len(chunk)
