r"""What is printed: text of files stays text, whatever it holds.

A tensor may be called `[/red]` or `\x1b[2J`: rich would take the first for markup, the terminal the second for an
order. Everything that comes from a file goes through `plain`, which makes both visible; tables do so by themselves.
Not here: what is printed (commands/, inspection.py, scores.py).
"""

from typing import Any

from rich.table import Table
from rich.text import Text

from llmq.errors import printable

_LONGEST = 2000  # characters of a cell


def plain(value: object, style: str = "", longest: int | None = _LONGEST) -> Text:
    """Return a value as one line of text without markup or control characters."""
    return Text(printable(str(value), longest), style)


def lines(value: str) -> Text:
    """Return text of several lines, each as `plain` makes it, its spaces kept."""
    shown = ("".join(c if c.isprintable() else printable(c) or " " for c in line) for line in value.split("\n"))
    return Text("\n".join(shown))


def labelled(label: str, style: str, message: object) -> Text:
    """Return `label: message`, the label in colour."""
    return Text.assemble((f"{label}:", style), " ", plain(message, longest=None))


def span(seconds: float) -> str:
    """Return a time in the unit that suits it: `38 s`, `4 min`, `2 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Rows(Table):
    """A table with its title at the left whose cells are text, whole: a word too long for its column goes on below."""

    def __init__(self, title: object, *headers: str, **options: Any) -> None:
        options.setdefault("show_header", bool(headers))
        super().__init__(*headers, title=plain(title), title_justify="left", **options)

    def add(self, *cells: object) -> None:
        """Add a row."""
        self.add_row(*(plain(c) for c in cells))
        for column in self.columns:
            if not column.no_wrap:
                column.overflow = "fold"  # "ellipsis" would cut what a user is to copy
