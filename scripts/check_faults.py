"""Kill a run or fill its disk at any step on the file system: OUT stays the old one or is the new one, whole.

    python scripts/check_faults.py [--steps 20] [--only NAME ...] [--seed 0]

For each of the cases below, on a tiny random model: OUT is there and a run with `--overwrite` is to replace it. It runs
undisturbed once, and its steps are counted: a write, a rename, a sync, a removal. Then it runs anew in a forked child
that ends at one of them, by SIGKILL or by a full disk: at the last one, and before that at one drawn by chance out of
each of equal stretches. After that OUT and what lies beside it are compared with what was there and with what is to
come, and after a kill, or a disk that is full for a moment, the same command runs again, which must succeed. A line a
case; exit status 1 where anything was not as it should be.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _children import Files, forked, held, parser, save_llama
from _tiny import make_prose
from transformers.utils.logging import disable_progress_bar

from llmq import cli
from llmq.checkpoint import disk


class Case(NamedTuple):
    """A fault. out: the name of OUT. old, new: options that make the one that is there, and the one to come.

    kill: by SIGKILL, else by a full disk. again: whether the same command runs afterwards, as the disk has room again.
    exchanges: whether the file system can exchange two folders in one step.
    """

    out: str
    old: str
    new: str
    kill: bool = True
    again: bool = True
    exchanges: bool = True


_FOLDER = Case("out", "--group-size 32 --bits 8", "--group-size 32")
_GGUF = Case("out.gguf", "--type Q4_0", "--type Q8_0")
_SHARDS = Case("out.gguf", "--type F32 --split-max-size 1M", "--type BF16 --override blk:type=F32 --split-max-size 1M")
_CALIBRATED = "--method qep,gptq --calib ../text.txt --samples 4 --seq-len 32 --group-size 32"
_FULL = {"kill": False, "again": False}  # of these, killed runs show that the next one succeeds
CASES = {
    "safetensors, killed": _FOLDER,
    "GGUF, killed": _GGUF,
    "shards over shards, killed": _SHARDS,
    "one file over shards, killed": Case("out.gguf", "--type F16 --split-max-size 1M", "--type Q8_0"),
    "safetensors without an exchange, killed": _FOLDER._replace(exchanges=False),
    "safetensors, disk full": _FOLDER._replace(**_FULL),
    "GGUF, disk full": _GGUF._replace(**_FULL),
    "shards over shards, disk full": _SHARDS._replace(**_FULL),
    "calibrated, disk full": Case("out", "--group-size 32", _CALIBRATED, kill=False),
}
WRITES = ("mkdir", "rename", "replace", "fsync", "sendfile")
REMOVES = ("unlink", "rmdir")
now = {"steps": 0, "last": 0, "kill": True}  # counted so far; the one to end at, 0 for none; how


def step(*, writes: bool = True) -> None:
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

    def write(self, data: Any) -> int:
        """See `io.FileIO.write`."""
        step()
        return super().write(data)


def opened(file: Any, mode: str = "r", *args: Any, open_: Any = builtins.open, **options: Any) -> Any:
    """Open a file; one that is written to by `Raw`."""
    if not set(mode) & set("wax+") or not isinstance(file, str | Path) or str(file).startswith("/dev/"):
        return open_(file, mode, *args, **options)
    raw = Raw(file, mode.replace("b", "").replace("t", ""))
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


def counted(call: Callable[..., Any], *, writes: bool = True) -> Callable[..., Any]:
    """Return the function with a step before and, where it is not a full disk that is looked for, one after it."""

    def step_by_step(*args: Any, **options: Any) -> Any:
        step(writes=writes)
        result = call(*args, **options)
        step(writes=False)
        return result

    return step_by_step


def watch(*, exchanges: bool) -> None:
    """Count all that changes the file system from here on."""
    builtins.open = io.open = opened
    for name in (*WRITES, *REMOVES):
        setattr(os, name, counted(getattr(os, name), writes=name in WRITES))
    shutil.os = os  # type: ignore[attr-defined]
    exchange = disk.exchange if exchanges else lambda *_: False
    disk.exchange = counted(exchange)  # type: ignore[assignment]


class End(NamedTuple):
    """How a run ended: its exit status, what it printed, how many steps it took, what the folder holds."""

    status: int
    said: str
    steps: int
    held: Files


class Bench:
    """A folder with a model beside it, in which runs end at a step and others follow."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.saved = root, root / "work", root / "as-it-was"
        disable_progress_bar()
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
        save_llama(root / "src", head_dim=32, **sizes)
        (root / "text.txt").write_text(make_prose(500))
        self.folder.mkdir()
        self._once(CASES["calibrated, disk full"], _CALIBRATED)  # so that no child has to import and compile

    def begin(self, case: Case) -> Files:
        """Make the old OUT beside what llmq has no business with; return what is there."""
        for folder in (self.folder, self.saved):
            shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "notes.txt").write_text("years of work")
        self._once(case, case.old)
        shutil.copytree(self.folder, self.saved)
        return held(self.saved)

    def back(self) -> None:
        """Put back what was there."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.saved, self.folder)

    def _once(self, case: Case, options: str) -> None:
        quiet = contextlib.redirect_stdout(io.StringIO())
        with contextlib.chdir(self.folder), quiet, contextlib.suppress(SystemExit):
            sys.argv = _command(case, options)
            cli.main()

    def run(self, case: Case, at: int = 0) -> End:
        """Run the new command in a child that ends at step `at` (0: never)."""

        def begin() -> None:
            now.update(steps=0, last=at, kill=case.kill)
            watch(exchanges=case.exchanges)

        def end() -> int:
            now["last"] = 0
            return now["steps"]

        command = _command(case, case.new)[1:]
        return End(*forked(self.root, self.folder, command, begin, end), held(self.folder))


def _command(case: Case, options: str) -> list[str]:
    method = [] if "--method" in options else ["--method", "rtn"]
    return ["llmq", "quantize", "../src", case.out, *method, *options.split(), "--overwrite"]


def within(some: Files, files: Files) -> bool:
    """Say whether some files are all there."""
    return some.items() <= files.items()


def ended(case: Case, new: Files, files: Files) -> bool:
    """Say whether a folder holds the new OUT and nothing else; shards over shards differ in their number each time."""
    shards = [name for name in files if "-of-" in name]
    whole = {f"out-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))}
    numbered = "split" in case.old and "split" in case.new
    return files == new or (numbered and files.keys() == {"notes.txt"} | whole)


def wrong(case: Case, old: Files, new: Files, end: End, then: End | None) -> str:
    """Return what is not as it should be after a run that ended early, and the next one; nothing where all is well."""
    aside = {name.replace(f"{case.out}/", f"{case.out}.llmq-partial/old/"): digest for name, digest in old.items()}
    before = within(old, end.held) or (not case.exchanges and within(aside, end.held))
    if not (before if end.status == 1 else within(new, end.held) or (case.kill and before)):
        return f"OUT is neither the old nor the new one: {end.held}"
    if end.status not in ((-signal.SIGKILL,) if case.kill else (0, 1)):
        return f"it ended with status {end.status}"
    if end.status == 1 and (odd := _said_wrongly(end)):
        return odd
    left = any(".llmq-partial" in name for name in end.held)
    if then is not None and (then.status or not ended(case, new, then.held)):
        return f"the same command then ended with status {then.status}, {then.said!r}, and {then.held}"
    if then is not None and case.kill and bool(then.said) != left:
        return f"what is removed or put in place is named, nothing else: {then.said!r}"
    return ""


def _said_wrongly(end: End) -> str:
    """Return what is not as it should be in the line about a full disk."""
    stays = any(".llmq-partial" in name for name in end.held)
    line = end.said.startswith("error: ") and end.said.count("\n") == 1 and "No space left on device" in end.said
    if line and ("stays in" in end.said) == ("the same command" in end.said) == stays:
        return ""
    return f"it is not told in one line: {end.said!r}"


def moments(steps: int, count: int, draw: random.Random) -> Iterator[int]:
    """Yield so many steps: one of each equal stretch, and the last one."""
    ends = [i * (steps - 1) // (count - 1) for i in range(count)]
    yield from (draw.randint(first + 1, last) for first, last in itertools.pairwise(ends))
    yield steps


def check(bench: Bench, name: str, count: int, draw: random.Random) -> dict[str, Any]:
    """Have a case meet so many faults. Returns what came of it."""
    case = CASES[name]
    old = bench.begin(case)
    bench.back()
    whole = bench.run(case)
    if whole.status or whole.said or whole.held == old:
        raise SystemExit(f"{name}: {whole.said or 'nothing changed'}")
    found: dict[str, Any] = {"case": name, "steps": whole.steps, "trials": []}
    for at in moments(whole.steps, count, draw):
        bench.back()
        end = bench.run(case, at)
        then = bench.run(case) if case.again and end.status else None
        trial = {"at": at, "status": end.status, "old": within(old, end.held), "said": end.said}
        trial |= {"then": then.said if then else "", "wrong": wrong(case, old, whole.held, end, then)}
        found["trials"].append(trial)
    return found


def line(found: dict[str, Any]) -> str:
    """Return a row of the table, and what was wrong."""
    trials = found["trials"]
    odd = [t for t in trials if t["wrong"]]
    told = "".join(f"\n    at step {t['at']}: {t['wrong']}" for t in odd)
    was = sum(t["old"] for t in trials)
    return f"{found['case']:40} {found['steps']:6} {len(trials):6} {was:8} {len(trials) - len(odd):6}{told}"


def main() -> None:
    """Check, and end with status 1 where anything was wrong."""
    options = parser(__doc__, CASES)
    options.add_argument("--steps", type=int, default=20, help="at which each case meets its fault, 2 at least")
    args = options.parse_args()
    all_well = True
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print("" if args.json else f"{'case':40} {'steps':>6} {'faults':>6} {'old kept':>8} {'right':>6}", flush=True)
        for name in args.only:
            found = check(bench, name, args.steps, random.Random(args.seed))
            all_well &= not any(t["wrong"] for t in found["trials"])
            print(json.dumps(found) if args.json else line(found), flush=True)
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
