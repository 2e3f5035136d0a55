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

from llmq.team import ALONE, Team

PARTS = 8


def cut(count: int, parts: int = PARTS) -> list[range]:
    """Return at most so many runs of neighbours among `count` things, as even as can be; the longer ones first."""
    parts = min(count, parts)
    sizes = [count // parts + (p < count % parts) for p in range(parts)]
    return [range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def most(count: int, processes: int) -> int:
    """Return how many of `count` batches the first of so many processes has; no other has more."""
    return sum(map(len, cut(count)[::processes]))


@dataclass(frozen=True)
class Dealt:
    """The batches of a calibration in parts, which are dealt over the processes of a team.

    tokens: how many there are in all. parts: of each part that is this process' own, its batches, by their numbers; an
        empty one where others have one more. starts: the number of the first token of every batch.
    """

    tokens: int = 0
    parts: Sequence[Sequence[int]] = ()
    starts: Sequence[int] = ()
    team: Team = ALONE

    @classmethod
    def of(cls, tokens: Sequence[int], team: Team = ALONE) -> Dealt:
        """Return the parts of batches of so many tokens each."""
        parts = cut(len(tokens))
        rounds = -(-len(parts) // team.size)
        own = [*team.own(parts), *[range(0)] * rounds][:rounds]
        return cls(
            sum(tokens), own, [end - n for end, n in zip(itertools.accumulate(tokens), tokens, strict=True)], team
        )

    @property
    def numbers(self) -> list[int]:
        """The batches that are this process' own, in the order in which they are seen."""
        return [number for part in self.parts for number in part]
