"""Checksums: sha256 of a tensor, of a file, and of a record, which carries its own.

A tensor's is taken over its bytes, C order, little endian. A record (`quantization.json`) ends with that of its
canonical JSON: keys sorted, no spaces, UTF-8.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the sha256 of files by their path in a folder."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its own checksum as the last key."""
    return {**record, "sha256": _seal(record)}


def holds(record: Mapping[str, Any]) -> bool:
    """Return whether a record is as it was sealed."""
    return record.get("sha256") == _seal(record)


def _seal(record: Mapping[str, Any]) -> str:
    content = {k: v for k, v in record.items() if k != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def raw(tensor: Tensor) -> Any:
    """Return a tensor's bytes in C order, little endian."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
