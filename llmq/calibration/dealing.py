"""How a calibration's batches are cut into parts: the unit of sums, and of what is dealt over processes.

    Dealt.of([4096, 4096, 4096, 512])        # tokens of 4 batches: 4 parts of a batch each
    Dealt.of([4096] * 20)                    # 8 parts, of 3 or 2 batches

The parts depend on the number of batches alone, so that sums over them do (stats.py).
Not here: what is summed (collect.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

PARTS = 8


def cut(count: int, parts: int = PARTS) -> list[range]:
    """Return at most so many runs of neighbours among `count` things, as even as can be; the longer ones first."""
    parts = min(count, parts)
    sizes = [count // parts + (p < count % parts) for p in range(parts)]
    return [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


@dataclass(frozen=True)
class Dealt:
    """The batches of a calibration in parts.

    tokens: how many there are in all. parts: the batches of each part, each by the number of its first token.
    """

    tokens: int = 0
    parts: Sequence[Sequence[int]] = ()

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Dealt:
        """Return the parts of batches of so many tokens each."""
        ends = list(itertools.accumulate(tokens))
        return cls(sum(tokens), [[ends[b] - tokens[b] for b in part] for part in cut(len(tokens))])
