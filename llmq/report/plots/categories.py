"""KL by category, where a folder of texts was scored: languages, code, long documents, chat."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, by_label, chart, entries, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Categories(Plot):
    """A point for each text and checkpoint, with its interval."""

    section, rank, title = "Evaluation", 730, "KL by text"
    reads = "The mean KL on each text of a folder, with its 95 % interval: what the calibration lacked stands out."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the points; the table of scores says what is lacking."""
        rows = [row | _interval(row) for row in entries(told, "categories", "text")]
        if not rows:
            return
        texts = list(dict.fromkeys(r["text"] for r in rows))
        place: dict[str, Any] = {"y": alt.Y("text:N", title=None, sort=texts)}
        place |= {"yOffset": alt.YOffset("of:N")} if len(told) > 1 else {}
        said = {"of": "checkpoint", "text": "text", "kl_mean": "mean KL|.4~g", "low": "from|.4~g", "high": "to|.4~g"}
        base = chart(rows).encode(color=by_label(told), tooltip=tips(**said, top1="top-1|.2%", tokens="tokens|,d"))
        spans = base.mark_rule(strokeWidth=2, opacity=0.5).encode(x="low:Q", x2="high:Q", **place)
        points = base.mark_circle(size=80, opacity=1).encode(x=alt.X(**along("kl_mean", "mean KL, nats")), **place)
        yield Figure(chart=(spans + points).properties(height=(8 + 18 * len(told)) * len(texts)))


def _interval(found: Mapping[str, Any]) -> dict[str, float]:
    low, high = found["kl_interval"]
    return {} if low is None or high is None else {"low": low, "high": high}
