"""What is recorded of the channels of an activation: how far the largest stand above the rest, before and after a fold.

    {"block": 3, "linears": ["model.layers.3.mlp.gate_proj", ...], "step": "smoothquant",
     "max": [0.1, 0.4, 0.6, 0.9, 9.5, 31.2], "after": [...], "channel": 138}            what a transform saw
    {"block": 3, "linears": [...], "rms": [...], "channel": 138}                        what the solver saw

Each list is `QUANTILES` of a number that every channel has: its largest magnitude (`max`), its mean magnitude (`mean`,
of AWQ, which goes by that) or its root mean square. All are made of what the steps need anyway, so that nothing more is
collected. `channel` is the one with the largest. Experts, of which there are thousands, have no entry.
Not here: the statistics themselves (stats.py), when they are collected (transforming.py, solving.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.stats import AbsMax, AbsMean, Hessian, MeanSquare, Stats
from llmq.steps import Scaling

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Shares of the channels that lie at or below the numbers of a list: the least, quartiles, 99 %, the largest."""


def scaled(
    block: int, linears: Sequence[str], step: str, stats: Stats, scaling: Scaling | None
) -> list[dict[str, Any]]:
    """Return the entry of a site that a transform looked at; none where it goes by neither maxima nor means.

    scaling: what it found, None where it left the site alone.
    """
    seen = {"max": stats[AbsMax].max} if AbsMax in stats else {}
    seen |= {"mean": stats[AbsMean].mean()} if AbsMean in stats and not seen else {}
    return [_entry(block, linears, {"step": step}, kind, x_K, scaling) for kind, x_K in seen.items()]


def solved(block: int, linears: Sequence[str], stats: Stats) -> list[dict[str, Any]]:
    """Return the entry of a site as its linears were solved; none where no mean squares were collected."""
    seen = [stats[Hessian].mean().diagonal()] if Hessian in stats else []
    seen += [stats[MeanSquare].mean()] if MeanSquare in stats and not seen else []
    return [_entry(block, linears, {}, "rms", x_K.clamp(min=0).sqrt()) for x_K in seen]


def _entry(
    block: int, linears: Sequence[str], step: dict[str, Any], kind: str, x_K: Tensor, scaling: Scaling | None = None
) -> dict[str, Any]:
    after = {} if scaling is None else {"after": quantiles(x_K / scaling.scale.to(x_K.device))}
    found = {kind: quantiles(x_K), **after, "channel": int(x_K.argmax())}
    return {"block": block, "linears": list(linears), **step, **found}


def quantiles(x_K: Tensor) -> list[float]:
    """Return `QUANTILES` of a float `[K]`, each the value of some channel, to four digits.

    Example: of 0, 1 ... 100 it is [0.0, 25.0, 50.0, 75.0, 99.0, 100.0].
    """
    at = torch.tensor(QUANTILES, dtype=torch.float64) * (len(x_K) - 1)
    found = x_K.float().sort().values[at.round().long().to(x_K.device)]
    return [float(f"{x:.4g}") for x in found.tolist()]
