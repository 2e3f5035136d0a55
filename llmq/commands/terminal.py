"""Where commands print, and what they show while they work.

    with progress() as step:
        step(3, 32, "block 3")        # a bar with the time left, where the output is a terminal

Not here: tables and lines (show.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmq import signals
from llmq.errors import printable
from llmq.show import labelled

console = Console()


def warn(warning: str) -> None:
    """Print a warning."""
    console.print(labelled("warning", "yellow", warning))


@contextmanager
def progress() -> Iterator[Any]:
    """Yield `step(done, total, what)`, shown as a bar with the time left (only where the output is a terminal)."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def step(done: int, total: int, what: str) -> None:
            signals.check()
            bar.update(task, completed=done, total=total, description=printable(what, 100))

        yield step
