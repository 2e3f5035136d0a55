"""Means of what many tokens or items say, with 95 % intervals; and whether two models differ on the same ones.

Neighbouring tokens are not independent: a hard passage is hard for both models, and for hundreds of tokens. So a mean
over tokens has the standard error of its clusters, the windows of the text (where there are few, parts of them):

    s^2 = G / (G - 1) * sum_g (sum_{t in g} (x_t - m))^2 / n^2        G clusters, n tokens, m their mean

and the interval is m -+ t_{0.975, G-1} s. Two models are compared by the difference at each token, so that what is
common to both cancels: a difference far below either's own error is seen.
Items of a task are independent, and right or wrong: their difference has the interval of paired means, and the p-value
of McNemar's exact test, which asks of the items that one alone solved whether a coin would part them so.

Sources: Cameron and Miller 2015, doi:10.3368/jhr.50.2.317 (clusters); McNemar 1947, doi:10.1007/BF02295996; quantiles
of t by Abramowitz and Stegun 26.7.5.
Not here: what is measured (scores.py, tasks.py).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

_ENOUGH = 20  # clusters from which on their spread is known well enough
_SHORTEST = 32  # tokens of a part of a window: what reaches further than that is rare


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval: `mean - half` to `mean + half`; half is infinite of a single cluster."""

    mean: float
    half: float

    @property
    def interval(self) -> list[float | None]:
        """The ends of the interval, None where it has none, as JSON takes them."""
        return [self.mean + side if math.isfinite(self.half) else None for side in (-self.half, self.half)]

    @property
    def seen(self) -> bool:
        """Whether 0 is outside the interval."""
        return abs(self.mean) > self.half


def mean(values: Tensor, clusters: Tensor | None = None) -> Mean:
    """Return the mean of values `[n]`, where those of one cluster, int64 `[n]`, vary together; None: each by itself."""
    n, x = len(values), values.double()
    middle = x.mean()
    place = torch.arange(n) if clusters is None else clusters.unique(return_inverse=True)[1]
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, x - middle)
    G = len(sums)
    if G < 2:
        return Mean(float(middle), math.inf)
    error = math.sqrt(G / (G - 1) * float(sums.square().sum())) / n
    return Mean(float(middle), quantile(G - 1) * error)


def clusters(windows: Tensor) -> Tensor:
    """Return the cluster of each token, int64 `[T]`: its window, or a part of it where there are fewer than 20.

    windows: the window that each token is in, those of one side by side.
    """
    _, place, sizes = windows.unique_consecutive(return_inverse=True, return_counts=True)
    parts = (sizes // _SHORTEST).clamp(1, math.ceil(_ENOUGH / len(sizes)))
    within = torch.arange(len(windows)) - (sizes.cumsum(0) - sizes)[place]
    return (parts.cumsum(0) - parts)[place] + within * parts[place] // sizes[place]


def quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t; within 1 % of it from 3 degrees of freedom on."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def mcnemar(a: Tensor, b: Tensor) -> float:
    """Return the p-value, two-sided and exact, that two models solve items equally well. a, b: right or wrong `[n]`."""
    alone = int((a & ~b).sum()), int((b & ~a).sum())
    n, tail, ways = sum(alone), 0, 1
    for k in range(min(alone) + 1):  # ways: n choose k, an integer: exact, whatever n is
        tail, ways = tail + ways, ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def says(difference: Mean, a: str, b: str, what: str, *, less: bool = True) -> str:
    """Return in words how `a` differs from `b`: the difference is a's minus b's; less: whether less is better."""
    if not difference.seen:
        return f"{a} against {b}: no difference seen in {what} ({_pm(difference)}, 95 %)"
    better, worse = (a, b) if (difference.mean < 0) == less else (b, a)
    return f"{better} is better than {worse} by {_pm(Mean(abs(difference.mean), difference.half))} in {what} (95 %)"


def _pm(m: Mean) -> str:
    """Return a mean and its half interval, with two digits of the latter."""
    if not math.isfinite(m.half) or m.half == 0:
        return f"{m.mean + 0.0:.3g} ± {'?' if m.half else 0}"  # + 0.0: no minus before 0
    places = max(0, 1 - math.floor(math.log10(m.half)))
    return f"{m.mean + 0.0:.{places}f} ± {m.half:.{places}f}"
