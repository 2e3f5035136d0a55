"""What the bytes are: the quantized weights with their scales, and what stays float, beside the float checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, Row, along, chart, tips
from llmq.report.read import Told

_PARTS = ("quantized", "left as it is", "float checkpoint")


@dataclass(frozen=True)
class Size(Plot):
    """A bar for each checkpoint, one for what it was made from."""

    section, rank, title = "At a glance", 20, "Size"
    reads = "Megabytes of all tensors. What is left as it is: norms, and embeddings and heads that were not quantized."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the bars."""
        rows = [row for one in told for row in _rows(one)]
        floats = {one.sized("float_bytes") for one in told} - {0}
        rows += [{"of": "float", "part": _PARTS[2], "MB": n / 1e6} for n in sorted(floats)]
        yield Figure(chart=_bars(rows, ["float", *(one.label for one in told)]))


def _rows(one: Told) -> list[Row]:
    packed = min(one.sized("quantized_weights") * one.sized("bits_per_weight") / 8, one.size)
    parts = {_PARTS[0]: packed, _PARTS[1]: one.size - packed} if packed else {_PARTS[1]: one.size}
    return [{"of": one.label, "part": part, "MB": n / 1e6} for part, n in parts.items()]


def _bars(rows: list[Row], order: list[str]) -> alt.Chart:
    legend = alt.Legend(orient="top", values=_PARTS[:2])
    return (
        chart(rows)
        .mark_bar(cornerRadius=2)
        .encode(
            x=alt.X(**along("MB", "megabytes"), stack="zero"),
            y=alt.Y("of:N", title=None, sort=order, axis=alt.Axis(labelLimit=140)),
            color=alt.Color("part:N", title=None, sort=list(_PARTS), legend=legend),
            order=alt.Order("part:N", sort="descending"),
            tooltip=tips(of="checkpoint", part="part", MB="megabytes|,.1f"),
        )
        .properties(height=34 * len(order))
    )
