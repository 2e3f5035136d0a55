"""Statistics equal their definitions, and those of parts, joined in their order, do not depend on who saw which."""

import pytest
import torch

from llmq.histogram import Histogram
from llmq.stats import MAX, SUM, AbsMax, AbsMean, Drift, Hessian, MeanSquare, Sample, forms

KINDS = [Hessian, AbsMax, AbsMean, MeanSquare, Sample, Histogram, Drift]


@pytest.fixture(name="X")
def activations():
    return torch.randn(300, 700, generator=torch.Generator().manual_seed(0))


def seen(kind, X, parts, batch=20):
    """Return a statistic of the tokens of some parts, each `(first, end)`, batch by batch."""
    stat = kind(len(X))
    for first, end in parts:
        for at in range(first, end, batch):
            stat.at = at
            x = X[at : min(at + batch, end)]
            stat.update(x, x + 1) if kind.paired else stat.update(x)
        stat.close_part()
    return stat


def test_hessian_is_the_mean_outer_product(X):
    h = seen(Hessian, X, [(0, 100), (100, 300)], 64)
    want = (X.double().T @ X.double() / 300).float()
    torch.testing.assert_close(h.mean(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(h.mean(), h.mean().T) and h.count == 300
    with pytest.raises(ValueError, match="closed"):
        h.update(X)


def test_hessian_takes_bfloat16(X):
    h = Hessian(300)
    h.update(X.bfloat16())
    rounded = X.bfloat16().float()
    torch.testing.assert_close(h.mean(), rounded.T @ rounded / 300, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_different_processes_saw_join_to_the_same_bits(kind, X):
    """Each process adds up its own parts; the tensors of the parts, one after the other as declared, are the whole."""
    parts = [(0, 100), (100, 140), (140, 300)]
    whole, alone = seen(kind, X, parts), [seen(kind, X, [part]).totals for part in parts]
    assert {name.split()[0] for name in whole.totals} == kind.reductions.keys()
    for name, total in whole.totals.items():
        joined = alone[0][name]
        for totals in alone[1:]:
            joined = joined + totals[name] if whole.reduction(name) is SUM else torch.maximum(joined, totals[name])
        assert torch.equal(joined, total) and whole.reduction(name) in (SUM, MAX)


def test_a_symmetric_sum_keeps_little_more_than_its_upper_triangle(X):
    h = Hessian(300)
    h.update(X)
    assert sum(t.numel() for n, t in h.part.items() if n != "count") < 0.65 * 700**2
    h.mean()
    assert h.totals.keys() == {"count"}


def test_absmax_and_absmean(X):
    assert torch.equal(seen(AbsMax, X, [(0, 100), (100, 300)]).max, X.abs().amax(0))
    torch.testing.assert_close(seen(AbsMean, X, [(0, 100), (100, 300)]).mean(), X.abs().mean(0))
    torch.testing.assert_close(seen(MeanSquare, X, [(0, 100), (100, 300)]).mean(), X.square().mean(0))


def test_histogram_counts_every_value_and_keeps_the_exact_maximum(X):
    X = X * torch.logspace(-2, 2, 300)[:, None]  # the range grows batch by batch
    whole, merged = seen(Histogram, X, [(0, 300)], 50), seen(Histogram, X, [(0, 100), (100, 300)])
    assert whole.whole("counts").sum() == X.numel() == merged.whole("counts").sum()
    values, counts = whole.values()
    assert all(torch.equal(a, b) for a, b in zip((values, counts), merged.values(), strict=True))
    assert values[-1].item() == pytest.approx(X.abs().max().item(), rel=1e-6)
    assert (values * counts).sum().item() / X.numel() == pytest.approx(X.abs().mean().item(), rel=0.02)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-20, 3e38, 5e-45])
def test_a_histogram_of_one_value_says_it(value):
    histogram = Histogram(4)
    histogram.update(torch.full((4, 3), value))
    values, counts = histogram.values()
    assert values[-1] == torch.tensor(value) and counts.sum() >= 1


def test_a_sample_keeps_any_token_as_likely_as_another():
    tokens = torch.arange(20_000.0)[:, None]
    whole = seen(Sample, tokens, [(0, 20_000)], 700)
    kept = whole.rows[:, 0]
    assert 1000 <= len(kept) <= Sample.MOST and torch.equal(kept, kept.unique())
    assert (kept / 20_000).mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.histc(kept, 10, 0, 20_000).min() >= 99  # of 100 in each tenth
    assert torch.histc(kept % 20, 10, 0, 20).min() > 60  # nor does a place within its run count
    assert torch.equal(seen(Sample, tokens, [(0, 100), (100, 20_000)]).rows, whole.rows)
    assert torch.equal(seen(Sample, tokens[:300], [(0, 100), (100, 300)]).rows, tokens[:300])


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_without_data_says_so(kind):
    stat = kind(5)
    for name in kind.reductions:
        with pytest.raises(ValueError, match="no activation"):
            stat.whole(name)


@pytest.mark.parametrize("K", [3, 192, 193, 600])
def test_forms_of_rows_are_those_of_the_whole_matrix(K):
    g = torch.Generator().manual_seed(K)
    x, root = torch.randn(5, K, generator=g), torch.randn(K, K, generator=g)
    H = root @ root.T
    torch.testing.assert_close(forms(x, H), ((x.double() @ H.double()) * x).sum(1).float(), rtol=1e-5, atol=0)
