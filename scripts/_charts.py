"""Charts for docs/learn, as small SVG files: lines over two axes, or bars, on a panel that follows light and dark.

    chart = Chart("threshold", "error", log=True)
    chart.line("int8", [1, 2, 3], [0.3, 0.1, 0.2])
    chart.mark("entropy", 2.2)                       an upright line at x = 2.2
    chart.save("error.svg")

A page shows them by `<img>`, where the colours of the page do not reach: the file has both sets, and a background.
Coordinates are whole tenths of a pixel: the last bits of a machine's sums do not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 48
_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.panel { fill: #ffffff } .axis { stroke: #8c959f } .grid { stroke: #d8dee4 }
.s0 { stroke: #0969da; fill: #0969da } .s1 { stroke: #bc4c00; fill: #bc4c00 }
.s2 { stroke: #1a7f37; fill: #1a7f37 } .s3 { stroke: #8250df; fill: #8250df }
path { stroke-width: 2; fill: none !important } rect.bar { stroke: none } .mark { stroke-dasharray: 5 3 }
text.s0, text.s1, text.s2, text.s3 { stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .panel { fill: #0d1117 } .axis { stroke: #6e7681 } .grid { stroke: #21262d }
.s0 { stroke: #58a6ff; fill: #58a6ff } .s1 { stroke: #f0883e; fill: #f0883e }
.s2 { stroke: #3fb950; fill: #3fb950 } .s3 { stroke: #bc8cff; fill: #bc8cff }
}
</style>"""


class Chart:
    """Series over x and y. log: a logarithmic y axis, for values above 0."""

    def __init__(self, x: str, y: str, *, log: bool = False) -> None:
        self._titles, self._log = (x, y), log
        self._lines: list[tuple[str, Sequence[float], Sequence[float], bool]] = []
        self._marks: list[tuple[str, float]] = []

    def line(self, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        """Add a line."""
        self._lines.append((name, x, y, False))

    def bars(self, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        """Add bars that stand on the axis, at evenly spaced x; those of two series lie one over the other."""
        self._lines.append((name, x, y, True))

    def mark(self, name: str, x: float) -> None:
        """Add an upright dashed line."""
        self._marks.append((name, x))

    def save(self, path: str) -> None:
        """Write the SVG file."""
        Path(path).write_text("\n".join([*self._frame(), *self._series(), "</svg>\n"]))

    def _frame(self) -> list[str]:
        right, low = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        made = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
            _STYLE,
            f'<rect class="panel" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
            f'<line class="axis" x1="{_LEFT}" y1="{low}" x2="{right}" y2="{low}"/>',
            f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(self._titles[0])}</text>',
            f'<text x="10" y="18">{escape(self._titles[1])}</text>',
        ]
        for value, at in _ticks(*self._ends(0), self._x()):
            made.append(f'<text x="{at:.1f}" y="{low + 18}" text-anchor="middle">{value:g}</text>')
        for value, at in self._y_ticks():
            made.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
            made.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
        return made

    def _series(self) -> list[str]:
        made, x, y, low = [], self._x(), self._y(), HEIGHT - _BOTTOM
        for i, (name, xs, ys, bars) in enumerate(self._lines):
            points = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True)]
            if bars:
                wide = (points[1][0] - points[0][0]) * 0.8
                for a, b in points:
                    size = f'width="{wide:.1f}" height="{low - b:.1f}"'
                    made.append(f'<rect class="bar s{i}" x="{a - wide / 2:.1f}" y="{b:.1f}" {size}/>')
            else:
                made.append(f'<path class="s{i}" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in points)}"/>')
            at = f'x="{WIDTH - _RIGHT}" y="{_TOP + 2 + 17 * i}"'
            made.append(f'<text class="s{i}" {at} text-anchor="end">{escape(name)}</text>')
        for i, (name, at) in enumerate(self._marks):
            kind, top = f"s{len(self._lines) + i}", _TOP + 17 * i
            made.append(f'<line class="mark {kind}" x1="{x(at):.1f}" y1="{top}" x2="{x(at):.1f}" y2="{low}"/>')
            made.append(f'<text class="{kind}" x="{x(at) + 4:.1f}" y="{top + 10}">{escape(name)}</text>')
        return made

    def _ends(self, axis: int) -> tuple[float, float]:
        values = [v for line in self._lines for v in line[1 + axis]]
        return min(values), max(values)

    def _x(self) -> Callable[[float], float]:
        low, high = self._ends(0)
        return lambda v: _LEFT + 8 + (v - low) / (high - low) * (WIDTH - _LEFT - _RIGHT - 16)

    def _y(self) -> Callable[[float], float]:
        low, high = self._ends(1)
        scaled: Callable[[float], float] = math.log if self._log else float
        base, top = scaled(low) if self._log else 0.0, scaled(high)
        return lambda v: HEIGHT - _BOTTOM - (scaled(v) - base) / (top - base) * (HEIGHT - _BOTTOM - _TOP - 8)

    def _y_ticks(self) -> list[tuple[float, float]]:
        low, high = self._ends(1)
        if not self._log:
            return _ticks(0.0, high, self._y())
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [(10.0**p, self._y()(10.0**p)) for p in powers]


def _ticks(low: float, high: float, place: Callable[[float], float]) -> list[tuple[float, float]]:
    """Return some 5 round values between two, and where each lies."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    count = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(round(k * step, 10), place(k * step)) for k in count]
