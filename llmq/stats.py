"""Statistics: what calibration accumulates of the activation at a site. Sums and maxima, in parts of a fixed order.

A statistic keeps named tensors and declares of each how it is reduced, over batches and over processes: by SUM or MAX.

    class AbsMax(Stat):
        reductions = {"max": MAX}

        def update(self, X_TK):
            self.reduce("max", X_TK.abs().amax(0).float())

A sum of floats depends on the order of its terms. So the calibration is cut into parts, the same for any number of
processes: batches are added up within their part, and then the parts, in their order. Where several processes see a
part each, `close_part` joins theirs (team.py); the sums have the same bits as in one process.

`calibration/collect.py` makes one of each class that a step needs, per site, and the block drops them when the site is
solved. A `paired` one is updated with `(X_TK, F_TK)`: the same tokens' activations in the quantized and in the float
model. A `weighed` one, a sum of products of two activations, is given them times the square root of the token's weight,
where a step weighs tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.team import ALONE, Team

_PANEL = 192  # the least columns of one product in the rank-k update; narrower products lose speed
TRIANGLE = 9 / 16
"""How much of a symmetric sum is kept: what eight panels of rows hold from the diagonal on."""


class Reduction(Enum):
    """How two tensors become one."""

    SUM = "sum"
    MAX = "max"

    def __call__(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Return both as one, in the memory of `mine`."""
        return mine.add_(theirs) if self is Reduction.SUM else torch.maximum(mine, theirs, out=mine)


SUM, MAX = Reduction.SUM, Reduction.MAX


