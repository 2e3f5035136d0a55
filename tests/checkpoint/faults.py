"""Runs `llmq` in forked children, each ended at its n-th step on the file system: by SIGKILL, or by a full disk.

    python faults.py kill|kill-no-exchange|full|full-again FOLDER TRIALS SEED OLD NEW

OLD and NEW are arguments of the command line, as JSON: OLD runs once in FOLDER, then NEW in each trial, FOLDER being
put back before. Prints, as JSON, what FOLDER holds after OLD and after an undisturbed NEW, the steps of that, and for
each trial: the step, the exit status, what was printed, what FOLDER holds; after a kill, or a disk that is full for a
moment (full-again), also what the same command then does. A process of its own, since a forked child of one with busy
threads can hang.
"""

import builtins
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import llmq.checkpoint.disk
from llmq import cli

WRITES = ("mkdir", "rename", "replace", "fsync", "sendfile")
REMOVES = ("unlink", "rmdir")
now = {"steps": 0, "last": 0, "kill": True}  # counted so far; the one to end at, 0 for none; how


def step(writes=True):
    """Count a step; end at the last one."""
    if not writes and not now["kill"]:
        return
    now["steps"] += 1
    if now["steps"] == now["last"] and now["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if now["steps"] == now["last"]:
        raise OSError(28, "No space left on device")


class Raw(io.FileIO):
    """A file, each of whose writes is a step."""

    def write(self, data):
        step()
        return super().write(data)


def opened(file, mode="r", *args, open_=builtins.open, **options):
    """Open a file; one that is written to by `Raw`."""
    if not set(mode) & set("wax+") or not isinstance(file, str | Path) or str(file).startswith("/dev/"):
        return open_(file, mode, *args, **options)
    raw = Raw(file, mode.replace("b", "").replace("t", ""))
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


def counted(call, writes=True):
    """Return the function with a step before and, where it is not a full disk that is looked for, one after it."""

    def step_by_step(*args, **options):
        step(writes)
        result = call(*args, **options)
        step(False)
        return result

    return step_by_step


def watch():
    """Count all that changes the file system from here on."""
    builtins.open = io.open = opened
    for name in (*WRITES, *REMOVES):
        setattr(os, name, counted(getattr(os, name), name in WRITES))
    shutil.os = os
    llmq.checkpoint.disk.exchange = counted(llmq.checkpoint.disk.exchange)


def run(arguments, at, folder):
    """Run the command line in a child that ends at step `at` (0: never). Returns (status, printed, steps)."""
    with tempfile.TemporaryDirectory() as scratch:
        said, count = Path(scratch) / "stderr", Path(scratch) / "steps"
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.chdir(folder)
                sys.argv = ["llmq", *arguments]
                now.update(steps=0, last=at)
                watch()
                cli.main()
            except SystemExit as e:
                code = e.code or 0
            finally:
                now["last"] = 0
                count.write_text(str(now["steps"]))
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said.read_text(), int(count.read_text()) if count.exists() else None


def held(folder):
    """Return every file below a folder with its digest."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files}


def once(arguments, folder):
    """Run the command line in this process, so that no child has to import and compile."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        sys.argv = ["llmq", *arguments]
        cli.main()


def main():
    """Do as the module says."""
    if sys.argv[1] == "kill-no-exchange":
        llmq.checkpoint.disk.exchange = lambda a, b: False
    now["kill"], again = sys.argv[1].startswith("kill"), sys.argv[1] != "full"
    folder, count, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    before, arguments = json.loads(sys.argv[5]), json.loads(sys.argv[6])
    saved = folder.with_name(folder.name + "-as-it-was")
    once(before, folder)
    shutil.copytree(folder, saved)

    def back():
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)

    once(arguments, folder)
    back()
    status, said, total = run(arguments, 0, folder)
    report = {"status": status, "said": said, "steps": total, "old": held(saved), "new": held(folder), "trials": []}
    for at in sorted(random.Random(seed).sample(range(1, total + 1), count)):
        back()
        status, said, _ = run(arguments, at, folder)
        trial = {"at": at, "status": status, "said": said, "held": held(folder)}
        if again and status:
            status, said, _ = run(arguments, 0, folder)
            trial |= {"next": status, "next said": said, "next held": held(folder)}
        report["trials"].append(trial)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
