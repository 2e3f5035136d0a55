"""Where commands print, and what they show while they work.

    with progress() as work:
        work(3, 32, "block 3")        # a bar with the time left, where the output is a terminal

Not here: the bar, the lines and the log themselves (watching.py), tables (show.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llmq import launched
from llmq.show import labelled

if TYPE_CHECKING:
    from llmq.progress import Work

console = Console()


def warn(warning: str) -> None:
    """Print a warning."""
    console.print(labelled("warning", "yellow", warning))


@contextmanager
def progress(log: Path | None = None) -> Iterator[Work]:
    """Yield what long work is told to: a bar on a terminal, else lines; and the file of --log-json, where one is given.

    Of several processes the first shows and logs; the others hear signals alone.
    Raises LlmqError for a file that cannot be written, or holds something else.
    """
    from llmq.commands.watching import Bar, Everyone, JsonLog, Lines
    from llmq.progress import Work

    if not launched.leads():
        yield Work(Everyone([]))
        return
    with ExitStack() as stack:
        logs = [stack.enter_context(JsonLog(log, warn))] if log else []
        shown = stack.enter_context(Bar(console)) if console.is_terminal else Lines(console)
        yield Work(Everyone([shown, *logs]))
