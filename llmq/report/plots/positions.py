"""KL divergence by the position of the token in its window: whether the error grows with the context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, by_label, chart, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Positions(Plot):
    """A line for each checkpoint."""

    section, rank, title = "Evaluation", 710, "KL by position"
    reads = "The mean KL of the tokens between two positions: a line that rises says that errors gather in the context."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the lines; the table of scores says what is lacking."""
        pairs = [(one.label, *pair) for one in told for pair in one.figures.get("kl_by_position", ())]
        if not pairs:
            return
        yield Figure(
            chart=chart([{"of": of, "first": first, "KL": kl} for of, first, kl in pairs])
            .mark_line(interpolate="step-after", point=alt.OverlayMarkDef(size=24))
            .encode(
                x=alt.X(**along("first", "first position", "d")),
                y=alt.Y(**along("KL", "mean KL, nats")),
                color=by_label(told),
                tooltip=tips(of="checkpoint", first="from position|,d", KL="mean KL|.4~g"),
            )
            .properties(height=230)
        )
