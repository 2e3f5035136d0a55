"""Statistics: what calibration accumulates at a site. Sums, maxima and samples, which merge.

Every class has a no-argument constructor, `update(X_TK)` and `merge(other)`; a block makes one of each class that a
step needs, per site, and drops them when the site is solved. A `paired` one is updated with `(X_TK, F_TK)`: the same
tokens' activations in the quantized and in the float model. A `weighed` one, a sum of products of two activations, is
given them times the square root of the token's weight, where a step weighs tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

_PANEL = 192  # the least columns of one product in the rank-k update; narrower products lose speed


class Hessian:
    """`X^T X` over all tokens, in float32.

    Each batch is one blocked product; over some tens of batches the running sum keeps 6 digits, four more than damping
    leaves meaningful, at half the memory of float64. Asking for the mean closes the sum, whose memory it takes.
    """

    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = True

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._mean: Tensor | None = None

    def update(self, X_TK: Tensor) -> None:
        """Add a batch. Only the upper block triangle is computed: `mean` mirrors it."""
        X = X_TK.float()
        K = X.shape[1]
        total = self._open(torch.zeros(K, K, dtype=torch.float32, device=X.device) if self._sum is None else self._sum)
        with _exact_products(X_TK.dtype):
            for i, j in _panels(K):
                total[i:j, i:].addmm_(X[:, i:j].T, X[:, i:])
        self.count += X.shape[0]

    def merge(self, other: Hessian) -> None:
        """Add another rank's sum."""
        if other._sum is not None:
            self._open(other._sum.clone() if self._sum is None else self._sum.add_(other._sum))
        self.count += other.count

    def _open(self, total: Tensor) -> Tensor:
        if self._mean is not None:
            raise ValueError("the mean was taken: this sum is closed")
        self._sum = total
        return total

    def __bool__(self) -> bool:
        """Whether any token was seen."""
        return self.count > 0

    def mean(self) -> Tensor:
        """Return H = X^T X / T, symmetric float32 `[K, K]`; not to be written to. Nothing can be added afterwards."""
        if self._mean is None:
            if self._sum is None:
                raise ValueError("no activation was accumulated")
            mean, self._sum = self._sum.div_(max(self.count, 1)), None
            for i, j in _panels(len(mean)):
                diagonal = mean[i:j, i:j]
                diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
                mean[j:, i:j] = mean[i:j, j:].T
            self._mean = mean
        return self._mean


