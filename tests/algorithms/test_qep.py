"""QEP against its closed form in float64, and against what it promises: less error of the output."""

import pytest
import torch

from llmq import registry
from llmq.algorithms.qep import Qep
from llmq.stats import Drift, Hessian, Stats
from llmq.types import LlmqError


def activations(K=48, T=2000, drift=0.3, seed=0):
    """Return the quantized model's X and the float model's F: F is X mixed by a matrix near the identity, and noise."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(T, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5
    mix = torch.eye(K) + drift * torch.randn(K, K, generator=g) / K**0.5
    return X, X @ mix + 0.02 * torch.randn(T, K, generator=g)


def gathered(X, F, batches=4):
    h, d = Hessian(len(X)), Drift(len(X))
    for x, f in zip(X.chunk(batches), F.chunk(batches), strict=True):
        h.update(x)
        d.update(x, f)
    return Stats({Hessian: h, Drift: d})


def weight(K=48, N=20):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(7))


def corrected(step, W_NK, stats):
    """Return one linear corrected, and its alpha."""
    sums = step.judge(W_NK, stats).sum(0)
    moved = step.correct(W_NK, sums.expand(len(W_NK), -1), stats)
    line = step.line(sums, stats)
    stats.forget()
    return moved, line.get("qep_alpha")


def test_alpha_one_is_the_float64_closed_form():
    X, F = activations()
    W_NK = weight()
    moved, _ = corrected(Qep(alpha=1.0, damp=1e-3, prior=0), W_NK, gathered(X, F))
    x, f, w = X.double(), F.double(), W_NK.double()
    H = x.T @ x
    H += 1e-3 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    want = w + w @ (f - x).T @ x @ torch.linalg.inv(H)
    torch.testing.assert_close(moved.double(), want, rtol=1e-3, atol=1e-3)


def test_alpha_one_half_lies_half_way():
    X, F = activations()
    W_NK, stats = weight(), gathered(X, F)
    half, whole = (corrected(Qep(alpha=a), W_NK, stats)[0] for a in (0.5, 1.0))
    torch.testing.assert_close(half - W_NK, 0.5 * (whole - W_NK))


def test_the_chosen_alpha_lowers_the_error_on_tokens_never_seen():
    X, F = activations(T=4000)
    W_NK = weight()
    moved, alpha = corrected(Qep(), W_NK, gathered(X[:2000], F[:2000]))
    new_x, new_f = X[2000:], F[2000:]

    def error(W):
        return (new_f @ W_NK.T - new_x @ W.T).square().sum()

    assert 0.8 < alpha <= 1
    assert error(moved) < 0.1 * error(W_NK)


def test_noise_that_cannot_be_undone_gets_a_small_alpha():
    X, _ = activations(K=48, T=64)
    F = X + torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    assert corrected(Qep(), weight(), gathered(X, F, batches=1))[1] < 0.3


def test_with_few_tokens_the_prior_lowers_the_error_on_others():
    X, F = activations(T=4000)
    noise = torch.randn(80, 48, generator=torch.Generator().manual_seed(2)) / 2
    W_NK, stats = weight(), gathered(X[:80], F[:80] + noise)

    def error(prior):
        moved, _ = corrected(Qep(prior=prior), W_NK, stats)
        return (F[2000:] @ W_NK.T - X[2000:] @ moved.T).square().sum()

    assert error(Qep.prior) < 0.95 * error(0)


def test_an_input_without_drift_leaves_the_weights_alone():
    X, _ = activations()
    W_NK = weight()
    assert corrected(Qep(), W_NK, gathered(X, X))[0] is W_NK


def test_more_rows_than_columns_move_as_few_do():
    """The drift is solved for once there, in place of the rows."""
    X, F = activations()
    W_NK, stats = weight(N=60), gathered(X, F)
    few, alpha = corrected(Qep(), W_NK, stats)
    stats.rows = len(W_NK)
    many, same = corrected(Qep(), W_NK, stats)
    assert (few != many).any() and alpha == pytest.approx(same, abs=1e-3)
    torch.testing.assert_close(many, few, rtol=1e-4, atol=1e-4)


def test_rows_move_by_the_alpha_of_their_own_linear():
    X, F = activations()
    stats = gathered(X, F)
    weights = (weight(), weight(N=8))
    sums = [Qep().judge(W, stats).sum(0) for W in weights]
    each = torch.cat([s.expand(len(W), -1) for s, W in zip(sums, weights, strict=True)])
    moved = Qep().correct(torch.cat(weights), each, stats)
    for W_NK, part, line in zip(weights, moved.split([20, 8]), [Qep().line(s, stats) for s in sums], strict=True):
        alone, alpha = corrected(Qep(), W_NK, gathered(X, F))
        assert line["qep_alpha"] == pytest.approx(alpha, abs=1e-3)
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["qep:alpha=1.5", "qep:damp=0", "qep:most=0"])
def test_impossible_options_are_refused(text):
    with pytest.raises(LlmqError, match="lies between|lie above"):
        registry.load("algorithms", text)


def test_a_share_of_the_float_model_still_lowers_the_error():
    X, F = activations(T=4000)
    W_NK, hessian, drift = weight(), Hessian(2000), Drift(2000)
    for i, (x, f) in enumerate(zip(X[:2000].chunk(4), F[:2000].chunk(4), strict=True)):
        hessian.update(x)
        if i < 2:
            drift.update(x, f)
    moved, _ = corrected(Qep(share=0.5), W_NK, Stats({Hessian: hessian, Drift: drift}))

    def error(W):
        return (F[2000:] @ W_NK.T - X[2000:] @ W.T).square().sum()

    assert error(moved) < 0.2 * error(W_NK)


def test_dampings_that_were_tried_are_told_and_without_a_factor_the_weights_stay():
    class Broken(Hessian):
        def mean(self):
            return super().mean() - 0.5 * float(self.at) * torch.eye(48)

    X, F = activations()
    W_NK, drift = weight(), gathered(X, F)[Drift]
    dampings = [0.01 * 10**i for i in range(6)]
    for at, tried, moves in ((0, [], True), (0.5, dampings[:3], True), (1e6, dampings, False)):
        h = Broken(len(X))
        h.at = at
        h.update(X)
        step, stats = Qep(alpha=0.5, prior=0), Stats({Hessian: h, Drift: drift})
        sums = step.judge(W_NK, stats)
        line = step.line(sums[0], stats)
        assert line.get("qep_dampings", []) == pytest.approx(tried)
        assert torch.equal(step.correct(W_NK, sums, stats), W_NK) is not moves and ("qep" in line) is not moves
