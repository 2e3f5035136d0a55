"""Rows of a bench in a JSON file, kept as they come: a stopped run goes on where it was, a table grows over days.

Each row says what made it: the commit (with `+` where tracked files differ from it), the time it ended, the machine.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import _measure as measure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class Rows:
    """The rows of one JSON file, by name."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Row]:
        """Return all rows that are there."""
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def fill(self, names: Iterable[str], make: Callable[[str], Row], show: Callable[[Mapping[str, Row]], None]) -> int:
        """Make the rows that are missing and show each; one that fails is told and left out. Returns how many did."""
        failed = 0
        for name in names:
            if name in self.read():
                continue
            commit = _commit()  # of the code that runs, not of what it has become by the end
            try:
                row = make(name)
            except SystemExit as e:  # how _measure.run ends where a command fails
                failed += 1
                print(f"{name}: {e}", file=sys.stderr, flush=True)
                continue
            ended = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            row |= {"commit": commit, "ended": ended, "machine": measure.machine()}
            self._put(name, row)
            show({name: row})
        return failed

    def _put(self, name: str, row: Row) -> None:
        """Add a row; two processes may fill one file at a time."""
        with self.file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.read() | {name: row}, indent=2) + "\n")
            part.replace(self.file)


def _commit() -> str:
    """Return the commit of the tree that this file lies in, or "" where it lies in none."""
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run((*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=False)  # noqa: S603
    changed = subprocess.run((*git, "diff", "--quiet", "HEAD"), capture_output=True, check=False)  # noqa: S603
    return commit.stdout.strip() + "+" * (commit.returncode == 0 and changed.returncode == 1)


COLUMNS = ("setting", "bits/weight", "perplexity", "change", "mean KL", "top-1", "s", "CPU s", "peak GB")


def cells(name: str, r: Row) -> tuple[str, ...]:
    """Return a row as the texts of COLUMNS."""
    return (
        name,
        f"{r['bits_per_weight']:.3f}",
        f"{r['perplexity']:.3f}",
        f"{100 * (r['perplexity'] / r['baseline_perplexity'] - 1):+.2f} %",
        f"{r['kl_mean']:.5f} ± {r['kl_standard_error']:.5f}",
        f"{100 * r['top1']:.2f} %",
        f"{r['seconds']:.0f}",
        f"{r['cpu_seconds']:.0f}",
        f"{r['peak_bytes'] / 1e9:.2f}",
    )


def show(rows: Mapping[str, Row]) -> None:
    """Print the table of these rows."""
    table = Table(*COLUMNS)
    for name, row in rows.items():
        table.add_row(*cells(name, row))
    Console(width=130).print(table)


def show_markdown(rows: Mapping[str, Row]) -> None:
    """Print the table of these rows as Markdown, for the documentation."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(name, row) for name, row in rows.items())]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
