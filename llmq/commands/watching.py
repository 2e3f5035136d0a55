"""How long work is watched: on a bar, in lines where the output is no terminal, in a log for machines.

    block 3: self_attn.q_proj, k_proj, v_proj: solve ━━━━━━       3/32 0:02:10 19 min left, 1.8 GB now, 2.1 at most

    block 3, 3 of 32 done, 2 min, 19 min left, 1.8 GB now, 2.1 GB at most

    {"event": "step", "time": 1764428312.5, "what": "block 3", "done": 3, "total": 32, "step": "solve", ...}

Not here: what is told and when (progress.py), the meaning of the log's keys for a user (docs/log.md).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmq import __version__, signals
from llmq.checkpoint.place import check_file, user_path
from llmq.errors import LlmqError, one_line, printable
from llmq.progress import Event, Listener, Memory
from llmq.show import labelled, plain, span

_APART = 10.0  # seconds between two lines, at least
_OPENED = b'{"event": '


class Everyone(Listener):
    """Several listeners as one, which ends the work where a signal has come."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners

    def hear(self, event: Event) -> None:
        """See `Listener.hear`."""
        signals.check()
        for listener in self._listeners:
            listener.hear(event)


class Bar(Listener):
    """A bar on a terminal. A context manager: it is wiped off at the end."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn())
        rest = (TimeElapsedColumn(), TextColumn("{task.fields[rest]}", markup=False))
        self._bar = Progress(*columns, *rest, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None, rest="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def hear(self, event: Event) -> None:
        """See `Listener.hear`."""
        if event.kind in ("begin", "step"):
            doing = ": ".join(s for s in (event.what, together(event.names), event.step) if s)
            rest = ", ".join([*_left(event), held(event.memory)])
            self._bar.update(
                self._task, completed=event.done, total=event.total, description=printable(doing, 60), rest=rest
            )
        elif event.kind == "plan":
            self._bar.console.print(labelled("plan", "dim", event.what), soft_wrap=True)


class Lines(Listener):
    """Lines at a sensible pace, where the output is a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, 0.0

    def hear(self, event: Event) -> None:
        """See `Listener.hear`."""
        if event.kind == "plan":
            self._console.print(labelled("plan", "dim", event.what), soft_wrap=True)
        elif event.kind == "begin" and event.seconds - self._last >= _APART:
            self._last = event.seconds
            where = [f"{event.done} of {event.total} done"] if event.done < event.total else []
            parts = [event.what, *where, span(event.seconds), *_left(event), held(event.memory)]
            self._console.print(plain(", ".join(parts)), soft_wrap=True)


class JsonLog(Listener):
    """A file of one JSON object a line, appended to. A context manager: the last line says how the work ended.

    warn: is told where the file cannot be written any more; the work goes on.
    Raises LlmqError where the file cannot be opened, or is not such a log.
    """

    def __init__(self, path: str | Path, warn: Callable[[str], object]) -> None:
        self._path, self._warn = user_path(path), warn
        check_file(self._path, "--log-json", _OPENED, overwrite=True)
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        try:
            torn = _torn(self._path)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as e:
            raise LlmqError(f"--log-json {self._path} cannot be written ({one_line(e)})") from e
        if torn:
            self._file.write("\n")
        self._write("open", llmq=__version__, command=sys.argv[1:])
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._write("end", memory=_of(Memory.held()))
        else:
            self._write("failed", error=f"{kind.__name__}: {one_line(e)}" if e else kind.__name__)
        if self._file is not None:
            self._file.close()

    def hear(self, event: Event) -> None:
        """See `Listener.hear`."""
        said = {"what": event.what, "done": event.done, "total": event.total}
        within = {"step": event.step, "names": list(event.names)} if event.step else {}
        left = None if event.left is None else round(event.left, 1)
        self._write(event.kind, **said, **within, seconds=round(event.seconds, 3), left=left, memory=_of(event.memory))

    def _write(self, event: str, **more: Any) -> None:
        if self._file is None:
            return
        line = {"event": event, "time": round(time.time(), 3)} | {k: v for k, v in more.items() if v is not None}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as e:
            self._file = None
            self._warn(f"--log-json {self._path} cannot be written any more ({one_line(e)}); the work goes on without")


def _torn(path: Path) -> bool:
    """Say whether a file ends within a line, as where the machine went down."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read(1) != b"\n"


def together(names: Sequence[str]) -> str:
    """Return the names of the linears of a site with what they share said once: `self_attn.q_proj, k_proj`."""
    if not names:
        return ""
    parent = names[0].rpartition(".")[0]
    return ", ".join([names[0], *(n.removeprefix(f"{parent}.") for n in names[1:])])


def held(memory: Memory) -> str:
    """Return what memory is held in words."""
    said = f"{memory.now / 1e9:.1f} GB now, {memory.most / 1e9:.1f} GB at most"
    if memory.device_now is None or memory.device_most is None:
        return said
    return f"{said}; GPU {memory.device_now / 1e9:.1f} GB now, {memory.device_most / 1e9:.1f} GB at most"


def _left(event: Event) -> list[str]:
    return [] if event.left is None or event.done == event.total else [f"{span(event.left)} left"]


def _of(memory: Memory) -> dict[str, int]:
    return {k: v for k, v in vars(memory).items() if v is not None}
