"""How far the largest channel of each input stands above the median one: before and after a transform, as solved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, Row, along, by_block, chart, tips
from llmq.report.read import Channels as Entry
from llmq.report.read import Told

_ABSENT = "No channels were recorded: the method reads no activations, or an llmq before December 2026 made it."
_OF = {"max": "largest magnitude", "mean": "mean magnitude", "rms": "root mean square"}


@dataclass(frozen=True)
class Channels(Plot):
    """A line for each kind of input."""

    section, rank, title = "Activations", 300, "Outliers by channel"
    reads = (
        "The largest channel of each input, in times of the median channel. A transform moves outliers into the "
        "weights: dashed before it, solid after. As solved: behind all transforms and quantized blocks."
    )
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield a chart for each transform, and one of the inputs as they were solved."""
        for one in told:
            if not one.channels:
                yield Figure(one.label, lacks=_ABSENT)
            for step in dict.fromkeys(e.step for e in one.channels):
                entries = [e for e in one.channels if e.step == step]
                by = _OF[entries[0].kind]
                name = f"{step}, by the {by} of each channel" if step else f"as solved, by the {by} of each channel"
                yield Figure(
                    f"{one.label}: {name}" if len(told) > 1 else name,
                    _lines(entries, several=bool(step)),
                    says=[_furthest(entries)],
                )


def _furthest(entries: Sequence[Entry]) -> str:
    worst = max(entries, key=lambda e: e.above)
    where = f"channel {worst.channel}, input of {worst.site} in block {worst.block}"
    return f"The furthest{' after it' if worst.after else ''}: {where}, {worst.above:.3g} times the median."


def _lines(entries: Sequence[Entry], *, several: bool) -> alt.Chart:
    rows = [row for e in entries for row in _rows(e, several=several)]
    dash = alt.StrokeDash("when:N", title=None, sort=["after", "before"], legend=alt.Legend(orient="bottom"))
    legend = alt.Legend(orient="top", columns=2, labelLimit=130)
    values = {"largest": "largest channel|.4~g", "high": "99 % of them below|.4~g", "middle": "median channel|.4~g"}
    return (
        chart(rows)
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=by_block(),
            y=alt.Y(**along("above", "largest over median channel", "~g", type="log")),
            color=alt.Color("input:N", title="input of", sort=None, legend=legend),
            tooltip=tips(
                input="input of", block="block", when="when", above="largest over median|.3~g", **values,
                channel="number of the largest",
            ),
            **({"strokeDash": dash} if several else {}),
        )
        .properties(height=260)
    )  # fmt: skip


def _rows(entry: Entry, *, several: bool) -> Iterator[Row]:
    lists = {"before": entry.before, "after": entry.after or entry.before} if several else {"as solved": entry.before}
    for when, (_, _, middle, _, high, largest) in lists.items():
        if middle > 0 and largest > 0:
            yield {
                "block": entry.block, "input": entry.site, "when": when, "above": largest / middle,
                "largest": largest, "high": high, "middle": middle, "channel": entry.channel,
            }  # fmt: skip
