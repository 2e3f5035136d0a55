"""Kill runs at random moments, run the same command again, and compare every byte with a run that was left alone.

    python scripts/check_resume.py [--kills 20] [--only NAME ...] [--seed 0] [--aside]

For each of the recipes below, on tiny random models: a run is ended by SIGKILL at an event drawn by chance (a batch
reaches a site, a rename, a sync, a file of tensors is written and may be torn, a step of distill). Every second time
the run that goes on is killed too, and every third time the power fails as well: what was not synced is empty then (of
each recipe the turn is another one, so that one kill of each meets all of it).
With --aside blocks are read ahead and written behind in threads, as where a GPU computes.
Then the command runs to its end. A line a recipe says how many events there were, how often a killed run went on, and
how many ended in the same bytes; exit status 1 where any did not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _children import Files, forked, held, parser, save_llama
from _families import FAMILIES
from _tiny import make_prose
from transformers.utils.logging import disable_progress_bar

from llmq import aside, cli
from llmq.checkpoint import journal, shards
from llmq.model.lanes import Lanes
from llmq.pipeline import entering, whole_model

RECIPES = {
    "gptq": "llama OUT --method gptq --group-size 32 --lm-head",
    "balanced": "llama OUT --quality balanced --group-size 32",
    "awq": "llama OUT --method awq,gptq --group-size 32 --asym --format awq",
    "smoothquant": "llama OUT --method smoothquant,gptq --bits 8 --group-size channel --act-bits 8 --act tensor",
    "best 2 bits": "llama OUT --quality best --bits 2 --group-size 32 --samples 8",
    "target-bpw": "llama OUT --group-size 32 --target-bpw 4.9 --bit-choices 3,4,8",
    "signround": "llama OUT --method gptq,signround:steps=4:check=2 --group-size 32 --samples 8",
    "gguf": "llama OUT.gguf --type Q4_0 --method gptq --imatrix-out OUT.imatrix",
    "experts": "qwen3_moe OUT --method gptq --group-size 32",
    "kv": "llama OUT --method gptq --group-size 32 --bits 8 --kv-bits 8 --format compressed-tensors",
    "shared kv": "gemma4_text OUT --method qep,gptq --group-size 32",
    "several": "llama OUT --format gptq,mlx,gguf:Q4_0 --method gptq --group-size 32",
    "self": "llama OUT --calib self --method gptq --group-size 32 --samples 8",
}
CALIBRATION = "--calib text.txt --samples 16 --seq-len 64 --device cpu --dtype float32"
now = {"events": 0, "last": 0}  # counted so far; the one to end at, 0 for none


def event(torn: Path | None = None) -> None:
    """Count an event; end at the last one. torn: a file that is written at this moment."""
    now["events"] += 1
    if now["events"] == now["last"]:
        if torn is not None:
            torn.write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)


def watch(synced: Path, boot: str) -> None:
    """Count events from here on; note in a file what is synced; say that the system was started as `boot`."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def with_events(*args: Any, **options: Any) -> Any:
            event()
            result = call(*args, **options)
            event()
            return result

        return with_events

    def fsync(at: int, call: Callable[[int], None] = os.fsync) -> None:
        event()
        call(at)
        with synced.open("a") as f:
            f.write(f"{_seen(os.fstat(at))}\n")
        event()

    def write(file: Path, *more: Any, call: Callable[..., Any] = shards.write) -> Any:
        event(torn=file)
        result = call(file, *more)
        event()
        return result

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    shards.write = write
    Lanes._resume = counted(Lanes._resume)  # type: ignore[method-assign]
    whole_model._divergence = counted(whole_model._divergence)
    os.fsync = fsync  # type: ignore[assignment]
    file = synced.with_name("boot")
    file.write_text(boot)
    journal._BOOT = file
    entering.BATCH_TOKENS = 256


def _seen(at: os.stat_result) -> str:
    return f"{at.st_ino} {at.st_size} {at.st_mtime_ns}"


