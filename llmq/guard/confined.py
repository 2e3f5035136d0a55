"""A function called in a child process that may take so much time and memory, for what a hostile file can make of it.

A chat template is a program: it can loop for hours inside one C call, or ask for 10 GB, and nothing within its own
process can stop that. The same holds for a damaged file in a C++ reader, which may crash. In a child each is one line:

    with Confined(render, "the chat template") as call:
        text = call(row)            JSON there and back

The child is forked, so that it begins with everything that the parent has read, and costs some milliseconds. Its time
is processor time, so that a busy machine stops nothing; its memory is what it adds to the parent's. What it is at, it
notes where the parent can read it, so that the line names a row and not a file of a million rows.
Not here: what is called (calibration/).
"""

import faulthandler
import json
import mmap
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from llmq.errors import LlmqError, one_line, printable

SECONDS = 3
"""Processor time of one call, and of what is noted within it."""
BYTES = 2**30
"""Memory that the child may take beyond what it is born with."""
_PATIENCE = 120  # seconds by the clock, for a child that waits for a disk
_TOO_LARGE = f"takes more than {BYTES / 2**30:.0f} GB of memory"
_noted = mmap.mmap(-1, 1024)  # shared with every child
_limited: list[bool] = []  # filled in a child alone


def note(doing: str) -> None:
    """Say what this child begins now, `chat.jsonl, line 3`, for the error should it not end; its time starts anew."""
    text = printable(doing, 200).encode()[:1000]
    _noted[: len(text) + 1] = text + b"\0"
    if _limited:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS)


class Confined:
    """`call(value)` is `function(value)`, computed in the child; both are JSON.

    Raises LlmqError: what the function raised as such, or that `what`, or what it noted, takes too long, takes too much
    memory, or breaks off.
    """

    def __init__(self, function: Callable[[Any], Any], what: str) -> None:
        self._function, self._what = function, what

    def __enter__(self) -> Callable[[Any], Any]:
        """Start the child."""
        note(self._what)
        self._ours, theirs = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()
                self._serve(theirs)
            finally:
                if isinstance(e := sys.exc_info()[1], Exception):
                    note(f"{_said()} ({type(e).__name__}: {one_line(e)})")
                os._exit(1)  # whatever happened: none of the parent's clean-up is the child's
        theirs.close()
        return self._call

    def __exit__(self, *_: object) -> None:
        """End the child."""
        self._ours.close()
        self._reap()

    def _call(self, value: Any) -> Any:
        try:
            self._ours.send_bytes(json.dumps(value, default=str).encode())
            if not self._ours.poll(_PATIENCE):
                raise LlmqError(f"{_said()} takes more than {_PATIENCE} seconds")
            answer = json.loads(self._ours.recv_bytes())
        except (EOFError, OSError) as e:
            raise LlmqError(f"{_said()} {_ending(self._reap())}") from e
        if "error" in answer:
            raise LlmqError(answer["error"])
        return answer["value"]

    def _reap(self) -> int:
        """Kill the child, if it is still there, and return how it ended, as `waitpid` says."""
        if not self._pid:
            return 0
        os.kill(self._pid, signal.SIGKILL)
        self._pid, status = 0, os.waitpid(self._pid, 0)[1]
        return status

    def _serve(self, pipe: Connection) -> NoReturn:
        """Answer calls until the parent is gone; in the child."""
        faulthandler.disable()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal sends them to both; the parent acts
            signal.signal(number, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_DATA, _data_bytes() + BYTES)
        _limited.append(True)
        while True:
            value = json.loads(pipe.recv_bytes())
            note(_said())
            pipe.send_bytes(json.dumps(self._answer(value)).encode())

    def _answer(self, value: Any) -> dict[str, Any]:
        try:
            return {"value": self._function(value)}
        except LlmqError as e:
            return {"error": str(e)}
        except MemoryError:
            return {"error": f"{_said()} {_TOO_LARGE}"}


def _said() -> str:
    return bytes(_noted).partition(b"\0")[0].decode(errors="replace")


def _ending(status: int) -> str:
    """Return in words how a child ended that did not answer."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds"
    if number in (signal.SIGKILL, signal.SIGABRT):  # by the kernel that has no memory, by C++ code that got none
        return f"{_TOO_LARGE}, or is damaged"
    return f"breaks off ({signal.Signals(number).name if number else f'status {os.waitstatus_to_exitcode(status)}'})"


def _limit(what: int, value: int) -> None:
    """Lower a soft limit, never above the hard one."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _data_bytes() -> int:
    """Return the size of this process's heap and private mappings, 2^62 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmData:")), 2**62)