class Stat(ABC):
    """An accumulator over the activations of a site.

    reductions: the names of its tensors, and how each is reduced; maxima are of magnitudes. One that is kept in pieces
        has names such as `sum 0` and `sum 192`.
    paired: whether `update` also wants the activations of the float model for the same tokens.
    weighed: whether the activations come times the square root of their token's weight, where tokens are weighed.
    matrices: how many float32 matrices `[K, K]` it keeps, so that it is known before what a run takes.
    summing: the same while a part is summed beside the total.
    tokens: how many the whole calibration has. at: the number of the first token of the batch that `update` is given.
    part: the tensors of the part that is being seen. totals: those of all parts before.
    """

    reductions: ClassVar[Mapping[str, Reduction]]
    matrices: ClassVar[float] = 0
    summing: ClassVar[float] = 0
    paired: ClassVar[bool] = False
    weighed: ClassVar[bool] = False

    def __init__(self, tokens: int) -> None:
        self.tokens, self.at = tokens, 0
        self.part: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}

    @abstractmethod
    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch of activations `[T, K]`, `F_TK` those of the float model where `paired`."""

    def reduction(self, name: str) -> Reduction:
        """Return how the tensor of that name is reduced."""
        return self.reductions[name.partition(" ")[0]]

    def reduce(self, name: str, tensor: Tensor) -> None:
        """Reduce a tensor into the one of that name in this part; the first one becomes it."""
        mine = self.part.get(name)
        self.part[name] = tensor if mine is None else self.reduction(name)(mine, tensor)

    def close_part(self, team: Team = ALONE, owner: int | None = None) -> None:
        """Add the part that was seen to the totals, and those that other processes of the team saw, in their order.

        owner: the one process that has totals then; None for all of them.
        """
        self.totals = team.joined(self.totals, self.part, self.reduction, owner)
        self.part = {}

    def add(self, name: str, count: int) -> None:
        """Add to a count."""
        self.reduce(name, torch.tensor(count))

    def number(self, name: str) -> int:
        """Return a count, 0 where nothing was counted."""
        return sum(int(tensors[name]) for tensors in (self.part, self.totals) if name in tensors)

    def whole(self, name: str) -> Tensor:
        """Return the tensor of that name over all parts. Raises ValueError where nothing was accumulated."""
        self.close_part()
        if name not in self.totals:
            raise ValueError("no activation was accumulated")
        return self.totals[name]

    def finite(self) -> bool:
        """Say whether all that was accumulated is finite."""
        self.close_part()
        return all(bool(t.isfinite().all()) for t in self.totals.values() if t.is_floating_point())


class Squares(Stat):
    """A statistic with sums `X^T X`: symmetric, so that only the upper triangle is summed, in panels of rows.

    Of K = 600 columns, a sum `s` is `s 0` `[192, 600]`, `s 192` `[192, 408]`, `s 384` and `s 576`: 0.6 of the square.
    """

    def finite(self) -> bool:
        """See `Stat.finite`; of a matrix of products its diagonal tells."""
        self.close_part()
        return all(bool(t.diagonal().isfinite().all()) for t in self.totals.values() if t.dim() == 2)

    def square(self, name: str, X_TK: Tensor) -> None:
        """Add `X^T X` of float32 activations to the sum of that name."""
        K = X_TK.shape[1]
        for i, j in _panels(K):
            panel = self.part.get(f"{name} {i}")
            if panel is None:
                panel = self.part[f"{name} {i}"] = torch.zeros(j - i, K - i, device=X_TK.device)
            panel.addmm_(X_TK[:, i:j].T, X_TK[:, i:])

    def squared(self, name: str) -> Tensor:
        """Return the sum of that name, float32 `[K, K]`; its panels are gone then.

        Raises ValueError where nothing was accumulated.
        """
        K = self.whole(f"{name} 0").shape[1]
        whole = torch.empty(K, K, device=self.totals[f"{name} 0"].device)
        for i, j in _panels(K):
            whole[i:j, i:] = self.totals.pop(f"{name} {i}")
            diagonal = whole[i:j, i:j]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            whole[j:, i:j] = whole[i:j, j:].T
        return whole


def _panels(K: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges in which the upper triangle of a symmetric sum is kept."""
    panel = max(_PANEL, K // 8)
    for i in range(0, K, panel):
        yield i, min(i + panel, K)


def forms(x_nK: Tensor, H_KK: Tensor) -> Tensor:
    """Return diag(x H x^T), `[n]`, of a symmetric H. One triangle tells: what is off the diagonal counts twice."""
    found = x_nK.new_zeros(len(x_nK))
    for i, j in _panels(len(H_KK)):
        xH = x_nK[:, i:j] @ H_KK[i:j, i:j]
        found += xH.addmm_(x_nK[:, j:], H_KK[j:, i:j], alpha=2).mul_(x_nK[:, i:j]).sum(1)
    return found


class Stats(dict[type[Stat], Any]):
    """The statistics of one site by their class, and what steps make of them for all matrices of the site.

    importance: what the squared error of each input channel counts, `[K]`, where the user gave it (an imatrix).
    tokens: how many were seen. rows: how many the matrices of the site have together, 0 where that is not known.
    layer: where these are an expert's, the mean `X^T X` over all tokens of its layer.
    """

    def __init__(self, stats: Mapping[type[Stat], Any] | None = None, importance: Tensor | None = None) -> None:
        super().__init__(stats or {})
        self.importance = importance
        known = stats if isinstance(stats, Stats) else None
        self.tokens: int = known.tokens if known is not None else 0
        self.rows: int = known.rows if known is not None else 0
        self.layer: Tensor | None = known.layer if known is not None else None
        self._made: dict[Hashable, Any] = {}

    def finite(self) -> bool:
        """Say whether all activations were finite, as far as the statistics tell."""
        return all(stat.finite() for stat in self.values())

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return `make()`, or what it returned for this key before: a factor that several matrices share."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def forget(self) -> None:
        """Drop what was made."""
        self._made.clear()


class Hessian(Squares):
    """`X^T X` over all tokens, in float32.

    Each batch is one blocked product; over some tens of batches the running sum keeps 6 digits, four more than damping
    leaves meaningful, at half the memory of float64. Asking for the mean closes the sum, whose memory it takes.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"sum": SUM, "count": SUM}
    matrices, summing = 1, 2 * TRIANGLE
    weighed = True

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self._mean: Tensor | None = None

    @property
    def count(self) -> int:
        """How many tokens were seen."""
        return self.number("count")

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch. Raises ValueError where the mean was taken."""
        if self._mean is not None:
            raise ValueError("the mean was taken: this sum is closed")
        with _exact_products(X_TK.dtype):
            self.square("sum", X_TK.float())
        self.add("count", X_TK.shape[0])

    def mean(self) -> Tensor:
        """Return H = X^T X / T, symmetric float32 `[K, K]`; not to be written to. Nothing can be added afterwards."""
        if self._mean is None:
            self._mean = self.squared("sum").div_(max(self.count, 1))
        return self._mean


class Drift(Squares):
    """`(F - X)^T X` over all tokens: how the quantized model's activations X miss the float model's F, seen from X.

    fit: over seven eighths of each batch's tokens. held, held_hessian: `(F - X)^T X` and `X^T X` over its last eighth,
    which a step can choose by. Float32 sums, `[K, K]`. count, held_count: of all tokens, and of those held.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = dict.fromkeys(
        ("fit", "held", "held_hessian", "count", "held_count"), SUM
    )
    matrices, summing = 3, 2 * (2 + TRIANGLE)
    paired = True
    weighed = True

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch."""
        if F_TK is None:
            raise TypeError("a drift is between two activations")
        X, miss = X_TK.float(), F_TK.float() - X_TK.float()
        K = X.shape[1]
        if "fit" not in self.part:
            for name in ("fit", "held"):
                self.reduce(name, torch.zeros(K, K, device=X.device))
        at = X.shape[0] - X.shape[0] // 8
        self.part["fit"].addmm_(miss[:at].T, X[:at])
        self.part["held"].addmm_(miss[at:].T, X[at:])
        self.square("held_hessian", X[at:])
        self.add("count", X.shape[0])
        self.add("held_count", X.shape[0] - at)

    @cached_property
    def held_hessian(self) -> Tensor:
        """`X^T X` over the held tokens, symmetric. Raises ValueError where nothing was accumulated."""
        return self.squared("held_hessian")


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of bfloat16 values run on bfloat16 units, which lose nothing: the sums stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class AbsMax(Stat):
    """The largest magnitude of every channel, float32 `[K]`."""

    reductions: ClassVar[Mapping[str, Reduction]] = {"max": MAX}

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch."""
        self.reduce("max", X_TK.abs().amax(0).float())

    @property
    def max(self) -> Tensor:
        """The maxima. Raises ValueError where nothing was accumulated."""
        return self.whole("max")


class _ChannelMean(Stat):
    """The mean of some function of every channel, summed in float64."""

    reductions: ClassVar[Mapping[str, Reduction]] = {"sum": SUM, "count": SUM}

    @abstractmethod
    def values(self, X_TK: Tensor) -> Tensor:
        """Return what is averaged, `[T, K]`."""

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch."""
        self.reduce("sum", self.values(X_TK).sum(0, dtype=torch.float64))
        self.add("count", X_TK.shape[0])

    def mean(self) -> Tensor:
        """Return the means, float32 `[K]`."""
        return (self.whole("sum") / max(self.number("count"), 1)).float()


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


class Sample(Stat):
    """Some of the tokens, spread evenly over the calibration: one, drawn by chance, of each of `MOST` equal runs.

    Which ones follows from their numbers alone: each process fills the rows of the tokens that it sees.
    rows: `[MOST or fewer, K]`, in the activation's dtype.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"rows": SUM}
    MOST = 1024

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        run = -(-tokens // self.MOST)
        starts = torch.arange(0, tokens, run)
        drawn = torch.randint(2**31, starts.shape, generator=torch.Generator().manual_seed(0))
        self._chosen = starts + drawn % (tokens - starts).clamp(max=run)  # ascending: the number of a row's token

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch, whose tokens are numbered from `at` on."""
        at = self._chosen - self.at
        rows = ((at >= 0) & (at < len(X_TK))).nonzero()[:, 0]
        if "rows" not in self.part:
            self.reduce("rows", X_TK.new_zeros(len(at), X_TK.shape[1]))
        self.part["rows"][rows.to(X_TK.device)] = X_TK[at[rows].to(X_TK.device)]

    @property
    def rows(self) -> Tensor:
        """The tokens' activations. Raises ValueError where nothing was accumulated."""
        return self.whole("rows")
