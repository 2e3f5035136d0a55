"""The one loop that collects statistics of an activation, for solvers, transforms and the budget of bits alike.

Not here: the statistics (stats.py), how the batches come to a site (model/lanes.py).
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from llmq.calibration.dealing import Dealt
from llmq.stats import Stat, Stats


def collect(
    kinds: Iterable[type[Stat]],
    batches: Iterable[Tensor],
    dealt: Dealt,
    floats: Iterator[Tensor] | None = None,
    roots: Iterator[Tensor] | None = None,
    also: Stat | None = None,
    owner: int | None = None,
) -> Stats:
    """Return statistics of these kinds over activations `[T, K]`, batch by batch, in the calibration's parts.

    batches: this process' own; the statistics are those of all.
    floats: the float model's activations for the first of these batches, of the same tokens and maybe of others behind
        them. A batch may have no token, as an expert's has.
    roots: what the activations of a token are multiplied by in sums of products, `[T, 1]` a batch.
    also: a statistic that fills while the batches come, by other means, and whose parts end where theirs do.
    owner: the process that alone is to have sums of products, which are large; None where all are.
    """
    stats = started(kinds, dealt)
    coming, leading, rooted = iter(batches), floats or iter(()), roots or iter(())
    for part in dealt.parts:
        for number in part:  # no name holds an activation while the next one is made
            see(stats, dealt.starts[number], next(coming), next(leading, None), next(rooted, None))
        close(stats.values(), dealt, owner)
        close([also] if also else [], dealt)
    stats.tokens = sum(dealt.team.gather(stats.tokens))
    return stats


def started(kinds: Iterable[type[Stat]], dealt: Dealt) -> Stats:
    """Return statistics of these kinds, nothing seen yet."""
    return Stats({kind: kind(dealt.tokens) for kind in sorted(set(kinds), key=lambda kind: kind.__name__)})


def close(stats: Iterable[Stat], dealt: Dealt, owner: int | None = None) -> None:
    """Add the part that was seen to the totals, and those that the other processes saw. owner: as for `collect`."""
    for stat in stats:
        stat.close_part(dealt.team, owner if stat.matrices else None)


def see(stats: Stats, at: int, X_TK: Tensor, F_TK: Tensor | None = None, root: Tensor | None = None) -> None:
    """Add a batch, whose first token has the number `at`; of experts, the number of the first that is there."""
    if not len(X_TK):
        return
    stats.tokens += len(X_TK)
    for stat in stats.values():
        stat.at = at
        by = root if stat.weighed else None
        if not stat.paired:
            stat.update(_times(X_TK, by))
        elif F_TK is not None:
            stat.update(_times(X_TK, by), _times(F_TK[: len(X_TK)], by))


def _times(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by
