"""Entropy: the clipping threshold whose quantized histogram has the least KL divergence to the original.

TensorRT's calibrator (Migacz, "8-bit inference with TensorRT", GTC 2017): histogram |w| in 2048 bins; for each
candidate threshold, clip the tail into the last bin, merge the bins into 2^(b-1) levels, spread each level evenly over
its occupied bins, and compare. Made for activations; on weights it needs many values a row (per channel, per tensor).

Two things keep it from clipping what matters. The first bin counts as much as the second, as in NVIDIA's own
pytorch-quantization: the zeros of a ReLU, exact on every grid, would outweigh all else and ask for the finest bins near
zero. And a divergence does not see how far a clipped value moves, which a language model's few huge activations do:
only thresholds whose squared error is no greater than without clipping are chosen from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.ranges._search import Interval, extremes
from llmq.types import RangedGrid


@dataclass(frozen=True)
class Entropy:
    """The interval, symmetric in its shrinking, with the least KL divergence.

    bins: bins of the histogram of magnitudes.
    steps: how many thresholds are tried, evenly spaced above the smallest possible one.
    """

    bins: int = 2048
    steps: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 2**16 or self.steps < 1:
            raise ValueError("bins lies between 2 and 65536, and steps is at least 1")

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> Interval:
        """Return the interval of each row of `w[..., g]`, its ends cut at the threshold."""
        lo, hi = extremes(w)
        top = torch.maximum(-lo, hi)
        mass = (torch.ones_like(w) if weight is None else weight.expand_as(w)).double()
        hist_RB = self._histograms(w, top, mass)
        levels = 2 ** (grid.bits - 1) if grid.sym else 2**grid.bits - 1
        chosen, least, most = (lo, hi), torch.full(top.shape, torch.inf, dtype=torch.float64, device=w.device), None
        for i in torch.linspace(self.bins, min(levels, self.bins), self.steps).round().long().unique().flip(0).tolist():
            limit = top * (i / self.bins)
            ends = torch.maximum(lo, -limit), torch.minimum(hi, limit)
            error = _squares(w, grid, ends, mass)
            most = error if most is None else most
            good = error <= most
            kl = torch.full_like(least, torch.inf)
            kl[good] = torch.tensor([_divergence(h, i, levels) for h in hist_RB[good.flatten()]]).to(kl)
            better = kl < least
            least = torch.where(better, kl, least)
            chosen = torch.where(better, ends[0], chosen[0]), torch.where(better, ends[1], chosen[1])
        return chosen

    def _histograms(self, w: Tensor, top: Tensor, mass: Tensor) -> Tensor:
        """Return the mass in each bin of the magnitudes of each row, float64 `[R, bins]`."""
        index = (w.abs() / top.clamp(min=1e-30).unsqueeze(-1) * self.bins).long().clamp(max=self.bins - 1)
        hist_RB = torch.zeros(top.numel(), self.bins, dtype=torch.float64, device=w.device)
        hist_RB.scatter_add_(1, index.reshape(top.numel(), -1), mass.reshape(top.numel(), -1))
        hist_RB[:, 0] = hist_RB[:, 1]
        return hist_RB


def _squares(w: Tensor, grid: RangedGrid, ends: Interval, mass: Tensor) -> Tensor:
    """Return the squared error of each row of `w` on the grid between `ends`, weighed by `mass`."""
    params = grid.params(*ends).map(lambda p: p.unsqueeze(-1))
    return ((grid.decode(grid.nearest(w, params), params) - w).double().square() * mass).sum(-1)


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
