"""`llmq` in processes of its own that need not import it again: each is forked from one that has done nothing else.

    done = llmq("quantize", "./my-llama", "./out")      a subprocess.CompletedProcess: returncode, stdout, stderr

Starting `python -m llmq` costs seconds, most of them torch's and transformers' imports; this a tenth of one.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
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
