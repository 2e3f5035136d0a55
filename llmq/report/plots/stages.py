"""Where the time of a run went, stage by stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, Row, along, chart, tips
from llmq.report.read import Told
from llmq.show import span

_ABSENT = "Times are kept by llmq quantize --report alone; the checkpoint itself holds none, so that its bytes repeat."
_LEAST, _SHOWN = 0.005, 8  # of the whole, and how many at most: the other stages are one


@dataclass(frozen=True)
class Stages(Plot):
    """A bar for each stage; of several checkpoints one for each of them, parted."""

    section, rank, title = "Time and memory", 600, "Time by stage"
    reads = "Seconds of each stage, of all blocks together: forward is the calibration running through them."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the bars, and what is lacking."""
        timed = [one for one in told if one.timings]
        if timed:
            large = _largest(timed)
            rows = [row for one in timed for row in _rows(one, large)]
            says = [said for one in timed if (said := _resumed(one))]
            yield Figure(chart=_bars(rows, [one.label for one in timed]), says=says)
        for one in told:
            if not one.timings:
                yield Figure(one.label, lacks=_ABSENT)


def _largest(timed: Sequence[Told]) -> list[str]:
    """Return the stages that have colours of their own, in the order in which they come."""
    sums: dict[str, float] = {}
    for name, seconds in (pair for one in timed if one.timings for pair in one.timings.stages.items()):
        sums[name] = sums.get(name, 0.0) + seconds
    least = sorted(sums.values(), reverse=True)[:_SHOWN][-1]
    return [name for name, seconds in sums.items() if seconds >= max(least, _LEAST * sum(sums.values()))]


def _rows(one: Told, large: Sequence[str]) -> Iterator[Row]:
    kept = one.timings.stages if one.timings else {}
    whole = sum(kept.values()) or 1.0
    rest = sum(seconds for name, seconds in kept.items() if name not in large)
    stages = {name: kept[name] for name in large if name in kept} | ({"the rest": rest} if rest else {})
    for name, seconds in stages.items():
        yield {"of": one.label, "stage": name, "seconds": seconds, "share": seconds / whole, "time": span(seconds)}


def _resumed(one: Told) -> str:
    first = min(one.timings.blocks, default=0) if one.timings else 0
    return f"{one.label} went on at block {first} of an earlier run, whose time is not in it." if first else ""


def _bars(rows: Sequence[Row], order: list[str]) -> alt.Chart:
    stages, several = list(dict.fromkeys(r["stage"] for r in rows)), len(order) > 1
    along_y = alt.Y("of:N", title=None, sort=order) if several else alt.Y("stage:N", title=None, sort=stages)
    legend = alt.Legend(orient="top", columns=2, labelLimit=130) if several else None
    return (
        chart(rows)
        .mark_bar(cornerRadius=2)
        .encode(
            x=alt.X(**along("seconds", "seconds"), stack="zero" if several else None),
            y=along_y,
            color=alt.Color("stage:N", title=None, sort=stages, legend=legend),
            tooltip=tips(of="checkpoint", stage="stage", time="time", seconds="seconds|,.2f", share="share|.1%"),
        )
        .properties(height=34 * len(order) if several else 24 * len(stages))
    )
