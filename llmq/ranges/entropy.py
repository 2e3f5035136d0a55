"""Entropy: the clipping threshold whose quantized histogram has the least KL divergence to the original.

TensorRT's calibrator (Migacz, "8-bit inference with TensorRT", GTC 2017): histogram |w| in 2048 bins; for each
candidate threshold, clip the tail into the last bin, merge the bins into 2^(b-1) levels, spread each level evenly over
its occupied bins, and compare. Made for activations; on weights it needs many values a row (per channel, per tensor).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.types import AffineGrid


@dataclass(frozen=True)
class Entropy:
    """The interval, symmetric in its shrinking, with the least KL divergence.

    bins: bins of the histogram of magnitudes.
    steps: how many thresholds are tried, evenly spaced above the smallest possible one.
    """

    bins: int = 2048
    steps: int = 64

    def interval(self, w: Tensor, grid: AffineGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the interval of each row of `w[..., g]`, its ends cut at the threshold."""
        rows = w.reshape(-1, w.shape[-1])
        mass = torch.ones_like(w) if weight is None else weight.expand_as(w)
        levels = 2 ** (grid.bits - 1) if grid.sym else 2**grid.bits - 1
        limit = torch.stack(
            [self._threshold(r.abs(), m, levels) for r, m in zip(rows, mass.reshape(rows.shape), strict=True)]
        ).reshape(w.shape[:-1])
        lo, hi = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        return torch.maximum(lo, -limit), torch.minimum(hi, limit)

    def _threshold(self, magnitude: Tensor, mass: Tensor, levels: int) -> Tensor:
        top = magnitude.max()
        if top == 0:
            return top
        index = (magnitude / top * self.bins).long().clamp(max=self.bins - 1)
        hist = torch.zeros(self.bins, dtype=torch.float64, device=mass.device).index_add_(0, index, mass.double())
        least = min(levels, self.bins)
        best, best_kl = self.bins, float("inf")
        for i in torch.linspace(self.bins, least, self.steps).round().long().unique().flip(0).tolist():
            kl = _divergence(hist, i, levels)
            if kl < best_kl:
                best, best_kl = i, kl
        return top * (best / self.bins)


def _divergence(hist: Tensor, i: int, levels: int) -> float:
    """Return KL(P || Q) of the histogram cut at bin `i` and of its version merged into `levels` levels."""
    p = hist[:i].clone()
    p[-1] += hist[i:].sum()
    level = torch.arange(i, device=hist.device) * levels // i
    occupied = p > 0
    count = torch.zeros(levels, dtype=p.dtype, device=p.device)
    merged = count.clone().index_add_(0, level, hist[:i])
    count.index_add_(0, level, occupied.to(p.dtype))
    q = torch.where(occupied, (merged / count.clamp(min=1))[level], 0)
    # a bin that holds only the clipped tail has no merged mass: the smallest positive value keeps the ratio finite
    q = torch.where(occupied & (q == 0), torch.finfo(torch.float32).tiny, q)
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    return float((p[occupied] * (p[occupied] / q[occupied]).log()).sum())
