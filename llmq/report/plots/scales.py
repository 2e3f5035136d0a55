"""How large the scales of a linear are: a wide spread tells of rows or groups with outliers."""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import torch

from llmq.errors import LlmqError
from llmq.report.plots._plot import Figure, OfEach, Row, along, chart, tips
from llmq.report.read import Told

_BINS = 48


@dataclass(frozen=True)
class Scales(OfEach):
    """A histogram of the scales' magnitudes, in bins of equal ratio."""

    section, rank, title = "Codes and scales of a linear", 210, "Scales"
    reads = "How many groups have a scale of each magnitude, on a logarithmic axis."

    def figure(self, one: Told) -> Figure:
        """Return the histogram."""
        packed = one.chosen()
        scale = packed.q.params.scale.float().flatten()
        known = scale[scale != 0].abs().log10()
        if not len(known):
            raise LlmqError(f"{packed.name} has no scale but 0.")
        low, middle, high = (float(f()) for f in (known.min, known.median, known.max))
        counts = torch.histc(known, _BINS, low, max(high, low + 1e-3)).tolist()
        edges = (10 ** torch.linspace(low, max(high, low + 1e-3), _BINS + 1)).tolist()
        rows = [{"from": a, "to": b, "groups": int(n)} for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
        said = (
            f"{len(scale):,} scales, the median {10**middle:.3g}, the largest {10 ** (high - middle):.3g} times that."
        )
        negative = int((scale < 0).sum())
        more = f" {negative:,} are negative: grids whose one level more lies above zero." if negative else ""
        return Figure(one.label, _bars(rows), says=[f"{packed.name}: {said}{more}"])


def _bars(rows: Sequence[Row]) -> alt.Chart:
    return (
        chart(rows)
        .mark_rect()
        .encode(
            x=alt.X(**along("from", "magnitude of the scale", "~g", type="log", nice=False)),
            x2="to:Q",
            y2=alt.Y2(datum=0),
            y=alt.Y(**along("groups", "groups")),
            tooltip=tips(**{"from": "from|.3~g", "to": "to|.3~g", "groups": "groups|,d"}),
        )
        .properties(height=220)
    )