class Bench:
    """A folder in which commands are run, killed and run again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.boots = 0
        self.work.mkdir()
        disable_progress_bar()
        (folder / "text.txt").write_text(make_prose(3000))
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        save_llama(folder / "llama", "bfloat16", head_dim=16, **sizes)
        for family in ("qwen3_moe", "gemma4_text"):
            FAMILIES[family].save(folder / family)

    def arguments(self, recipe: str) -> list[str]:
        """Return a recipe as arguments of the command line."""
        model, out, *more = RECIPES[recipe].replace("OUT", f"{self.work}/out").split()
        return ["quantize", model, out, *CALIBRATION.split(), *more]

    def run(self, arguments: list[str], at: int = 0) -> tuple[int, str, int]:
        """Run the command line in a child that is killed at an event (0: never). Returns (status, printed, events)."""

        def begin() -> None:
            now.update(events=0, last=at)
            watch(self.folder / "synced", str(self.boots))

        def end() -> int:
            now["last"] = 0
            return now["events"]

        return forked(self.folder, self.folder, arguments, begin, end)

    def power_fails(self) -> None:
        """Empty every file that was not synced as it is, and have the system started anew."""
        self.boots += 1
        kept = set((self.folder / "synced").read_text().splitlines())
        for file in self.work.rglob("*"):
            if file.is_file() and _seen(file.stat()) not in kept:
                os.truncate(file, 0)

    def held(self) -> Files:
        """Return what a run has written."""
        return held(self.work)

    def done(self, want: Files) -> bool:
        """Say whether what a run is to write is in place: it was killed while it cleaned up, if at all."""
        return want.items() <= self.held().items()

    def cleared(self) -> None:
        """Remove what a run has written."""
        shutil.rmtree(self.work)
        self.work.mkdir()
        (self.folder / "synced").write_text("")


def check(bench: Bench, recipe: str, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a recipe's run so many times. Returns what came of it."""
    arguments, turn = bench.arguments(recipe), list(RECIPES).index(recipe)
    bench.cleared()
    status, said, events = bench.run(arguments)
    if status:
        raise SystemExit(f"{recipe}: {said}")
    want, trials = bench.held(), []
    for trial in range(turn, turn + kills):
        bench.cleared()
        moments = [draw.randint(1, events) for _ in range(1 + trial % 2)]
        went_on = 0
        for at in moments:
            if bench.done(want):
                break
            status, said, _ = bench.run(arguments, at)
            went_on += "going on from" in said
            if status == -signal.SIGKILL and trial % 3 == 2:
                bench.power_fails()
        if status == -signal.SIGKILL and not bench.done(want):
            status, said, _ = bench.run(arguments)
            went_on += "going on from" in said
        same = bench.held() == want if status == 0 else status == -signal.SIGKILL and bench.done(want)
        trials.append({"at": moments, "went on": went_on, "same": same, "said": "" if same else said})
    return {"recipe": recipe, "events": events, "trials": trials}


def line(found: dict[str, Any]) -> str:
    """Return a row of the table, and what was printed where it went wrong."""
    trials = found["trials"]
    same, went_on = sum(t["same"] for t in trials), sum(t["went on"] for t in trials)
    wrong = "".join(f"\n    killed at {t['at']}: {t['said']}" for t in trials if not t["same"])
    kills = sum(len(t["at"]) for t in trials)
    return f"{found['recipe']:14} {found['events']:7} {kills:6} {went_on:8} {same:4} of {len(trials)}{wrong}"


def main() -> None:
    """Check, and end with status 1 where any run ended in other bytes."""
    options = parser(__doc__, RECIPES)
    options.add_argument("--kills", type=int, default=20, help="runs that are killed, of each recipe")
    options.add_argument("--aside", action="store_true", help="read ahead and write behind, as beside a GPU")
    args = options.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.aside:
        aside.pays = lambda device: True
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        with contextlib.chdir(folder), contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            sys.argv = ["llmq", *bench.arguments("gptq")]  # so that no child has to read and compile all of it
            cli.main()
        draw, all_same = random.Random(args.seed), True
        print("" if args.json else f"{'recipe':14} {'events':>7} {'kills':>6} {'went on':>8} same bytes", flush=True)
        for recipe in args.only:
            found = check(bench, recipe, args.kills, draw)
            all_same &= all(t["same"] for t in found["trials"])
            print(json.dumps(found) if args.json else line(found), flush=True)
    sys.exit(not all_same)


if __name__ == "__main__":
    main()
