"""GPTQ against its definition: a float64 reference, RTN where there is nothing to feed back, and its failure paths."""

import gc

import pytest
import torch

from llmq import registry
from llmq.algorithms.gptq import Gptq
from llmq.algorithms.rtn import Rtn
from llmq.grids.int import Int
from llmq.ranges.mse import Mse
from llmq.stats import Hessian, Stats
from llmq.types import LlmqError, QTensor


def hessian(X_TK):
    h = Hessian(len(X_TK))
    h.update(X_TK)
    return h


def correlated(K, T=2000, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5


def loss(W_NK, q, H_KK):
    E = W_NK - q.dequantize()
    return ((E @ H_KK) * E).sum().item()


def reference(W_NK, H_KK, grid, damp, act_order, desc_act):
    """The paper's algorithm, column by column in float64. H as the step regularizes it."""
    W, H = W_NK.double(), H_KK.double().clone()
    K = W.shape[1]
    order = torch.argsort(H_KK.diagonal(), descending=True, stable=True) if act_order else torch.arange(K)
    H.diagonal().add_(damp * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    group = torch.arange(K) // grid.group
    if not desc_act:
        group = group[order]
    params = grid.fit(W_NK[:, order] if desc_act else W_NK, H_KK)
    W = W[:, order].clone()
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for j in range(K):
        p = params.map(lambda t, j=j: t[:, group[j]])
        code = grid.nearest(W[:, j].float(), p)
        codes[:, order[j]] = code.to(torch.uint8)
        e = (W[:, j] - grid.decode(code, p).double()) / U[j, j]
        W[:, j + 1 :] -= e[:, None] * U[j, j + 1 :]
    return codes


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"desc_act": True}], ids=str)
def test_equals_the_float64_reference(sym, options):
    W_NK, h = torch.randn(24, 96, generator=torch.Generator().manual_seed(1)), hessian(correlated(96))
    grid = Int(4, sym, 32)
    solved = Gptq(**options).solve(W_NK, grid, Stats({Hessian: h}))
    step = Gptq(**options)
    H_KK = h.mean() * 2000 / (2000 + 96)  # as many tokens without correlations as there are columns
    H_KK.diagonal().copy_(h.mean().diagonal())
    want = reference(W_NK, H_KK, grid, step.damp, step.act_order, step.desc_act)
    assert (solved.q.codes != want).float().mean() < 0.002  # float32 may turn a tie


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_with_identity_hessian_equals_rtn_bit_for_bit(bits, sym):
    class Identity(Hessian):
        def mean(self):
            return torch.eye(128)

    W_NK, grid = torch.randn(32, 128, generator=torch.Generator().manual_seed(bits)), Int(bits, sym, 32)
    ours, plain = Gptq().solve(W_NK, grid, Stats({Hessian: Identity(1)})).q, Rtn().solve(W_NK, grid, Stats()).q
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.params.scale, plain.params.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lowers_the_loss_below_rtn(bits):
    W_NK, h = torch.randn(48, 256, generator=torch.Generator().manual_seed(2)), hessian(correlated(256))
    grid = Int(bits, True, 64)
    ours, plain = Gptq().solve(W_NK, grid, Stats({Hessian: h})).q, Rtn().solve(W_NK, grid, Stats()).q
    assert loss(W_NK, ours, h.mean()) < 0.7 * loss(W_NK, plain, h.mean())


def test_dead_columns_are_rounded_to_nearest_and_counted():
    X = correlated(64)
    X[:, [3, 40]] = 0
    W_NK, grid = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)), Int(4, True, 32)
    solved = Gptq().solve(W_NK, grid, Stats({Hessian: hessian(X)}))
    plain = Rtn().solve(W_NK, grid, Stats()).q
    assert solved.report["dead_columns"] == 2
    assert torch.equal(solved.q.codes[:, [3, 40]], plain.codes[:, [3, 40]])


@pytest.mark.parametrize("name", ["int4", "q4_k"])
def test_dead_columns_hardly_cost_the_others_whatever_the_size_of_inputs(name):
    X, W_NK = correlated(256), torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    X[:, ::4] = 0
    grid = Int(4, True, 64, Mse()) if name == "int4" else registry.load("grids", name)
    small, large, alone = (
        Gptq().solve(W, grid, Stats({Hessian: hessian(X * size)})).q
        for size, W in ((2**-9, W_NK), (1, W_NK), (1, W_NK * (X[0] != 0)))
    )
    assert torch.equal(small.dequantize(), large.dequantize())
    H_KK = hessian(X).mean()
    assert loss(W_NK, large, H_KK) < 1.15 * loss(W_NK, alone, H_KK)


def test_damping_is_raised_until_the_hessian_factors_and_the_value_is_reported():
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.05  # an eigenvalue of -0.05
    F, D, damp = Gptq(prior=0).factor(H, 100)
    assert damp == pytest.approx(0.1)
    H.diagonal().add_(damp)
    inverse = torch.linalg.inv(F)
    torch.testing.assert_close(inverse @ H @ inverse.T, torch.diag(D), rtol=0, atol=1e-5)
    assert torch.equal(F, F.triu()) and (F.diagonal() == 1).all()


