"""What a plot of a report is: a file of this folder with one public dataclass, drawn for one checkpoint or for several.

    class Heat(Plot):
        section, rank, title = "Errors", 20, "Error by block and linear"
        reads = "One square for each linear; darker is worse."          how to read it, said above it

        def figures(self, told):                 yields what is drawn: a chart, a table or lines, or what is lacking
            for one in told:
                yield Figure(one.label, chart=...)

Charts are Altair's, of one view or of layers, so that the page can give them the width that there is. Colours are the
page's, of a light and a dark theme: a chart names a role, such as the field that a colour stands for, and no colour.
Not here: the page (page.py), what is known of a checkpoint (read.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import altair as alt

from llmq.errors import LlmqError
from llmq.report.read import Told

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and what it is sorted by, where that is not the text."""

    text: str
    by: float | None = None


@dataclass(frozen=True)
class Table:
    """A table whose columns sort."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def numeric(self, column: int) -> bool:
        """Say whether a column holds numbers, or nothing."""
        cells = [row[column] for row in self.rows]
        return any(c.by is not None for c in cells) and all(c.by is not None or not c.text for c in cells)


@dataclass(frozen=True)
class Figure:
    """What is drawn in one place of the page.

    of: the checkpoint's label, "" where it is of all. chart: Altair's. says: lines below it. lacks: what the checkpoint
    does not hold, and what to do to have it; nothing else is shown then.
    """

    of: str = ""
    chart: Any = None
    table: Table | None = None
    says: Sequence[str] = ()
    lacks: str = ""


class Plot(ABC):
    """A plot or table of the report.

    section: the heading that it stands under, with all plots of that name. rank: its place on the page, from the least.
    title, reads: what it is, and how to read it. wide: whether it takes the whole width of the page.
    """

    section: ClassVar[str]
    rank: ClassVar[int]
    title: ClassVar[str]
    reads: ClassVar[str] = ""
    wide: ClassVar[bool] = False

    @abstractmethod
    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield what is drawn of the checkpoints, nothing where it would mean nothing."""


class OfEach(Plot):
    """A plot that is drawn for each checkpoint by itself."""

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """See `Plot.figures`; what a checkpoint does not hold is said in its place."""
        for one in told:
            try:
                yield self.figure(one)
            except LlmqError as e:
                yield Figure(one.label, lacks=str(e))

    @abstractmethod
    def figure(self, one: Told) -> Figure:
        """Return what is drawn of one checkpoint. What raises LlmqError is said in its place."""


def chart(rows: Sequence[Row]) -> alt.Chart:
    """Return a chart of these rows, no mark set yet."""
    return alt.Chart(alt.InlineData(values=[dict(r) for r in rows]))


def tips(**fields: str) -> list[alt.Tooltip]:
    """Return what is shown where the pointer rests, a line each: `seconds="seconds:Q|,.2f"`, or `of="checkpoint"`.

    A name of a field with how it is called and, of numbers, behind a bar its format; without one it is text.
    """
    found = []
    for field, said in fields.items():
        title, _, form = said.partition("|")
        kind = "Q" if form else "N"
        found.append(alt.Tooltip(f"{field}:{kind}", title=title, format=form or alt.Undefined))
    return found


def by_block() -> alt.X:
    """Return the axis of block numbers, for lines."""
    return alt.X("block:Q", title="block", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(nice=False))


def by_square(linears: Sequence[str]) -> dict[str, Any]:
    """Return the axes of a map: blocks from left to right, linears from top to bottom."""
    across = alt.X("block:O", title="block", axis=alt.Axis(labelOverlap=True, labelAngle=0))
    return {"x": across, "y": alt.Y("linear:N", title=None, sort=list(linears))}


def map_height(linears: Sequence[str]) -> int:
    """Return the height of such a map, in pixels."""
    return 22 * len(linears)


def by_label(told: Sequence[Told]) -> alt.Color:
    """Return a colour for each checkpoint, with a legend where there are several."""
    legend = alt.Legend(orient="top", columns=2, labelLimit=130) if len(told) > 1 else None
    return alt.Color("of:N", title=None, sort=[one.label for one in told], legend=legend)


def along(field: str, title: str, form: str = "", **scale: Any) -> dict[str, Any]:
    """Return what makes an axis of numbers with few ticks. form: of its labels. scale: `type="log"` and the like."""
    axis = alt.Axis(tickCount=5, format=form) if form else alt.Axis(tickCount=5)
    return {"shorthand": f"{field}:Q", "title": title, "axis": axis, **({"scale": alt.Scale(**scale)} if scale else {})}


def entries(told: Sequence[Told], kind: str, key: str) -> list[dict[str, Any]]:
    """Return figures by text or class of each checkpoint, a row each: `of` its label, `key` the name, the figures."""
    return [{"of": one.label, key: name, **found} for one in told for name, found in one.figures.get(kind, {}).items()]


def number(x: float | None, digits: int = 3) -> Cell:
    """Return a number as a cell, empty where there is none: 0.00123, 12,300, 1.2e-07."""
    if x is None:
        return Cell("")
    small = x != 0 and abs(x) < 1e-3
    text = f"{x:.{digits - 1}e}" if small else f"{x:,.{digits}g}" if abs(x) < 10**digits else f"{x:,.0f}"
    return Cell(text, x)


def percent(x: float | None, digits: int = 1) -> Cell:
    """Return a share as a cell: 0.25 is 25.0 %."""
    return Cell("") if x is None else Cell(f"{100 * x:.{digits}f} %", x)


def megabytes(x: float | None) -> Cell:
    """Return bytes as a cell."""
    return Cell("") if x is None else Cell(f"{x / 1e6:,.1f} MB", x)
