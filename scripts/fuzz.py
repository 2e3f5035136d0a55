"""Feed mutated files to everything that llmq reads, and see that each is read, or refused in one line.

    python scripts/fuzz.py [--count 20000] [--seed 0] [--only config gguf ...] [--jobs 2]

Right is status 0, or status 1 with one line `error: ...` that llmq foresaw. Wrong is a traceback, the line of last
resort, a crash, a hang (10 s of CPU), memory (2 GiB above the start), an escape code on the terminal, or a file touched
outside OUT. A child process reads many inputs, one after another, and is started anew after a crash or a hang. Input
`i` of a reader depends on the seed and `i` alone: `--only gguf --first 1234 --count 1` makes it again.

Not here: what is read (_readers.py), how files are mutated (_mutate.py).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from _readers import READERS, Reader, llmq, text_file
from _watch import Watch

SECONDS, BYTES = 10, 2 * 2**30  # of CPU; a process that waits for nothing gets PATIENCE times as long
PATIENCE = 6


def judge(status: int, said: str, shown: str) -> str:
    """Return "read", "refused", or what is wrong with how a command ended."""
    lines = [line for line in said.splitlines() if line.strip()]
    if "\x1b" in said + shown:
        return "escape code on the terminal"
    if status == 0:
        return "read"
    if status == 1 and len(lines) == 1 and lines[0].startswith("error: ") and "unforeseen" not in lines[0]:
        return "refused"
    return f"status {status}: {' | '.join(lines)[:300]}"


@contextlib.contextmanager
def mutated(folder: Path, reader: Reader, r: random.Random) -> Iterator[Path]:
    """Yield a file of a valid input while it holds something else, or is missing, a folder, a pipe or a link away."""
    pattern = r.choice(list(reader.files))
    file = r.choice(sorted(folder.glob(pattern)))
    valid = file.read_bytes()
    file.unlink()
    match r.randrange(40):
        case 0:
            pass
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to("/etc/hostname")
        case 3:
            os.mkfifo(file)
        case _:
            file.write_bytes(r.choice(reader.files[pattern])(valid, r))
    try:
        yield file
    finally:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        file.write_bytes(valid)


def child(name: str, seed: int, pipe: Connection) -> None:
    """Read inputs by their numbers until the pipe closes; answer each with how it ended."""
    import torch

    torch.set_num_threads(1)
    reader = READERS[name]
    with tempfile.TemporaryDirectory(prefix="llmq-fuzz-") as scratch, Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)  # Rust's panics
        folder, out = Path(scratch) / "in", Path(scratch) / "out"
        os.environ["TMPDIR"] = tempfile.tempdir = f"{out}-temporary"
        folder.mkdir(), out.mkdir(), Path(tempfile.gettempdir()).mkdir()
        reader.make(folder)
        plain, watch = text_file(folder), Watch()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        pipe.send("ready")
        while (i := pipe.recv()) is not None:
            r = random.Random(f"{seed} {name} {i}")
            with mutated(folder, reader, r) as file:
                places = {"in": folder, "out": out / "o", "text": plain, "file": file}
                command = [part.format(**places) for part in r.choice(reader.commands)]
                watch.seen, watch.allowed = [], (str(out),)
                verdict = judge(*llmq(*command))
                watch.allowed = None
            outside = f"touched outside OUT: {watch.seen[0]}" if watch.seen else ""
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            pipe.send((outside or verdict, " ".join(command[:1])))


class Child:
    """A process that reads inputs of one reader; started when first asked, and anew when it has died."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.process: Any = None

    def read(self, i: int) -> tuple[str, str]:
        """Return how input `i` ended, and the command that read it."""
        if self.process is None:
            self._start()
        try:
            self.pipe.send(i)
            seen = psutil.Process(self.process.pid)
            start = _seconds(seen)
            for _ in range(PATIENCE):
                if self.pipe.poll(SECONDS):
                    return self.pipe.recv()
                if _seconds(seen) - start >= SECONDS:
                    break
            verdict = f"hang: no end after {_seconds(seen) - start:.0f} s of CPU"
        except (EOFError, OSError, psutil.NoSuchProcess):
            self.process.join()
            verdict = f"crash: exit status {self.process.exitcode}"
        self.stop()
        return verdict, ""

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # imports once, forks before any thread
        context.set_forkserver_preload(["llmq.export.gguf", "llmq.pipeline.run"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=child, args=(self.name, self.seed, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()


def _seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process: on a busy machine a wall clock takes slow for hung."""
    times = process.cpu_times()
    return times.user + times.system


def fuzz(name: str, numbers: Sequence[int], seed: int) -> tuple[Counter[str], dict[int, str]]:
    """Read some inputs; return how many ended how, and by number what went wrong."""
    ends: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    reading = Child(name, seed)
    for i in numbers:
        verdict, command = reading.read(i)
        good = verdict in ("read", "refused")
        ends[verdict if good else "wrong"] += 1
        if not good:
            wrong[i] = f"{command}: {verdict}"
    reading.stop()
    return ends, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fuzzer; print a line a reader and one for each fault. Returns the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="inputs in all")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--jobs", type=int, default=1, help="readers at once")
    args = parser.parse_args(argv)
    share = -(-args.count // len(args.only))
    numbers = range(args.first, args.first + share)
    start, total, faults = time.monotonic(), 0, 0
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (ends, wrong) in zip(
            args.only, pool.map(lambda n: fuzz(n, numbers, args.seed), args.only), strict=True
        ):
            total, faults = total + share, faults + len(wrong)
            print(
                f"{name:20} {share:6} inputs: {ends['read']} read, {ends['refused']} refused, {len(wrong)} wrong",
                flush=True,
            )
            for i, what in wrong.items():
                print(f"    {name} {i}: {what}", flush=True)
    print(f"{total} inputs, {faults} faults, {time.monotonic() - start:.0f} s")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 1))
