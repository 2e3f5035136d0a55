"""Parts of a calibration: every batch in one, in order, even, and never more than there are batches."""

import pytest
import torch

from llmq.calibration.collect import collect
from llmq.calibration.dealing import PARTS, Dealt, cut
from llmq.stats import Hessian, Sample
from llmq.team import Team


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 20, 64])
def test_things_are_cut_evenly_and_in_order(count):
    found = cut(count)
    assert [n for run in found for n in run] == list(range(count))
    assert len(found) == min(count, PARTS)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


class Seat(Team):
    """A process of a team, of which nothing is asked but what is dealt to it."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_batches_are_known_by_the_numbers_of_their_first_tokens():
    dealt = Dealt.of([40, 40, 30])
    assert (dealt.tokens, dealt.starts, dealt.numbers) == (110, [0, 40, 80], [0, 1, 2])
    assert [list(part) for part in Dealt.of([5] * 10).parts] == [[0, 1], [2, 3], [4], [5], [6], [7], [8], [9]]


@pytest.mark.parametrize("size", [2, 3, 8, 11])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_every_part_is_one_processs_and_all_close_as_many(count, size):
    seats = [Dealt.of([7] * count, Seat(rank, size)) for rank in range(size)]
    assert sorted(n for seat in seats for n in seat.numbers) == list(range(count))
    assert len({len(seat.parts) for seat in seats}) == 1
    in_turns = [part for turn in zip(*(seat.parts for seat in seats), strict=True) for part in turn if part]
    assert in_turns == cut(count)  # so added up in the order of the processes, they are in theirs


def test_sums_are_of_batches_within_parts_and_then_of_parts():
    X = torch.randn(20, 30, 50, generator=torch.Generator().manual_seed(0)).exp()
    stats = collect((Hessian, Sample), X, Dealt.of([30] * 20))
    assert torch.equal(stats[Sample].rows, X.reshape(600, 50)) and stats.tokens == 600
    total = torch.zeros(50, 50)
    for run in cut(20):
        part = torch.zeros(50, 50)
        for b in run:
            part.addmm_(X[b].T, X[b])
        total += part
    torch.testing.assert_close(stats[Hessian].mean(), total / 600, rtol=1e-6, atol=0)
