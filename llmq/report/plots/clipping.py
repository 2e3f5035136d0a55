"""Where the float weights of a linear lay in the range that their group's grid covers: what is outside was clipped."""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import torch

from llmq.errors import LlmqError
from llmq.report.plots._plot import Figure, OfEach, Row, along, chart, tips
from llmq.report.read import Told
from llmq.report.weights import PackedLinear

_LOW, _HIGH, _BINS = -0.25, 1.25, 60


@dataclass(frozen=True)
class Clipping(OfEach):
    """A histogram of places in the range."""

    section, rank, title = "Codes and scales of a linear", 220, "Range and clipping"
    reads = "Float weights by their place between the least (0) and the largest value (1) that their group can hold."

    def figure(self, one: Told) -> Figure:
        """Return the histogram."""
        packed = one.chosen()
        at = packed.positions(_floats(one, packed))
        at = at[at.isfinite()]
        if not len(at):
            raise LlmqError(f"{packed.name} has no group with a range.")
        counts = torch.histc(at.clamp(_LOW, _HIGH), _BINS, _LOW, _HIGH).tolist()
        edges = torch.linspace(_LOW, _HIGH, _BINS + 1).tolist()
        rows = [
            {"from": a, "to": b, "share": n / at.numel(), "part": _part(a, b)}
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
        return Figure(one.label, _bars(rows), says=[_said(packed, at)])


def _floats(one: Told, packed: PackedLinear) -> torch.Tensor:
    """Return the float weights. Raises LlmqError where they are not at hand, or are another model's."""
    W_NK, name = one.weights.floats(packed.name), packed.name
    if W_NK is None:
        raise LlmqError(f"The float weights of {name} are not at hand: --against SRC, what it was made from.")
    if W_NK.shape != packed.q.codes.shape:
        was, now = list(W_NK.shape), list(packed.q.codes.shape)
        raise LlmqError(f"{name} is {now}, in --against {was}: that is another model.")
    return W_NK


def _part(low: float, high: float) -> str:
    """Return on which side of the ends a bin lies, whose edges float32 has rounded."""
    return "inside" if low >= -1e-6 and high <= 1 + 1e-6 else "outside"


def _said(packed: PackedLinear, at: torch.Tensor) -> str:
    step = 1 / (2**packed.q.grid.bits - 1)
    beyond = (at < -step / 2) | (at > 1 + step / 2)
    furthest = max(float(torch.maximum(-at, at - 1).max() / step), 0.0)
    clipped = f"{float(beyond.float().mean()):.3%} lie more than half a step outside, and were clipped"
    return f"{packed.name}: {clipped}; the furthest by {furthest:.2g} steps."


def _bars(rows: Sequence[Row]) -> alt.Chart:
    return (
        chart(rows)
        .mark_rect()
        .encode(
            x=alt.X(**along("from", "place in the group's range", domain=[_LOW, _HIGH], nice=False)),
            x2="to:Q",
            y2=alt.Y2(datum=0),
            y=alt.Y(**along("share", "share of the weights", "~%")),
            color=alt.Color("part:N", title=None, sort=["inside", "outside"], legend=alt.Legend(orient="top")),
            tooltip=tips(**{"from": "from|.3~f", "to": "to|.3~f", "share": "share|.3%"}),
        )
        .properties(height=220)
    )
