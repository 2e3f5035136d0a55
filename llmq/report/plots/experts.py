"""How the calibration's tokens fell on the experts of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import altair as alt

from llmq.errors import LlmqError
from llmq.guard.reading import field
from llmq.report.plots._plot import Figure, OfEach, Row, chart, tips
from llmq.report.read import Line, Told

_CELLS = 16_000  # experts of all layers that are drawn: 60 bytes of the page each


@dataclass(frozen=True)
class Experts(OfEach):
    """A map of experts."""

    section, rank, title = "Activations", 400, "Tokens over experts"
    reads = "A square for each expert: its tokens, in times of what each had if all had the same. Empty ones had none."
    wide = True

    def figure(self, one: Told) -> Figure:
        """Return the map."""
        found, where = one.of("experts", dict, {}), f"experts in the record of {one.path}"
        layers = field(found, "layers", dict, where, {})
        rows = [row for layer in layers for row in _rows(layer, field(layers, layer, list, where), where)]
        if not rows:
            raise LlmqError("The model has no experts, or no text was run through it.")
        if len(rows) > _CELLS:
            raise LlmqError(f"{len(rows):,} experts are too many to draw; quantization.json has them under `experts`.")
        few, none = (len(field(found, key, list, where, [])) for key in ("few", "none"))
        said = f"{len(rows):,} experts in {len(layers)} layers: {few:,} had fewer tokens than inputs, {none:,} none."
        return Figure(one.label, _map(rows), says=[said])


def _rows(layer: str, counts: Sequence[int], where: str) -> list[Row]:
    """Return the squares of a layer. Raises LlmqError for what are no counts."""
    if not all(type(n) is int and 0 <= n < 2**53 for n in counts):
        raise LlmqError(f"{where}: {layer} has no list of numbers of tokens")
    mean, block = fmean(counts or [0]) or 1.0, Line.of(layer, {}).block
    place = layer if block is None else block
    return [
        {"layer": place, "expert": i, "tokens": n, "times": round(n / mean, 4) or None} for i, n in enumerate(counts)
    ]


def _map(rows: Sequence[Row]) -> alt.Chart:
    step = 14 if max(row["expert"] for row in rows) > 32 else 20
    marks = [1 / 16, 1 / 4, 1, 4, 16]
    legend = alt.Legend(orient="top", title="times the mean", values=marks, format="~g", gradientLength=220)
    scale = alt.Scale(type="log", domain=[marks[0], marks[-1]], clamp=True)
    return (
        chart(rows)
        .mark_rect()
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("layer:O", title="block", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("times:Q", scale=scale, legend=legend),
            tooltip=tips(layer="block", expert="expert", tokens="tokens|,d", times="times the mean|.3~g"),
        )
        .properties(height=step * len({row["layer"] for row in rows}))
    )
