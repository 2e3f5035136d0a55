"""Writes that last: a failure is one line, a rename counts only when what it names is on the disk.

    data written, file synced -> folder synced -> rename, or exchange of two names in one step -> folder synced

A file system may keep a rename and lose the data that was written before it, so the order above is the whole point.
Source: renameat2(2), RENAME_EXCHANGE; fsync(2) on why a folder is synced too.
Not here: what is written (sink.py), where a run works (stage.py).
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmq.errors import LlmqError, one_line

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a failed write raises into an LlmqError that names the file."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as e:  # ValueError: a NUL or half a surrogate pair in a name or text
        full = getattr(e, "errno", None) in _FULL or "No space left" in str(e)
        raise LlmqError(f"cannot write {path} ({one_line(e)}){'; make room on the disk' if full else ''}") from e


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(at)


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8 wherever it runs, so that it is whole, old or new, whatever happens.

    Raises LlmqError where it cannot be written.
    """
    with writing(path):
        if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout
            path.write_text(text, encoding="utf-8")
            return
        with renewed(path) as new:
            new.write_text(text, encoding="utf-8")


@contextmanager
def renewed(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Yield the name under which to write a file; it then takes its place whole or, after an error, not at all.

    synced: whether that also holds when the power fails, not only when the process is killed.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield new
        if synced:
            put_file(new, path)
            sync(path.parent)
        else:
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def put_file(new: Path, path: Path) -> None:
    """Move a file to its place, in one step, over what is there; by way of a copy where it lies on another disk."""
    sync(new)
    try:
        new.replace(path)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            shutil.copyfile(new, beside)
            sync(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def put_folder(new: Path, out: Path, aside: Path) -> None:
    """Give the folder `new` the name `out`. What had that name is `new` afterwards, or `aside`.

    In one step where the system can. Elsewhere in two, and on any error between them the old folder is put back; a kill
    between them leaves it at `aside`, for `put_back`.
    """
    if not out.exists():
        new.rename(out)
    elif not exchange(new, out):
        out.rename(aside)
        try:
            new.rename(out)
        finally:
            put_back(aside, out)


def put_back(aside: Path, out: Path) -> None:
    """Rename a folder that was moved aside back to `out`, where nothing has taken its place."""
    if aside.exists() and not out.exists():
        aside.rename(out)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. Returns False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(b))