@pytest.mark.parametrize("order", [None, torch.randperm(96, generator=torch.Generator().manual_seed(5))])
def test_ranges_weigh_errors_by_what_later_columns_leave_of_them(order):
    """The pivots: the variance of a column that those rounded after it do not explain."""
    H = hessian(correlated(96)).mean()
    H.diagonal().add_(0.1 * H.diagonal().mean())
    D = Gptq(prior=0, damp=1e-6).factor(H.clone(), 400, order).D_K
    order = torch.arange(96) if order is None else order
    for i in (0, 40, 95):
        j, after = order[i], order[i + 1 :]
        left = H[j, j] - H[j, after] @ torch.linalg.solve(H[after][:, after], H[after, j])
        assert D[j].item() == pytest.approx(left.item(), rel=0.02)
    W_NK, grid = torch.randn(16, 96), Int(3, True, 32, range=Mse())
    found = Gptq().solve(W_NK, grid, Stats({Hessian: hessian(correlated(96))})).q.params
    H = hessian(correlated(96)).mean()
    D = Gptq().factor(H.clone(), 2000, torch.argsort(H.diagonal(), descending=True, stable=True)).D_K
    assert torch.equal(found.scale, grid.fit(W_NK, D).scale)
    assert not torch.equal(found.scale, grid.fit(W_NK, H).scale)


def test_the_prior_is_as_many_tokens_without_correlations():
    X_TK, prior = correlated(96, T=160), 2.0
    root = X_TK.square().mean(0).sqrt()
    made_up = torch.diag(root * 96**0.5).repeat(2, 1)  # 2 * 96 tokens, one channel each, of the same mean squares
    want = hessian(torch.cat([X_TK, made_up])).mean()
    got = Gptq(prior=prior).regularize(hessian(X_TK).mean(), 160)
    torch.testing.assert_close(got, want)


def test_an_expert_leans_on_as_many_tokens_of_its_layer():
    X_TK, layer_TK, prior = correlated(96, T=160), correlated(96, T=2 * 96, seed=1), 2.0
    stats = Stats({Hessian: hessian(X_TK)})
    stats.layer = hessian(layer_TK).mean()
    step = Gptq(prior=prior)
    H_KK, tokens = step.seen(stats)
    torch.testing.assert_close(H_KK, hessian(torch.cat([X_TK, layer_TK])).mean())
    assert torch.equal(step.regularize(H_KK.clone(), tokens), H_KK)  # its prior is in it


@pytest.mark.parametrize("text", ["gptq:prior=-1", "gptq:damp=0", "descent:damp=1", "qep:prior=nan"])
def test_impossible_regularization_is_refused(text):
    with pytest.raises(LlmqError, match="damp lies between 0 and 1|prior is 0 or more|prior takes a number"):
        registry.load("algorithms", text)


def test_a_hessian_that_never_factors_falls_back_on_rtn_and_says_so():
    class Broken(Hessian):
        def mean(self):
            return torch.full((64, 64), float("nan")).fill_diagonal_(1.0)

    W_NK, grid = torch.randn(8, 64), Int(4, True, 32)
    solved = Gptq().solve(W_NK, grid, Stats({Hessian: Broken(1)}))
    assert "rtn" in solved.report["fallback"]
    assert torch.equal(solved.q.codes, Rtn().solve(W_NK, grid, Stats()).q.codes)


def test_desc_act_keeps_a_group_index_and_static_groups_do_not():
    W_NK, h = torch.randn(8, 64), hessian(correlated(64))
    for desc_act in (True, False):
        q = Gptq(desc_act=desc_act).solve(W_NK, Int(4, True, 32), Stats({Hessian: h})).q
        assert (q.g_idx is not None) == desc_act
        if desc_act:
            assert q.g_idx.bincount().tolist() == [32, 32]
            assert not torch.equal(q.g_idx, torch.arange(64, dtype=torch.int32) // 32)


def test_nothing_outlives_a_solve_until_a_garbage_collection():
    W_NK, h = torch.randn(16, 96), hessian(correlated(96))
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        Gptq().solve(W_NK, Int(4, True, 32), Stats({Hessian: h}))
        after = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert after - before <= 1  # the Hessian keeps its mean


GGML = ["q8_0", "q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"]


@pytest.mark.parametrize("name", GGML)
def test_ggml_grids_are_solved_on_frozen_scales(name):
    h, grid = hessian(correlated(256)), registry.load("grids", name)
    W_NK = torch.randn(13, 256, generator=torch.Generator().manual_seed(1))
    solved = Gptq().solve(W_NK, grid, Stats({Hessian: h}))
    params = grid.fit(W_NK, h.mean())
    rounded = QTensor(grid.nearest(W_NK, params.columns(256)).to(torch.uint8), params, grid)
    assert loss(W_NK, solved.q, h.mean()) < 0.9 * loss(W_NK, rounded, h.mean())
    codes, read = grid.from_bytes(grid.to_bytes(solved.q.codes, solved.q.params))
    assert torch.equal(codes, solved.q.codes) and torch.equal(read.scale, solved.q.params.scale)
