"""How the error goes through the model: the mean over the linears of each block, a line for each checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from llmq.report.plots._plot import Figure, Plot, along, by_block, by_label, chart, tips
from llmq.report.plots.heat import squares
from llmq.report.read import Told


@dataclass(frozen=True)
class Profile(Plot):
    """The mean error of each block."""

    section, rank, title = "Errors", 110, "Mean error by block"
    reads = "The mean over the linears of each block, of weights: every method measures that, so that lines compare."
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the lines."""
        rows = [{"of": one.label, **place} for one in told for place in _means(one)]
        if not rows:
            yield Figure(lacks="No errors were recorded.")
            return
        yield Figure(
            chart=chart(rows)
            .mark_line(point=alt.OverlayMarkDef(size=28))
            .encode(
                x=by_block(),
                y=alt.Y(**along("error", "mean weight error", ".1~e", type="log")),
                color=by_label(told),
                tooltip=tips(of="checkpoint", block="block", error="mean error|.3~g"),
            )
            .properties(height=230)
        )


def _means(one: Told) -> list[dict[str, float]]:
    blocks: dict[int, list[float]] = {}
    for square in squares(one, "weight"):
        blocks.setdefault(square["block"], []).append(square["weight"])
    means = {block: sum(each) / len(each) for block, each in sorted(blocks.items())}
    return [{"block": block, "error": mean} for block, mean in means.items() if mean > 0]
