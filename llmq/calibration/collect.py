"""The one loop that collects statistics of an activation, for solvers, transforms and the budget of bits alike.

Not here: the statistics (stats.py), how the batches come to a site (model/lanes.py).
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from llmq.stats import Stat, Stats


def collect(
    kinds: Iterable[type[Stat]],
    batches: Iterable[Tensor],
    tokens: int,
    floats: Iterator[Tensor] | None = None,
    roots: Iterator[Tensor] | None = None,
) -> Stats:
    """Return statistics of these kinds over activations `[T, K]`, of so many tokens in all, batch by batch.

    floats: the float model's activations for the first of these batches, of the same tokens and maybe of others behind
        them. A batch may have no token, as an expert's has.
    roots: what the activations of a token are multiplied by in sums of products, `[T, 1]` a batch.
    """
    stats = Stats({kind: kind(tokens) for kind in sorted(set(kinds), key=lambda kind: kind.__name__)})
    for X_TK in batches:
        F_TK = next(floats, None) if floats else None
        root = next(roots, None) if roots else None
        if not len(X_TK):
            continue
        stats.tokens += len(X_TK)
        for stat in stats.values():
            by = root if stat.weighed else None
            if not stat.paired:
                stat.update(_times(X_TK, by))
            elif F_TK is not None:
                stat.update(_times(X_TK, by), _times(F_TK[: len(X_TK)], by))
    return stats


def _times(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by
