"""How often both models rank the same token first, by the class of the token: where the loss hides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, by_label, chart, entries, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Classes(Plot):
    """Bars for each class of tokens."""

    section, rank, title = "Evaluation", 720, "Top-1 by class of token"
    reads = "The share of the tokens of each class at which the float model's first choice is kept."

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the bars; the table of scores says what is lacking."""
        rows = entries(told, "classes", "class")
        if not rows:
            return
        order, classes = [one.label for one in told], list(dict.fromkeys(r["class"] for r in rows))
        least = min(0.5, int(10 * min(r["top1"] for r in rows)) / 10)
        said = {"of": "checkpoint", "class": "class", "top1": "top-1|.2%", "kl_mean": "mean KL|.4~g"}
        yield Figure(
            chart=chart(rows)
            .mark_bar(cornerRadius=2, clip=True)
            .encode(
                x=alt.X(**along("top1", "top-1", "~%", domain=[least, 1])),
                y=alt.Y("class:N", title=None, sort=classes),
                color=by_label(told),
                tooltip=tips(**said, tokens="tokens|,d"),
                **({"yOffset": alt.YOffset("of:N", sort=order)} if len(told) > 1 else {}),
            )
            .properties(height=(12 + 14 * len(told)) * len(classes))
        )
