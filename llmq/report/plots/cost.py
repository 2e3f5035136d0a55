"""What a byte buys: size against KL divergence, a point for each checkpoint that was evaluated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, chart, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Cost(Plot):
    """Size against KL, of several."""

    section, rank, title = "At a glance", 30, "Size against KL"
    reads = "Left is smaller, down is nearer to the float model. The line joins those that no other beats in both."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the points; nothing of one checkpoint alone."""
        known = [one for one in told if one.figures.get("kl_mean")]
        rows = [{"of": one.label, "MB": one.size / 1e6, "KL": one.figures["kl_mean"]} for one in known]
        if len(told) < 2:
            return
        if len(rows) < 2:
            yield Figure(lacks="Fewer than two of them were evaluated: llmq eval OUT --baseline SRC --keep")
            return
        best = [r for r in rows if not any(o["MB"] < r["MB"] and o["KL"] < r["KL"] for o in rows)]
        x = alt.X(**along("MB", "megabytes", zero=False, padding=30))
        y = alt.Y(**along("KL", "KL, nats a token", "~g", type="log", nice=False, padding=24))
        color = alt.Color("of:N", legend=None, sort=[one.label for one in told])
        line = chart(best).mark_line(opacity=0.5, strokeDash=[4, 3]).encode(x=x, y=y)
        said = tips(of="checkpoint", MB="megabytes|,.1f", KL="KL|.4g")
        points = chart(rows).mark_circle(size=110, opacity=1).encode(x=x, y=y, color=color, tooltip=said)
        names = chart(rows).mark_text(dy=-13).encode(x=x, y=y, text="of:N")
        yield Figure(chart=(line + points + names).properties(height=260))
