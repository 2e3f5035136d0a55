"""How often each code of a linear is used: a grid that fits its weights uses all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import torch

from llmq.report.plots._plot import Figure, OfEach, Row, along, chart, tips
from llmq.report.read import Told


@dataclass(frozen=True)
class Codes(OfEach):
    """A histogram of codes."""

    section, rank, title = "Codes and scales of a linear", 200, "Use of the codes"
    reads = "The share of the weights that has each code, in the order of what the codes stand for."

    def figure(self, one: Told) -> Figure:
        """Return the histogram."""
        packed = one.chosen()
        counts = torch.bincount(packed.q.codes.flatten().long(), minlength=2**packed.q.grid.bits).double()
        levels, shares = packed.levels(), (counts / counts.sum()).tolist()
        order = sorted((i for i, level in enumerate(levels) if not math.isnan(level)), key=levels.__getitem__)
        rows = [{"place": p, "code": i, "stands": levels[i], "share": shares[i]} for p, i in enumerate(order)]
        used = [s for s in shares if s]
        entropy = -sum(s * math.log2(s) for s in used)
        holds = f"{len(used)} of {len(order)} codes are used; a code holds {entropy:.2f} bits of information"
        return Figure(one.label, _bars(rows), says=[f"{packed.name}: {packed.grid}. {holds}."])


def _bars(rows: Sequence[Row]) -> alt.Chart:
    few = len(rows) <= 32
    labels = f"{[row['code'] for row in rows]}[datum.value]" if few else "''"
    return (
        chart(rows)
        .mark_bar(cornerRadius=1 if few else 0)
        .encode(
            x=alt.X("place:O", title="code", axis=alt.Axis(labelAngle=0, labelExpr=labels, labelOverlap=True)),
            y=alt.Y(**along("share", "share of the weights", "~%")),
            tooltip=tips(code="code", stands="stands for, in scales|.4~g", share="share|.3%"),
        )
        .properties(height=220)
    )
