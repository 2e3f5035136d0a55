"""The error of every linear: blocks from left to right, the linears of a block from top to bottom."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import altair as alt

from llmq.report.plots._plot import Figure, Plot, Row, by_square, chart, map_height, tips
from llmq.report.read import Line, Told

_NAMED = 8  # linears outside of the blocks that are named
_ABSENT = "No errors were recorded: another tool made this checkpoint, or it was exported without its record."


@dataclass(frozen=True)
class Heat(Plot):
    """A heat map for each checkpoint, on one scale of colours."""

    section, rank, title = "Errors", 100, "Error by block and linear"
    reads = (
        "A square for each linear of each block, on a logarithmic scale: the squared error of its outputs on "
        "calibration text, relative to their mean square, or that of its weights where not all measured outputs. A dot "
        "marks numerical trouble. The experts of a layer are one square, their mean."
    )
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the heat maps."""
        kinds = {one.kind for one in told}
        kind = kinds.pop() if len(kinds) == 1 else "weight"  # which all measure, so that one scale holds for all
        found = {one.label: squares(one, kind) for one in told}
        errors = [s["error"] for each in found.values() for s in each if s["error"] > 0]
        for one in told:
            rows = found[one.label]
            if not rows or not errors:
                yield Figure(one.label, lacks=_ABSENT)
                continue
            outside = [f"{x.name}: {e:.3g}" for x in one.lines if x.block is None and (e := x.error(kind))]
            more = f" and {len(outside) - _NAMED:,} more" if len(outside) > _NAMED else ""
            says = [f"Outside of the blocks: {', '.join(outside[:_NAMED])}{more}."] if outside else []
            yield Figure(one.label, _map(rows, kind, (min(errors), max(errors))), says=says)


def squares(one: Told, kind: str) -> list[Row]:
    """Return the squares of a checkpoint: of each block and leaf the mean error, how many linears, their trouble."""
    places: dict[tuple[int, str], list[Line]] = {}
    for line in one.lines:
        if line.block is not None and line.error(kind) is not None:
            places.setdefault((line.block, line.leaf), []).append(line)
    return [_square(block, leaf, lines, kind) for (block, leaf), lines in places.items()]


def _square(block: int, leaf: str, lines: Sequence[Line], kind: str) -> Row:
    bits = sorted({line.bits for line in lines if line.bits is not None})
    return {
        "block": block,
        "linear": leaf,
        "error": fmean(line.error(kind) or 0.0 for line in lines),
        "weight": fmean(line.error("weight") or 0.0 for line in lines),
        "bits": ", ".join(f"{b:g}" for b in bits),
        "trouble": "; ".join(dict.fromkeys(f"{k}: {w}" for line in lines for k, w in line.trouble.items())),
        "of": len(lines),
    }


def _map(rows: list[Row], kind: str, domain: tuple[float, float]) -> alt.LayerChart:
    linears = list(dict.fromkeys(r["linear"] for r in rows))
    place = by_square(linears)
    scale = alt.Scale(type="log", domain=[domain[0], max(domain[1], 1.01 * domain[0])], clamp=True)
    legend = alt.Legend(orient="top", title=f"{kind} error", gradientLength=220, format=".1~e")
    said = {"error": f"{kind} error|.3~g", "weight": "weight error|.3~g", "bits": "bits", "trouble": "trouble"}
    told_of = tips(block="block", linear="linear", of="linears|d", **said)
    base = chart(rows)
    color = alt.Color("error:Q", scale=scale, legend=legend)
    rects = base.mark_rect(cornerRadius=1).encode(**place, color=color, tooltip=told_of)
    dots = base.transform_filter("datum.trouble != ''").mark_circle(size=22, opacity=1)
    return (rects + dots.encode(**place, tooltip=told_of)).properties(height=map_height(linears))
