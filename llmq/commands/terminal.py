"""Where commands print, and what they show while they work.

    with progress() as work:
        work(3, 32, "block 3")        # a bar with the time left, where the output is a terminal

A reader may go away (`| head`, a terminal that closes): the work goes on, and what is printed goes nowhere.
Not here: the bar, the lines and the log themselves (watching.py), tables (show.py).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console

from llmq import launched
from llmq.errors import LlmqError, one_line
from llmq.show import labelled

if TYPE_CHECKING:
    from llmq.progress import Work

console = Console()
_UNREAD = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class _Outliving:
    """An output stream that outlives its reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._nowhere():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _nowhere(self) -> Iterator[None]:
        """Where nothing can be written any more, have the descriptor lead nowhere: what is buffered goes there too.

        Raises LlmqError unless it was a reader who went away.
        """
        try:
            yield
        except OSError as e:
            with Path(os.devnull).open("w") as null:
                os.dup2(null.fileno(), self._stream.fileno())
            if e.errno not in _UNREAD:
                said = f"what llmq prints cannot be written: {one_line(e)}"
                raise LlmqError(f"{said}; make room where it goes, or send it elsewhere") from e


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Have no write to stdout and stderr fail for want of a reader, in here."""
    _open_closed()
    out, err = (cast(TextIO, _Outliving(s)) for s in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:  # what Python would flush only when nobody looks after it any more
            out.flush()
            err.flush()


def _open_closed() -> None:
    """Have a stream that was closed before llmq began (`>&-`) lead nowhere, to the end.

    The next file that is opened would get its number, and what a library prints there.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115, to the end


def warn(warning: str) -> None:
    """Print a warning."""
    console.print(labelled("warning", "yellow", warning))


@contextmanager
def progress(log: Path | None = None) -> Iterator[Work]:
    """Yield what long work is told to: a bar on a terminal, else lines; and the file of --log-json, where one is given.

    Of several processes the first shows and logs; the others hear signals alone.
    Raises LlmqError for a file that cannot be written, or holds something else.
    """
    from llmq.commands.watching import Bar, Everyone, JsonLog, Lines
    from llmq.progress import Work

    if not launched.leads():
        yield Work(Everyone([]))
        return
    with ExitStack() as stack:
        logs = [stack.enter_context(JsonLog(log, warn))] if log else []
        shown = stack.enter_context(Bar(console)) if console.is_terminal else Lines(console)
        yield Work(Everyone([shown, *logs]))
