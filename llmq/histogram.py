"""A histogram of an activation's magnitudes: what the range of a static scale is chosen from (ranges/).

Not here: statistics of channels (stats.py).
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llmq.stats import MAX, SUM, Reduction, Stat


class Histogram(Stat):
    """Magnitudes of all channels together in `BINS` bins as wide as the largest value asks for.

    counts: float64 `[scales, BINS]`. A batch is counted in the row of the least power of two that its values fit below,
    so that any two rows align: two bins of one are one bin of the next.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"counts": SUM, "max": MAX}
    BINS = 2048
    _SCALES = range(-100, 129)  # exponents of float32's values, those of no account as one

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch."""
        magnitude = X_TK.detach().float().abs()
        largest = magnitude.max().cpu()
        self.reduce("max", largest)
        if not largest.isfinite():
            return  # NaN and infinity have no bin; the maximum tells of them
        scale = _scale(float(largest), self._SCALES)
        index = (magnitude.flatten() * (self.BINS / 2.0**scale)).long().clamp_(max=self.BINS - 1)
        counts = torch.zeros(len(self._SCALES), self.BINS, dtype=torch.float64)
        counts[self._SCALES.index(scale)] = torch.bincount(index, minlength=self.BINS).cpu().double()
        self.reduce("counts", counts)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return the bins' centres up to the largest value, that value itself, and their counts."""
        counts, largest = torch.zeros(self.BINS, dtype=torch.float64), self.whole("max")
        seen = self.whole("counts")
        used = seen.any(1).nonzero()[:, 0].tolist()
        for row in seen[used[0] : used[-1] + 1]:
            counts = _halved(counts) + row
        centres = (torch.arange(self.BINS) + 0.5) * (2.0 ** self._SCALES[used[-1]] / self.BINS)
        filled = (counts > 0) & (centres < largest)
        one = torch.ones(1, dtype=torch.float64)
        return torch.cat([centres[filled], largest[None]]), torch.cat([counts[filled], one]).float()


def _scale(largest: float, scales: range) -> int:
    """Return the least exponent of a power of two that is not below `largest`, within `scales`."""
    mantissa, exponent = math.frexp(largest)
    least = exponent - 1 if mantissa == 0.5 else exponent
    return min(max(least if largest else scales[0], scales[0]), scales[-1])


def _halved(counts: Tensor) -> Tensor:
    """Return counts in bins twice as wide."""
    return torch.cat([counts.reshape(-1, 2).sum(1), torch.zeros(counts.numel() // 2, dtype=counts.dtype)])
