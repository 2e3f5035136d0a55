"""`llmq` in processes of its own that need not import it again: each is forked from one that has done nothing else.

    done = llmq("quantize", "./my-llama", "./out")      a subprocess.CompletedProcess: returncode, stdout, stderr
    terminal = Terminal("chat", "./my-llama")           one that is typed to and read from, as at a screen

Starting `python -m llmq` costs seconds, most of them torch's and transformers' imports; this a tenth of one.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import termios
import time
from multiprocessing import forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([f"llmq.{m}" for m in ("cli", "api", "loading", "pipeline.run", "evaluation.scores")])
_WIDE = {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}  # of what is printed; read when llmq is imported


def llmq(*args: object, stdout: int | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command of llmq. stdout: the file descriptor that it prints to, in place of one that is read here."""
    command = [str(a) for a in args]
    _start()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "stdout", Path(folder) / "stderr"]
        child = _CONTEXT.Process(target=_run, args=(command, str(Path.cwd()), *files, _passed(stdout)))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        printed = [f.read_text() if f.exists() else "" for f in files]
    return subprocess.CompletedProcess(command, child.exitcode, *printed)


class Terminal:
    """A command of llmq at a terminal of its own."""

    def __init__(self, *args: object) -> None:
        self._at, theirs = pty.openpty()
        _start()
        given = multiprocessing.reduction.DupFd(theirs)
        self._child = _CONTEXT.Process(target=_seated, args=([str(a) for a in args], given))
        self._child.start()
        os.close(theirs)
        self._seen = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Read on until a pattern is there; return what was read."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self._seen):
            if time.monotonic() > end:
                raise TimeoutError(f"no {pattern!r} in {self._seen!r}")
            if select.select([self._at], [], [], 1)[0]:
                self._seen += os.read(self._at, 4096).decode(errors="replace")
        seen, self._seen = self._seen, ""
        return seen

    def type(self, text: str) -> None:
        r"""Type a text; "\x03" is Ctrl-C, "\x04" Ctrl-D."""
        os.write(self._at, text.encode())

    def ends(self, seconds: float = 60) -> int | None:
        """Return with which status the command ended."""
        self._child.join(seconds)
        os.close(self._at)
        return self._child.exitcode


def _start() -> None:
    """Start the process that the others are forked from, if it does not run, for the environment that it keeps."""
    before = os.environ.copy()
    os.environ.update(_WIDE)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def _passed(descriptor: int | None) -> object:
    """Return what carries an open file to another process."""
    return None if descriptor is None else multiprocessing.reduction.DupFd(descriptor)


def _run(command: list[str], cwd: str, stdout: Path, stderr: Path, given: object) -> None:
    """Run a command in the process that was forked for it."""
    os.chdir(cwd)
    out = given.detach() if given is not None else os.open(stdout, os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = ["llmq", *command]
    from llmq.cli import main

    main()


def _seated(command: list[str], given: object) -> None:
    """Run a command at a terminal, in the process that was forked for it."""
    os.setsid()
    at = given.detach()  # type: ignore[attr-defined]
    fcntl.ioctl(at, termios.TIOCSCTTY, 0)
    for stream in range(3):
        os.dup2(at, stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.update(TERM="dumb", COLUMNS="120")
    sys.argv = ["llmq", *command]
    from llmq.cli import main

    main()