def _panels(K: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges in which a Hessian's upper block triangle is computed."""
    panel = max(_PANEL, K // 8)
    for i in range(0, K, panel):
        yield i, min(i + panel, K)


class Drift:
    """`(F - X)^T X` over all tokens: how the quantized model's activations X miss the float model's F, seen from X.

    fit: over seven eighths of each batch's tokens. held, held_hessian: `(F - X)^T X` and `X^T X` over its last eighth,
    which a step can choose by. Float32 sums, `[K, K]`; held_hessian is whole, not a triangle.
    """

    paired: ClassVar[bool] = True
    weighed: ClassVar[bool] = True

    def __init__(self) -> None:
        self.fit = self.held = self.held_hessian = torch.zeros(0, 0)
        self.count = self.held_count = 0

    def update(self, X_TK: Tensor, F_TK: Tensor) -> None:
        """Add a batch."""
        X, miss = X_TK.float(), F_TK.float() - X_TK.float()
        if not self.fit.numel():
            K = X.shape[1]
            self.fit, self.held, self.held_hessian = (torch.zeros(K, K, device=X.device) for _ in range(3))
        at = X.shape[0] - X.shape[0] // 8
        self.fit.addmm_(miss[:at].T, X[:at])
        self.held.addmm_(miss[at:].T, X[at:])
        self.held_hessian.addmm_(X[at:].T, X[at:])
        self.count += X.shape[0]
        self.held_count += X.shape[0] - at

    def merge(self, other: Drift) -> None:
        """Add another rank's sums."""
        if not other.fit.numel():
            return
        for name in ("fit", "held", "held_hessian"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, mine.add_(theirs) if mine.numel() else theirs.clone())
        self.count += other.count
        self.held_count += other.held_count


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of bfloat16 values run on bfloat16 units, which lose nothing: the sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class AbsMax:
    """The largest magnitude of every channel."""

    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = False

    def __init__(self) -> None:
        self.max: Tensor | None = None

    def update(self, X_TK: Tensor) -> None:
        """Add a batch."""
        top = X_TK.abs().amax(0).float()
        self.max = top if self.max is None else torch.maximum(self.max, top)

    def merge(self, other: AbsMax) -> None:
        """Take the larger of two ranks' maxima."""
        if other.max is not None:
            self.max = other.max if self.max is None else torch.maximum(self.max, other.max)


class _ChannelMean(ABC):
    """The mean of some function of every channel."""

    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    @abstractmethod
    def values(self, X_TK: Tensor) -> Tensor:
        """Return what is averaged, `[T, K]`."""

    def update(self, X_TK: Tensor) -> None:
        """Add a batch."""
        total = self.values(X_TK).sum(0, dtype=torch.float64)
        self.sum = total if self.sum is None else self.sum.add_(total)
        self.count += X_TK.shape[0]

    def merge(self, other: _ChannelMean) -> None:
        """Add another rank's sum."""
        if other.sum is not None:
            self.sum = other.sum.clone() if self.sum is None else self.sum.add_(other.sum)
        self.count += other.count

    def mean(self) -> Tensor:
        """Return the means, float32 `[K]`."""
        if self.sum is None:
            raise ValueError("no activation was accumulated")
        return (self.sum / max(self.count, 1)).float()


class AbsMean(_ChannelMean):
    """The mean magnitude of every channel."""

    def values(self, X_TK: Tensor) -> Tensor:
        """Return the magnitudes."""
        return X_TK.abs()


class MeanSquare(_ChannelMean):
    """The mean square of every channel: the diagonal of H, and llama.cpp's importance matrix."""

    def values(self, X_TK: Tensor) -> Tensor:
        """Return the squares."""
        return X_TK.float().square()


class Sample:
    """Some of the tokens, each as likely as any other: every token draws a number, and the `MOST` least stay.

    rank: of the process that sees the tokens. Ranks draw from different seeds, so that their merge is a sample too.
    """

    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = False
    MOST = 1024

    def __init__(self, rank: int = 0) -> None:
        self.rows: Tensor | None = None
        self._rank = rank
        self._numbers = torch.zeros(0)
        self._draw = torch.Generator().manual_seed(rank)

    def update(self, X_TK: Tensor) -> None:
        """Add a batch."""
        self._add(torch.rand(len(X_TK), generator=self._draw), X_TK)

    def merge(self, other: Sample) -> None:
        """Keep the least numbers of two ranks. Raises ValueError where both drew the same ones."""
        if other._rank == self._rank:
            raise ValueError(f"two samples of rank {self._rank} draw the same numbers; make each with its own rank")
        if other.rows is not None:
            self._add(other._numbers, other.rows)

    def _add(self, numbers: Tensor, X_TK: Tensor) -> None:
        rows, everyone = X_TK[:0] if self.rows is None else self.rows, torch.cat([self._numbers, numbers])
        kept = everyone.argsort()[: self.MOST].sort().values
        old, new = (k.to(X_TK.device) for k in (kept[kept < len(rows)], kept[kept >= len(rows)] - len(rows)))
        self.rows, self._numbers = torch.cat([rows[old], X_TK[new]]), everyone[kept]


class Histogram:
    """Magnitudes of all channels together in `BINS` bins, whose width doubles until the largest value fits."""

    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = False
    BINS = 2048

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.top = 0.0  # upper edge of the last bin: a power of two, so that two ranks' bins always align
        self.max = 0.0

    def update(self, X_TK: Tensor) -> None:
        """Add a batch."""
        magnitude = X_TK.detach().float().abs()
        largest = float(magnitude.max())
        if largest == 0 and self.top == 0:
            return
        self._widen(_power_of_two(largest))
        self.max = max(self.max, largest)
        index = (magnitude.flatten() * (self.BINS / self.top)).long().clamp_(max=self.BINS - 1)
        self.counts += torch.bincount(index, minlength=self.BINS).cpu().double()

    def merge(self, other: Histogram) -> None:
        """Add another rank's counts, after bringing both to the wider of the two bin widths."""
        if other.top == 0:
            return
        self._widen(other.top)
        counts = other.counts.clone()
        top = other.top
        while top < self.top:
            counts, top = _halve(counts), top * 2
        self.counts += counts
        self.max = max(self.max, other.max)

    def values(self) -> tuple[Tensor, Tensor]:
        """Return the bins' centres up to the largest value, that value itself, and their counts."""
        centres = (torch.arange(self.BINS) + 0.5) * (self.top / self.BINS)
        seen = (self.counts > 0) & (centres < self.max)
        return torch.cat([centres[seen], torch.tensor([self.max])]), torch.cat(
            [self.counts[seen], torch.ones(1, dtype=torch.float64)]
        ).float()

    def _widen(self, top: float) -> None:
        if self.top == 0:
            self.top = top
        while self.top < top:
            self.counts, self.top = _halve(self.counts), self.top * 2


def _halve(counts: Tensor) -> Tensor:
    return torch.cat([counts.reshape(-1, 2).sum(1), torch.zeros(counts.numel() // 2, dtype=counts.dtype)])


def _power_of_two(x: float) -> float:
    return 2.0 ** torch.tensor(max(x, 1e-30)).log2().ceil().item()
