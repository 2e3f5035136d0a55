"""Intervals hold the truth 95 times of 100 where tokens of a window vary together; pairs see small differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.evaluation import paired
from llmq.evaluation.paired import Mean, clusters, mcnemar, mean, quantile, says

QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 19: 2.093, 30: 2.042, 1000: 1.962}


def test_quantiles_of_t_are_those_of_the_tables():
    for freedom, wanted in QUANTILES.items():
        assert quantile(freedom) == pytest.approx(wanted, rel=0.01 if freedom < 5 else 0.001)


def drawn(runs, windows, length, seed, shared=0.5, memory=0.8):
    """Values of mean 0 [runs, windows * length]: each window has a level of its own, neighbours are alike."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(runs, windows, length, generator=draw, dtype=torch.float64)
    for t in range(1, length):
        noise[..., t] = memory * noise[..., t - 1] + math.sqrt(1 - memory**2) * noise[..., t]
    level = torch.randn(runs, windows, 1, generator=draw, dtype=torch.float64)
    return (noise + shared * level).reshape(runs, -1)


@pytest.mark.parametrize(("windows", "length", "shared"), [(24, 48, 0.5), (40, 30, 1.0), (3, 600, 0.0)])
def test_an_interval_holds_the_truth_95_times_of_100(windows, length, shared):
    """And one that takes tokens as independent does not: it is what the clusters are for."""
    runs, of = 600, torch.arange(windows).repeat_interleave(length)
    values = drawn(runs, windows, length, seed=1, shared=shared)
    held = sum(not mean(v, clusters(of)).seen for v in values) / runs
    alone = sum(not mean(v).seen for v in values) / runs
    assert 0.92 < held < 0.98 and alone < 0.85


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40))
def test_clusters_part_windows_and_nothing_else(sizes):
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    found = clusters(of)
    assert found[0] == 0 and set(found.diff().tolist()) <= {0, 1}  # side by side
    for window in range(len(sizes)):
        parts = found[of == window].bincount()
        parts = parts[parts > 0]
        assert len(parts) == 1 or int(parts.min()) >= 32
        assert len(sizes) < 20 or len(parts) == 1


@given(st.integers(2, 30), st.integers(0, 10))
def test_alone_each_value_is_the_standard_error_of_the_mean(n, seed):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = mean(values)
    assert found.half == pytest.approx(quantile(n - 1) * float(values.std()) / math.sqrt(n))
    assert mean(values, torch.arange(n)) == found
    assert mean(values, torch.zeros(n, dtype=torch.int64)).half == math.inf


def test_a_pair_sees_what_the_errors_of_both_would_hide():
    hard = drawn(1, 30, 64, seed=3)[0]
    of = clusters(torch.arange(30).repeat_interleave(64))
    a, b = hard + 0.01, hard + 0.002 * torch.randn(len(hard), generator=torch.Generator().manual_seed(0))
    assert mean(a, of).half > 0.05
    assert mean(a - b, of).seen and mean(a - b, of).mean == pytest.approx(0.01, abs=1e-3)


def test_mcnemar_is_the_binomial_test():
    a, b = (torch.tensor([bool(int(c)) for c in text]) for text in ("1111111100", "1111000011"))
    assert mcnemar(a, b) == pytest.approx(2 * (1 + 6 + 15) / 64)  # 4 against 2
    assert mcnemar(a, a) == 1.0
    many = torch.arange(10_000) < 5200
    assert mcnemar(many, ~many) < 1e-3  # exact beyond what floats hold


def test_differences_in_words():
    assert says(Mean(-0.0123, 0.00312), "A", "B", "KL") == "A is better than B by 0.0123 ± 0.0031 in KL (95 %)"
    assert says(Mean(0.0123, 0.00312), "A", "B", "KL").startswith("B is better than A by 0.0123")
    assert "no difference seen in KL (0.0010 ± 0.0030" in says(Mean(0.001, 0.003), "A", "B", "KL")
    assert says(Mean(0.02, 0.01), "A", "B", "acc", less=False) == "A is better than B by 0.020 ± 0.010 in acc (95 %)"
    assert "(0 ± 0, 95 %)" in says(Mean(-0.0, 0.0), "A", "B", "acc", less=False)
    assert Mean(0.0, math.inf).interval == [None, None] and paired.Mean(1, 0.5).interval == [0.5, 1.5]
