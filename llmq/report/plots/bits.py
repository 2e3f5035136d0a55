"""How many bits each linear has, where they are not all alike: under a budget, or with overrides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, Row, by_square, chart, map_height, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Bits(Plot):
    """A map of the bits of a code."""

    section, rank, title = "Errors", 130, "Bits by block and linear"
    reads = "Bits of a code, without scales. Shown where linears differ."
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield a map for each checkpoint whose linears differ."""
        for one in told:
            inside = [x for x in one.lines if x.block is not None and x.bits is not None]
            if len({x.bits for x in inside}) > 1:
                rows = {(x.block, x.leaf): {"block": x.block, "linear": x.leaf, "bits": x.bits} for x in inside}
                yield Figure(one.label, _map(list(rows.values())))


def _map(rows: Sequence[Row]) -> alt.Chart:
    linears = list(dict.fromkeys(r["linear"] for r in rows))
    return (
        chart(rows)
        .mark_rect(cornerRadius=1)
        .encode(
            **by_square(linears),
            color=alt.Color("bits:O", title="bits", legend=alt.Legend(orient="top")),
            tooltip=tips(block="block", linear="linear", bits="bits"),
        )
        .properties(height=map_height(linears))
    )
