"""Feed mutated files to everything that llmq reads, and see that each is read, or refused in one line.

    python scripts/fuzz.py [--count 20000] [--seed 0] [--only config gguf ...] [--jobs 2]

Right is status 0, or status 1 with one line `error: ...` that llmq foresaw. Wrong is a traceback, the line of last
resort, a crash, a hang (10 s of CPU), memory (2 GiB above the start), an escape code on the terminal, or a file touched
outside OUT. A child process reads many inputs, one after another, and is started anew after a crash or a hang. Input
`i` of a reader depends on the seed and `i` alone: `--only gguf --first 1234 --count 1` makes it again.

Not here: how files are mutated (_mutate.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _mutate as mutate
import psutil
from _watch import Watch

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SECONDS, BYTES = 10, 2 * 2**30  # of CPU; a process that waits for nothing gets PATIENCE times as long
PATIENCE = 6
RTN = ("--method", "rtn", "--group-size", "32", "--overwrite")
GPTQ = ("--method", "gptq", "--group-size", "32", "--samples", "2", "--seq-len", "16", "--overwrite")
GGUF = ("--method", "rtn", "--format", "gguf:pre=gpt-2", "--type", "Q8_0", "--overwrite")
EVAL = ("--text", "{text}", "--window", "16", "--windows", "1")
RECIPE = """\
method: gptq
bits: 4
group_size: 32
sym: true
range: mse
samples: 2
seq_len: 16
seed: 0
dtype: float32
format: gptq
override: ['down_proj:bits=4']
skip: ['layers\\.0\\.mlp']
lm_head: false
"""
CHAT = {"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "the quick fox"}]}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Reader:
    """Something that reads files: which of them are mutated and how, and the commands that read them.

    make: writes a valid input into a folder. files: pattern -> how to mutate what it matches.
    """

    make: Callable[[Path], None]
    files: dict[str, tuple[mutate.Mutation, ...]]
    commands: tuple[tuple[str, ...], ...]


def copy(*names: str) -> Callable[[Path], None]:
    """Return a maker that lays golden checkpoints over each other."""

    def make(folder: Path) -> None:
        for name in names:
            shutil.copytree(GOLDEN / name, folder / "m", dirs_exist_ok=True)

    return make


def sharded(folder: Path) -> None:
    """Write the float checkpoint in shards with an index."""
    from transformers import AutoModelForCausalLM

    copy("float")(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "m")
    for file in (folder / "m").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / "m", max_shard_size="60KB")


def written(*options: str) -> Callable[[Path], None]:
    """Return a maker that quantizes the float checkpoint."""

    def make(folder: Path) -> None:
        copy("float")(folder)
        status, said, _ = llmq("quantize", folder / "m", folder / options[0], *options[1:])
        if status:
            raise RuntimeError(said)

    return make


def texts(folder: Path) -> None:
    """Write one calibration text in every container, beside a checkpoint with a chat template."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy("float")(folder)
    (folder / "m" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"text": f"row {i}: the quick brown fox jumps over the lazy dog. " * 4} for i in range(30)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(40)))
    (folder / "t.txt").write_text("\n".join(row["text"] for row in rows))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "t.parquet")
    with pa.OSFile(str(folder / "t.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as out:
        out.write_table(table)


def recipe(folder: Path) -> None:
    """Write a checkpoint and a recipe for it."""
    copy("float")(folder)
    (folder / "r.yaml").write_text(RECIPE)


def imatrix(folder: Path) -> None:
    """Write a checkpoint and an importance matrix of it."""
    copy("float")(folder)
    options = ("--method", "gptq", *GGUF[2:], "--samples", "2", "--seq-len", "16", "--calib", str(text_file(folder)))
    llmq("quantize", folder / "m", folder / "x.gguf", *options, "--imatrix-out", folder / "i.gguf")
    (folder / "x.gguf").unlink()


def text_file(folder: Path) -> Path:
    """Return a plain calibration text."""
    file = folder / "plain.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return file


WEIGHTS = {"m/model.safetensors": (mutate.safetensors_file, mutate.safetensors_file, mutate.raw)}
CONFIG = {"m/config.json": (mutate.json_file,) * 5 + (mutate.raw,)}
PACKED = (
    ("eval", "{in}/m", *EVAL),
    ("export", "{in}/m", "{out}.gguf", "--pre", "gpt-2", "--overwrite"),
    ("inspect", "{in}/m"),
)


def packed(*names: str) -> Reader:
    """Return the reader of a peer's checkpoint: its config is mutated as often as its weights."""
    return Reader(copy("float", *names), WEIGHTS | CONFIG, (*PACKED, ("verify", "{in}/m")))


READERS = {
    "safetensors": Reader(copy("float"), WEIGHTS, (("quantize", "{in}/m", "{out}", *RTN), ("inspect", "{in}/m"))),
    "config": Reader(copy("float"), CONFIG, (("quantize", "{in}/m", "{out}", *RTN), ("eval", "{in}/m", *EVAL))),
    "index": Reader(
        sharded,
        {"m/*.index.json": (mutate.json_file, mutate.json_file, mutate.raw)},
        (("quantize", "{in}/m", "{out}", *RTN), ("inspect", "{in}/m"), ("eval", "{in}/m", *EVAL)),
    ),
    "gptq": packed("gptq_v1_w4g32_sym"),
    "gptq-order": packed("gptq_v1_w4g32_desc_act"),
    "awq": packed("awq_w4g32"),
    "compressed-tensors": packed("ct_pack_w4g32_asym"),
    "w8a8": packed("ct_int_w8a8_static"),
    "tokenizer": Reader(
        copy("float"),
        {
            "m/tokenizer.json": (mutate.json_file, mutate.json_file, mutate.raw),
            "m/tokenizer_config.json": (mutate.json_file,),
        },
        (
            ("generate", "{in}/m", "hello", "--max-new-tokens", "1"),
            ("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{text}"),
            ("quantize", "{in}/m", "{out}.gguf", *GGUF),
        ),
    ),
    "gguf": Reader(
        written("x.gguf", *GGUF), {"x.gguf": (mutate.gguf_file, mutate.gguf_file, mutate.raw)},
        (("inspect", "{in}/x.gguf", "--linears"), ("verify", "{in}/x.gguf")),
    ),
    "imatrix": Reader(
        imatrix, {"i.gguf": (mutate.gguf_file, mutate.raw)},
        (("quantize", "{in}/m", "{out}.gguf", *GGUF, "--imatrix", "{in}/i.gguf"),),
    ),
    "recipe": Reader(
        recipe, {"r.yaml": (mutate.yaml_file,) * 3 + (mutate.raw,)},
        (("quantize", "{in}/m", "{out}", "--recipe", "{in}/r.yaml", "--calib", "{text}", "--overwrite"),),
    ),
    "record": Reader(
        written("q", *RTN), {"q/quantization.json": (mutate.json_file,) * 3 + (mutate.raw,)},
        (("inspect", "{in}/q", "--linears"), ("verify", "{in}/q")),
    ),
    "jsonl": Reader(
        texts,
        {"t.jsonl": (mutate.json_lines, mutate.raw), "c.jsonl": (mutate.json_lines, mutate.json_lines, mutate.raw)},
        (("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{file}"),),
    ),
    "columns": Reader(
        texts, {"t.parquet": (mutate.raw,), "t.arrow": (mutate.raw,)},
        (("quantize", "{in}/m", "{out}", *GPTQ, "--calib", "{file}"),),
    ),
}  # fmt: skip


def llmq(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process; return its status (-1: an exception came out) and what it printed."""
    from llmq import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["llmq", *map(str, args)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException as e:  # noqa: BLE001, what a shell would show as a traceback
            return -1, f"{type(e).__name__}: {e}", out.getvalue()
    return status, err.getvalue(), out.getvalue()


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
