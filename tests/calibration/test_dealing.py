"""Parts of a calibration: every batch in one, in order, even, and never more than there are batches."""

import pytest
import torch

from llmq.calibration.collect import collect
from llmq.calibration.dealing import PARTS, Dealt, cut
from llmq.stats import Hessian, Sample


@pytest.mark.parametrize("count", [0, 1, 3, 8, 9, 20, 64])
def test_things_are_cut_evenly_and_in_order(count):
    found = cut(count)
    assert [n for run in found for n in run] == list(range(count))
    assert len(found) == min(count, PARTS)
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


def test_a_part_holds_the_numbers_of_the_first_tokens_of_its_batches():
    assert Dealt.of([40, 40, 30]) == Dealt(110, [[0], [40], [80]])
    assert Dealt.of([5] * 10).parts == [[0, 5], [10, 15], [20], [25], [30], [35], [40], [45]]


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
