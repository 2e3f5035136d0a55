"""The page: one HTML file with its script, its style and its data, that asks no network for anything.

    page(sections, title)      the text of the file
    pictures(sections, folder) each chart as a PNG, made without a browser

Vega draws the charts as SVG in the reader's colours; a policy in the page's head forbids any request. Names come from
files: the template escapes them, and data stands in the page as JSON in which no tag can end.
Not here: what is drawn (plots/), the colours (theme.py).
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined

from llmq import __version__, registry
from llmq.report import START
from llmq.report.plots._plot import Figure, Plot
from llmq.report.read import Told
from llmq.report.theme import DARK, LIGHT, chart_config
from llmq.report.tiles import about, tiles

_PICTURE = 720  # pixels of a PNG's width, before it is drawn at twice that


@dataclass(frozen=True)
class Shown:
    """A plot with what was drawn of it. name: of its file."""

    name: str
    plot: Plot
    figures: Sequence[Figure]


def shown(told: Sequence[Told]) -> list[Shown]:
    """Return all plots, drawn, in the order of the page."""
    plots = {name: registry.find("report.plots", name)() for name in registry.names("report.plots")}
    drawn = [Shown(name, plot, _once(list(plot.figures(told)))) for name, plot in plots.items()]
    return sorted((d for d in drawn if d.figures), key=lambda d: d.plot.rank)


@cache
def _script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, in which no tag can end."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _once(figures: Sequence[Figure]) -> Sequence[Figure]:
    """Return figures with what all of them lack said once."""
    lacks = {figure.lacks for figure in figures}
    return [Figure(lacks=lacks.pop())] if len(figures) > 1 and len(lacks) == 1 and "" not in lacks else figures


def page(drawn: Sequence[Shown], told: Sequence[Told]) -> str:
    """Return the page as text."""
    charts = list(_charts(drawn))
    specs = {key: _spec(figure, plot) for key, plot, figure in charts}
    keys = {id(figure): key for key, _, figure in charts}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("llmq.report").joinpath("page.html.jinja").read_text("utf-8"))
    return START.decode() + template.render(
        version=__version__,
        title=", ".join(one.label for one in told),
        told=told,
        about=about,
        tiles=tiles,
        sections=[(name, list(_rows(of))) for name, of in groupby(drawn, lambda d: d.plot.section)],
        key=lambda figure: keys[id(figure)],
        specs=specs,
        themes={scheme: chart_config(scheme) for scheme in ("light", "dark")},
        light=LIGHT,
        dark=DARK,
        script=_script(),
    )


def _rows(drawn: Iterable[Shown]) -> Iterator[list[Shown]]:
    """Yield the plots of a section in rows: a wide one by itself, others that follow each other side by side."""
    row: list[Shown] = []
    for one in drawn:
        if row and (one.plot.wide or row[-1].plot.wide):
            yield row
            row = []
        row.append(one)
    yield row


def pictures(drawn: Sequence[Shown]) -> Iterator[tuple[str, bytes]]:
    """Yield each chart as a PNG by the name of its file, drawn on white."""
    config = chart_config("light") | {"background": "white", "padding": 12}
    for key, plot, figure in _charts(drawn):
        spec = _spec(figure, plot) | {"width": _PICTURE, "autosize": {"type": "pad"}, "config": config}
        yield f"{key}.png", vl_convert.vegalite_to_png(json.dumps(spec), scale=2)


def _charts(drawn: Sequence[Shown]) -> Iterator[tuple[str, Plot, Figure]]:
    """Yield all figures that are charts by names of their own: `heat`, or `heat-int4` and `heat-int8` of several."""
    for one in drawn:
        charts = [f for f in one.figures if f.chart is not None]
        for i, figure in enumerate(charts):
            of = _word(figure.of)
            same = [_word(f.of) for f in charts].count(of) > 1
            parts = [one.name, *([of] if len(charts) > 1 else []), *([str(i + 1)] if same else [])]
            yield "-".join(p for p in parts if p), one.plot, figure


def _word(label: str) -> str:
    """Return what stands before the first comma of a label, as a part of a file's name."""
    return re.sub(r"[^\w.]+", "-", label.partition(",")[0]).strip("-")[:60]


def _spec(figure: Figure, plot: Plot) -> dict[str, Any]:
    """Return a chart as Vega-Lite takes it, as wide as its place."""
    found: dict[str, Any] = figure.chart.to_dict(validate=False)
    found.pop("config", None)
    said = f"{plot.title}, {figure.of}" if figure.of else plot.title
    return found | {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}, "description": said}
