"""What the activations of a site allow: whether its statistics can be used, and where a static grid of its input lies.

Not here: collecting them (calibration/collect.py), what is recorded of trouble (trouble.py).
"""

from typing import Any

from llmq.errors import LlmqError
from llmq.histogram import Histogram
from llmq.pipeline.experts import NO_TOKEN, Layer
from llmq.stats import Stats
from llmq.types import Parameters, RangedGrid

NOT_FINITE = "activations, or their squares, are NaN or infinite"


def unusable(stats: Stats) -> str:
    """Return why nothing can be made of the activations of a site, "" where it can."""
    if not stats.tokens:
        return NO_TOKEN
    return "" if stats.finite() else NOT_FINITE


def no_static_scale(linear: str, layer: Layer | None, why: str) -> LlmqError:
    """Return what to raise where an input should get a static scale but its activations are `unusable`."""
    if why == NOT_FINITE:
        return LlmqError(f"{linear}: its input is NaN or infinite, so it has no static scale; try --dtype float32")
    more = "" if layer is None or layer.experts.batched else ", --experts all"
    return LlmqError(
        f"{linear}: no token of the calibration came here, so its input has no static scale; give more "
        f"--samples{more} or --act token"
    )


def static_input(grid: RangedGrid, histogram: Histogram) -> tuple[Parameters, dict[str, Any]]:
    """Return what is fixed of the grid of a site's input, `[1]` each, and a line on what share of it is clipped."""
    values, counts = histogram.values()
    params = grid.calibrated(values, counts)
    share = float(counts[values > grid.largest(params)].sum() / counts.sum())
    return params, {"input_clipped": round(share, 6)} if share else {}
