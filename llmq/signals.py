"""Signals that end a run: Ctrl-C, SIGTERM (a scheduler) and SIGHUP (the terminal closed) end it alike, in one line.

The first becomes a KeyboardInterrupt, so that what was staged is removed, or kept and named. C code that meets one can
raise another error in its place, or none: whoever works in steps calls `check`, whoever prints the end asks `caught`.
More of them within two seconds are one gesture; a later one means that the end does not come, and ends the process.
In a chat Ctrl-C ends an answer or a line (`asked`, `apart`), and not the run.
Not here: what is said and with which status (cli.py), what is cleaned up (checkpoint/sink.py).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GESTURE = 2.0  # seconds
_first: list[tuple[int, float]] = []  # number and time of the signal that ends this process


def watch() -> None:
    """From now on have these signals raise KeyboardInterrupt, but for those that someone chose to ignore (nohup)."""
    for number in _ENDING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def hold() -> None:
    """From now on ignore them: the end has come."""
    for number in _ENDING:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)


def caught() -> int | None:
    """Return the number of the signal that ends this process, None where none came."""
    return _first[0][0] if _first else None


def check() -> None:
    """Raise KeyboardInterrupt where a signal has come, even if its own was lost."""
    if _first:
        raise KeyboardInterrupt


@contextmanager
def apart() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt in here and end nothing, however often it comes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def asked() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C end nothing in here: yield what says whether it came. A second one raises KeyboardInterrupt."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, _frame: Any) -> None:
    now = time.monotonic()
    if not _first:
        _first.append((number, now))
        raise KeyboardInterrupt
    if now - _first[0][1] > _GESTURE:
        with suppress(OSError):  # nobody may read it any more
            os.write(2, b"interrupted again: ended at once; what was staged is still beside OUT\n")
        os._exit(128 + number)
