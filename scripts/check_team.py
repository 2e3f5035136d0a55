"""Kill one of torchrun's processes at random blocks: the group ends, is started again, and writes the same bytes.

    python scripts/check_team.py [--processes 2] [--kills 3] [--recipes gptq experts]

For each recipe, on tiny random models: one process writes OUT. Then `torchrun --max-restarts` runs the same command; at
a block drawn by chance one of the processes, each in its turn, is ended by SIGKILL, as the kernel does where memory is
short. What must hold: the others end with one line that tells of it, torchrun starts all of them again, they go on from
the last finished block, and OUT is the same. Without a restart torchrun must end with an error, and the same command,
by hand, with another number of processes, ends in the same bytes too. Exit status 1 where anything is otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from _children import Files, held, save_llama

RECIPES = {
    "gptq": "llama --method gptq --group-size 32",
    "self": "llama --method gptq --group-size 32 --calib self",
    "experts": "qwen3_moe --quality balanced --group-size 32 --format gptq",
}
CALIBRATION = "--calib text.txt --samples 16 --seq-len 64 --device cpu --dtype float32"
BLOCKS = 4
ENDED = re.compile("error: another process of this run has ended|interrupted; ")  # or torchrun was quicker to say so


def child(marker: Path, rank: int, block: int, arguments: list[str]) -> None:
    """Be one process of a team, which is killed at a block, the first time that it comes there."""
    from llmq import cli, launched
    from llmq.pipeline import entering, run

    quantize_block, entering.BATCH_TOKENS = run.quantize_block, 256

    def killed(plan: object, i: int, *more: object) -> object:
        if (launched.number(), i) == (rank, block) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return quantize_block(plan, i, *more)  # type: ignore[arg-type]

    run.quantize_block = killed  # type: ignore[assignment]
    sys.argv = ["llmq", *arguments]
    cli.main()


def make(folder: Path) -> None:
    """Write two models and a text."""
    from _families import FAMILIES
    from _tiny import make_prose

    (folder / "text.txt").write_text(make_prose(3000))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    save_llama(folder / "llama", head_dim=16, **sizes)
    FAMILIES["qwen3_moe"].save(folder / "qwen3_moe")


class Bench:
    """A folder with models in which commands run. recipe: what is done."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.marker, self.trials = folder, folder / "killed", itertools.count()
        self.model, *self.options = RECIPES[recipe].split()

    def run(self, out: str, processes: int, *, kill: tuple[int, int] = (-1, -1), restarts: int = 0) -> tuple[int, str]:
        """Run the command by so many processes; kill: which one, at which block. Returns the status and stderr."""
        command = ["quantize", self.model, out, *CALIBRATION.split(), *self.options]
        how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        how += ["--max-restarts", str(restarts), __file__] if processes > 1 else []
        if processes == 1:
            how = [__file__]
        done = subprocess.run(  # noqa: S603
            [sys.executable, *how, "--child", str(self.marker), *map(str, kill), *command],
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    def held(self, out: str) -> Files:
        """Return what OUT holds."""
        return held(self.folder / out)

    def wrong(self, processes: int, kill: tuple[int, int], *, restarts: int) -> str:
        """Return what is not as it should be where a process is killed; nothing where all is well."""
        self.marker.unlink(missing_ok=True)
        out = f"out-{next(self.trials)}"
        status, said = self.run(out, processes, kill=kill, restarts=restarts)
        told = [line for line in said.splitlines() if line.startswith(("error:", "interrupted;"))]
        if len(told) != 1 or not ENDED.match(told[0]):
            return f"told {told}: {said}"
        if kill[0] and f"goes on from block {kill[1]} of" not in told[0]:
            return f"the first process says nothing of what stays: {told}"
        if not restarts:
            if not status:
                return "torchrun ended well"
            status, said = self.run(out, processes + 1)
        if status or (f"going on from block {kill[1]} of" not in said):
            return f"status {status}: {said}"
        return "" if self.held(out) == self.held("one") else "other bytes"


def main() -> None:
    """Check, and end with status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    args = parser.parse_args()
    draw, well = random.Random(0), True
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            bench = Bench(Path(folder), recipe)
            status, said = bench.run("one", 1)
            if status:
                sys.exit(said)
            blocks = BLOCKS if bench.model == "llama" else 2
            for trial in range(args.kills):
                kill, restarts = (trial % args.processes, draw.randrange(1, blocks)), (trial + 1) % 2
                found = bench.wrong(args.processes, kill, restarts=restarts)
                well &= not found
                how = "restarted by torchrun" if restarts else f"by hand with {args.processes + 1} processes"
                print(
                    f"{recipe}: process {kill[0]} killed at block {kill[1]}, {how}: {found or 'same bytes'}", flush=True
                )
    sys.exit(not well)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
    else:
        main()
