"""The memory that a run held, from its beginning to its end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, by_label, chart, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Memory(Plot):
    """A line for each checkpoint."""

    section, rank, title = "Time and memory", 610, "Memory over time"
    reads = "Of this process in RAM, where events were told: at each step of each block."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the lines; the plot of the stages says what is lacking."""
        rows = [{"of": t.label, "s": s, "GB": n / 1e9} for t in told if t.timings for s, n in t.timings.memory]
        if not rows:
            return
        yield Figure(
            chart=chart(rows)
            .mark_line(interpolate="step-after")
            .encode(
                x=alt.X(**along("s", "seconds since the command began")),
                y=alt.Y(**along("GB", "GB")),
                color=by_label(told),
                tooltip=tips(of="checkpoint", s="seconds|,.1f", GB="GB|.2f"),
            )
            .properties(height=220),
            says=[said for one in told if (said := _most(one))],
        )


def _most(one: Told) -> str:
    if one.timings is None:
        return ""
    gpu = "" if one.timings.device_most is None else f", {one.timings.device_most / 1e9:.2f} GB of its GPUs"
    return f"{one.label}: {one.timings.most / 1e9:.2f} GB at most{gpu}."
