"""The folder beside OUT in which a run works: made by mkdir, marked as llmq's, locked while the run lives.

    OUT.llmq-partial/
        .llmq-stage.json   whose it is: OUT, process, machine, and the run (source, recipe); flock is held on it
        part-00000 ...     a finished block each
        journal/           what else the run has finished, and how far it came (journal.py)
        new/               what becomes OUT; after the exchange, what OUT was
        old/               what OUT was, where the system cannot exchange two names
        whole.json         written after all checks: the files that make OUT and those that they replace (size, time),
                           and the run's result

A kill can leave such a folder behind. Its lock is free then, and whole.json tells what it is, whatever the moment:

    empty        nothing was in it yet, or nothing is any more
    committed    OUT is what whole.json lists: only the cleaning up is missing
    whole        each file of the list is in new/ or in its place: the same command commits it
    unfinished   anything else: the same command goes on in it, another one with `--overwrite` removes it

A folder without the marker is the user's, whatever its name: another name is taken.
Not here: what is written into it (sink.py), what OUT may be (place.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from llmq import __version__
from llmq.checkpoint.disk import put_back, sync, write_text, writing
from llmq.checkpoint.journal import NOW, SYNCED
from llmq.checkpoint.place import AFTERWARDS
from llmq.errors import LlmqError, one_line, printable
from llmq.guard.reading import json_object

SUFFIX = ".llmq-partial"
MARKER, WHOLE, JOURNAL = ".llmq-stage.json", "whole.json", "journal"
_CPUS = Path("/proc/cpuinfo")
State = Literal["empty", "committed", "whole", "unfinished"]


class Stage:
    """A stage whose lock this process holds."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.new, self.old = folder, folder / "new", folder / "old"
        self._lock = lock

    @classmethod
    def make(cls, out: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> Stage:
        """Make the stage of a run. overwrite: whether it was told to replace OUT.

        Raises LlmqError where the disk, the folder or another run does not let it.
        """
        said = {"llmq": __version__, "out": str(out), "overwrite": overwrite, "run": dict(run)} | _process()
        folder = _name(out)
        with writing(folder):
            folder.mkdir(exist_ok=True)
            try:
                lock = _lock(folder / MARKER, os.O_CREAT | os.O_EXCL)  # of two runs, one makes the marker
            except (FileExistsError, BlockingIOError) as e:
                raise _taken(folder) from e
            except OSError:  # a file system without locks
                shutil.rmtree(folder)
                raise
            stage = cls(folder, lock)
            try:
                _write(folder / MARKER, said)
                stage.new.mkdir()
                sync(folder)
                sync(folder.parent)
            except BaseException:
                stage.remove()
                raise
        return stage

    @classmethod
    def open(cls, folder: Path) -> Stage:
        """Take the stage of an earlier run. Raises LlmqError where that run lives, naming its process."""
        try:
            return cls(folder, _lock(folder / MARKER))
        except BlockingIOError as e:
            raise _taken(folder) from e
        except OSError as e:
            raise LlmqError(f"cannot open {folder / MARKER} ({one_line(e)})") from e

    def take(self) -> list[str]:
        """Make the stage of an earlier run this process's own, to go on in it: nothing is left in `new`.

        Returns in what the machine differs from that of the earlier run: "threads 2, not 1".
        """
        before, now = marker(self.folder) or {}, _process()
        mine = self.folder / f"{MARKER}.new"
        with writing(mine):
            mine.unlink(missing_ok=True)
            lock = _lock(mine, os.O_CREAT | os.O_EXCL)  # on the new one first: at no moment is none locked
            _write(mine, before | now)
            mine.replace(self.folder / MARKER)
            os.close(self._lock)
            self._lock = lock
            if self.new.exists():
                shutil.rmtree(self.new)
            self.new.mkdir()
            sync(self.folder)
        return [f"{k} {before.get(k)}, not {now[k]}" for k in ("host", "cpu", "threads") if before.get(k) != now[k]]

    def __str__(self) -> str:
        """Return where it lies and how much it holds."""
        return printable(f"{self.folder} ({self.size() / 1e9:.2f} GB)")

    def size(self) -> int:
        """Return the bytes that it holds."""
        return sum(f.lstat().st_size for f in self.folder.rglob("*") if not f.is_dir())

    def close(self) -> None:
        """Let the lock go."""
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the stage. Raises LlmqError where a file cannot be."""
        last = [self.folder / WHOLE, self.folder / MARKER]  # they say that the rest can go
        with writing(self.folder):
            self._remove([p for p in self.folder.iterdir() if p not in last] + last)
            self.folder.rmdir()
        self.close()

    def _remove(self, paths: Iterable[Path]) -> None:
        """Remove files and folders, first of all what says how far the run came: the rest then counts for nothing."""
        for path in [self.folder / JOURNAL / NOW, self.folder / JOURNAL / SYNCED, *paths]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def run(self) -> dict[str, Any]:
        """Return what the run that made the stage said about itself."""
        return dict((marker(self.folder) or {}).get("run", {}))

    def overwrites(self) -> bool:
        """Say whether the run that made the stage was told to replace OUT."""
        return bool((marker(self.folder) or {}).get("overwrite"))

    def mark(self, result: Mapping[str, Any], stale: Callable[[list[str]], list[Path]]) -> None:
        """Sync what was staged, then write whole.json: the stage is whole; what it was made of goes.

        Raises LlmqError on a full disk.

        stale: what the files of these names, placed, leave to be removed.
        """
        with writing(self.folder):
            inside = sorted(self.new.rglob("*"))
            for path in (*inside, *self.folder.glob("beside-*"), self.new, self.folder):
                sync(path)
            files = {p.relative_to(self.new).as_posix(): look(p) for p in inside if not p.is_dir()}
            old = {p.name: look(p) for p in stale(list(files))}
        write_text(self.folder / WHOLE, json.dumps({"files": files, "stale": old, "result": result}))
        with writing(self.folder):
            self._remove([*self.folder.glob("part-*"), self.folder / JOURNAL])

    def files(self) -> dict[str, Any]:
        """Return the names that whole.json lists; none where the stage is unfinished."""
        return dict(self._whole().get("files", {}))

    def stale(self) -> dict[str, Any]:
        """Return the names of the files that are to be removed when all are placed, and what they were."""
        return dict(self._whole().get("stale", {}))

    def result(self) -> dict[str, Any]:
        """Return what the run that marked the stage had to say."""
        return dict(self._whole().get("result", {}))

    def state(self, place: Callable[[str], Path]) -> State:
        """Say what the stage is. place: where a file of it belongs, by its name."""
        if all(p.name == MARKER or (p == self.new and not any(p.iterdir())) for p in self.folder.iterdir()):
            return "empty"
        files = self.files()
        placed = {n for n, seen in files.items() if look(place(n)) == seen}
        staged = {n for n, seen in files.items() if look(self.new / n) == seen}
        if not files or placed | staged != files.keys():
            return "unfinished"
        return "committed" if placed == files.keys() else "whole"

    def put_back(self, out: Path) -> None:
        """Give OUT its old content back, if a kill came between two renames."""
        with writing(out):
            put_back(self.old, out)

    def _whole(self) -> dict[str, Any]:
        file = self.folder / WHOLE
        return json_object(file) if file.exists() else {}


def stages(out: Path) -> Iterator[Path]:
    """Yield the stages of OUT that are there: folders beside it that are marked as llmq's, for this name."""
    if not out.parent.is_dir():
        return
    for folder in sorted(out.parent.iterdir()):
        if folder.name.startswith(out.name + SUFFIX) and folder.is_dir() and not folder.is_symlink():
            said = marker(folder)
            if said is not None and Path(str(said.get("out", out))).name == out.name:
                yield folder


def marker(folder: Path) -> dict[str, Any] | None:
    """Return what a stage's marker says, None for a folder without one; a damaged one says nothing."""
    if not (folder / MARKER).is_file():
        return None
    try:
        return json_object(folder / MARKER)
    except LlmqError:
        return {}


def _process() -> dict[str, Any]:
    """Return which process this is, and that of its machine by which roundings may differ."""
    names = [line for line in _CPUS.read_text().splitlines() if line.startswith("model name")] if _CPUS.exists() else []
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _write(file: Path, said: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(said, indent=2) + "\n")
    sync(file)


def _taken(folder: Path) -> LlmqError:
    run = marker(folder) or {}
    return LlmqError(
        f"{run.get('out', folder)} is being written by process {run.get('pid')} on {run.get('host')} (since "
        f"{run.get('started')}); wait for it, or name another OUT"
    )


def _name(out: Path) -> Path:
    """Return the first free name of a stage, or an empty folder: OUT.llmq-partial, OUT.llmq-partial-2 ..."""
    n = 1
    while os.path.lexists(folder := out.with_name(f"{out.name}{SUFFIX}{'' if n == 1 else f'-{n}'}")):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            break
        n += 1
    return folder


def _lock(file: Path, how: int = 0) -> int:
    """Lock a file and return its descriptor. Raises BlockingIOError where another process has it, or has removed it."""
    at = os.open(file, os.O_RDWR | os.O_CLOEXEC | how, 0o666)
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not file.exists() or os.fstat(at).st_ino != file.stat().st_ino:
            raise BlockingIOError
    except BaseException:
        os.close(at)
        raise
    return at


def fingerprint(folder: Path) -> str:
    """Return what a checkpoint is known by: its folder, and a digest of names, sizes and times of its files.

    The card and what llmq adds later are none of it: figures may be kept while a run waits to go on.
    """
    files = sorted(f for f in folder.iterdir() if f.suffix != ".md" and f.name not in AFTERWARDS and f.is_file())
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]  # of what a link points to
    return f"{folder.resolve()} with files {hashlib.sha256(repr(seen).encode()).hexdigest()[:12]}"


def look(path: Path) -> list[int] | None:
    """Return size and time of a file, by which it is known again after a rename; None where there is none."""
    try:
        seen = path.lstat()
    except OSError:
        return None
    return [seen.st_size, seen.st_mtime_ns]
