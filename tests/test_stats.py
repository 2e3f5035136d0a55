"""Statistics equal their definitions, and merging two halves equals the whole."""

import pytest
import torch

from llmq.stats import AbsMax, AbsMean, Hessian, Histogram, Sample


@pytest.fixture(name="X")
def activations():
    return torch.randn(300, 700, generator=torch.Generator().manual_seed(0))


def halves(kind, X):
    a, b = (Sample(0), Sample(1)) if kind is Sample else (kind(), kind())
    a.update(X[:100])
    b.update(X[100:])
    a.merge(b)
    return a


def test_hessian_is_the_mean_outer_product(X):
    h = Hessian()
    for part in X.split(64):
        h.update(part)
    want = (X.double().T @ X.double() / 300).float()
    torch.testing.assert_close(h.mean(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(h.mean(), h.mean().T)
    torch.testing.assert_close(halves(Hessian, X).mean(), want, rtol=1e-4, atol=1e-5)


def test_hessian_takes_bfloat16(X):
    h = Hessian()
    h.update(X.bfloat16())
    rounded = X.bfloat16().float()
    torch.testing.assert_close(h.mean(), rounded.T @ rounded / 300, rtol=1e-4, atol=1e-4)


def test_absmax_and_absmean(X):
    assert torch.equal(halves(AbsMax, X).max, X.abs().amax(0))
    torch.testing.assert_close(halves(AbsMean, X).mean(), X.abs().mean(0))


def test_histogram_counts_every_value_and_keeps_the_exact_maximum(X):
    X = X * torch.logspace(-2, 2, 300)[:, None]  # the range grows batch by batch
    whole, merged = Histogram(), halves(Histogram, X)
    for part in X.split(50):
        whole.update(part)
    assert whole.counts.sum() == X.numel() == merged.counts.sum()
    assert torch.equal(whole.counts, merged.counts) and whole.top == merged.top
    values, counts = whole.values()
    assert values[-1].item() == pytest.approx(X.abs().max().item(), rel=1e-6)
    assert (values * counts).sum().item() / X.numel() == pytest.approx(X.abs().mean().item(), rel=0.02)


def test_a_sample_keeps_any_token_as_likely_as_another():
    tokens = torch.arange(20_000.0)[:, None]
    whole = Sample()
    for part in tokens.split(700):
        whole.update(part)
    kept = whole.rows[:, 0]
    assert len(kept) == Sample.MOST and torch.equal(kept, kept.unique())
    assert (kept / 20_000).mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.histc(kept, 10, 0, 20_000).min() > 60  # of 102 expected in each tenth
    merged = halves(Sample, tokens)
    assert len(merged.rows) == Sample.MOST
    few = halves(Sample, tokens[:300])
    assert torch.equal(few.rows, tokens[:300])


def test_ranks_merge_into_a_sample_of_all_their_tokens():
    mine, theirs = Sample(0), Sample(1)
    mine.update(torch.arange(10_000.0)[:, None])
    theirs.update(torch.arange(30_000.0)[:, None] + 1e6)
    mine.merge(theirs)
    kept = mine.rows[:, 0]
    others = kept[kept >= 1e6] - 1e6
    assert len(kept) == Sample.MOST and len(others) / len(kept) == pytest.approx(0.75, abs=0.05)
    assert torch.histc(others, 10, 0, 30_000).min() > 45  # of 77 expected in each tenth
    assert torch.isin(kept, others).sum() < 40  # 20 by chance; with the same numbers, every token of the rarer rank
    with pytest.raises(ValueError, match="rank 1 draw the same numbers"):
        theirs.merge(Sample(1))


def test_a_statistic_without_data_says_so():
    with pytest.raises(ValueError, match="no activation"):
        Hessian().mean()
