"""What the drivers of the rivals share: options, the calibration tokens, the clock, and the one JSON line at the end.

Runs in a rival's environment, beside `peer_*.py`: torch and transformers are there, llmq is not.

Calibration comes as token ids, which `_measure.write_tokens` writes: the very rows that llmq takes from a text. Seconds
by the clock depend on what else the machine does; CPU seconds (user + system, of this process and its children) hardly
do.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every rival takes; each adds its own settings."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("src", type=Path, help="float checkpoint folder, with its tokenizer")
    p.add_argument("out", type=Path, help="folder for the quantized checkpoint")
    p.add_argument("--tokens", type=Path, required=True, help="JSON file of rows of token ids, all of one length")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--group-size", type=int, default=64)
    p.add_argument("--dtype", default="auto", help="what activations are computed in: auto, float32, bfloat16")
    return p


def dtype_of(args: argparse.Namespace) -> Any:
    """Return the torch dtype asked for, or "auto": the checkpoint's own, or what the rival prefers."""
    import torch

    return args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def calibration_rows(args: argparse.Namespace) -> list[list[int]]:
    """Return the rows of token ids to calibrate on."""
    return json.loads(args.tokens.read_text())


class Clock:
    """Seconds of the stages of a run, by the clock and of the processor."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.at = (time.perf_counter(), cpu_seconds())

    def done(self, stage: str) -> None:
        """Record the time since the last stage ended as `STAGE_s` and `STAGE_cpu_s`."""
        now = (time.perf_counter(), cpu_seconds())
        self.stages |= {
            f"{stage}_s": round(now[0] - self.at[0], 2),
            f"{stage}_cpu_s": round(now[1] - self.at[1], 2),
        }
        self.at = now


def cpu_seconds() -> float:
    """Return the user and system seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def report(args: argparse.Namespace, clock: Clock, packages: tuple[str, ...], **more: Any) -> None:
    """Print one JSON object on one line: settings, times, peak memory, versions and what else is given."""
    import torch

    settings = {k: v for k, v in vars(args).items() if k not in ("src", "out", "tokens")}
    wall = sum(v for k, v in clock.stages.items() if not k.endswith("_cpu_s"))
    print(
        json.dumps(
            {
                "settings": settings,
                **clock.stages,
                "total_s": round(wall, 2),
                "cpu_s": round(cpu_seconds(), 2),
                "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "threads": torch.get_num_threads(),
                "versions": {name: version(name) for name in (*packages, "torch", "transformers")},
                "python": platform.python_version(),
                **more,
            }
        ),
        flush=True,
    )
