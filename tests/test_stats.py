"""Statistics equal their definitions, and merging two halves, tensor by tensor as declared, equals the whole."""

import pytest
import torch

from llmq.stats import MAX, SUM, AbsMax, AbsMean, Drift, Hessian, Histogram, MeanSquare, Sample


@pytest.fixture(name="X")
def activations():
    return torch.randn(300, 700, generator=torch.Generator().manual_seed(0))


def halves(kind, X):
    """Return two ranks' statistics as one: the tensors of each reduced as a collective would."""
    a, b = kind(len(X)), kind(len(X), 100)
    a.update(X[:100])
    b.update(X[100:])
    for name, tensor in b.tensors.items():
        mine = a.tensors[name]
        a.tensors[name] = mine + tensor if kind.reductions[name] is SUM else torch.maximum(mine, tensor)
    return a


def test_hessian_is_the_mean_outer_product(X):
    h = Hessian(300)
    for part in X.split(64):
        h.update(part)
    want = (X.double().T @ X.double() / 300).float()
    torch.testing.assert_close(h.mean(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(h.mean(), h.mean().T)
    torch.testing.assert_close(halves(Hessian, X).mean(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="closed"):
        h.merge(halves(Hessian, X))


def test_hessian_takes_bfloat16(X):
    h = Hessian(300)
    h.update(X.bfloat16())
    rounded = X.bfloat16().float()
    torch.testing.assert_close(h.mean(), rounded.T @ rounded / 300, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Hessian, AbsMax, AbsMean, MeanSquare, Sample, Histogram])
def test_merging_is_what_the_reductions_say(kind, X):
    reduced = halves(kind, X)
    merged, other = kind(300), kind(300, 100)
    merged.update(X[:100])
    other.update(X[100:])
    theirs = {name: t.clone() for name, t in other.tensors.items()}
    merged.merge(other)
    assert reduced.tensors.keys() == kind.reductions.keys() and set(kind.reductions.values()) <= {SUM, MAX}
    for name, tensor in reduced.tensors.items():
        assert torch.equal(merged.tensors[name], tensor)
        assert torch.equal(other.tensors[name], theirs[name])


def test_absmax_and_absmean(X):
    assert torch.equal(halves(AbsMax, X).max, X.abs().amax(0))
    torch.testing.assert_close(halves(AbsMean, X).mean(), X.abs().mean(0))
    torch.testing.assert_close(halves(MeanSquare, X).mean(), X.square().mean(0))


def test_histogram_counts_every_value_and_keeps_the_exact_maximum(X):
    X = X * torch.logspace(-2, 2, 300)[:, None]  # the range grows batch by batch
    whole, merged = Histogram(300), halves(Histogram, X)
    for part in X.split(50):
        whole.update(part)
    assert whole.whole("counts").sum() == X.numel() == merged.whole("counts").sum()
    values, counts = whole.values()
    assert all(torch.equal(a, b) for a, b in zip((values, counts), merged.values(), strict=True))
    assert values[-1].item() == pytest.approx(X.abs().max().item(), rel=1e-6)
    assert (values * counts).sum().item() / X.numel() == pytest.approx(X.abs().mean().item(), rel=0.02)


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-20, 3e38, 5e-45])
def test_a_histogram_of_one_value_says_it(value):
    seen = Histogram(4)
    seen.update(torch.full((4, 3), value))
    values, counts = seen.values()
    assert values[-1] == torch.tensor(value) and counts.sum() >= 1


def test_a_sample_keeps_any_token_as_likely_as_another():
    tokens = torch.arange(20_000.0)[:, None]
    whole = Sample(20_000)
    for part in tokens.split(700):
        whole.update(part)
    kept = whole.rows[:, 0]
    assert 1000 <= len(kept) <= Sample.MOST and torch.equal(kept, kept.unique())
    assert (kept / 20_000).mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.histc(kept, 10, 0, 20_000).min() >= 99  # of 100 in each tenth
    assert torch.histc(kept % 20, 10, 0, 20).min() > 60  # nor does a place within its run count
    assert torch.equal(halves(Sample, tokens).rows, whole.rows)
    few = halves(Sample, tokens[:300])
    assert torch.equal(few.rows, tokens[:300])


@pytest.mark.parametrize("kind", [Hessian, AbsMax, AbsMean, MeanSquare, Sample, Histogram, Drift])
def test_a_statistic_without_data_says_so(kind):
    stat = kind(5)
    for name in kind.reductions:
        with pytest.raises(ValueError, match="no activation"):
            stat.whole(name)
