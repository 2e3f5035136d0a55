"""The column loop: compiled and plain torch leaves round alike."""

import pytest
import torch

from llmq import registry
from llmq.algorithms import _sweep
from llmq.algorithms.gptq import Gptq
from llmq.grids.int import Int
from llmq.jit import compiled


def problem(N, K, grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_NK, X_TK = torch.randn(N, K, generator=g), torch.randn(400, K, generator=g) @ torch.randn(K, K, generator=g)
    F_KK, _ = Gptq().factor(X_TK.T @ X_TK / 400, 400)
    W_KN = W_NK.T.contiguous()
    return W_KN, F_KK, grid.fit(W_NK), torch.arange(K) // grid.granularity.group_size


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"restricted": True}], ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (24, 96), (300, 160)])
def test_compiled_and_torch_leaves_round_alike(monkeypatch, bits, options, N, K):
    assert compiled(_sweep._leaf, _sweep._KINDS) is not None, "numba is a dependency"
    grid = Int(bits=bits, group=32, **options)
    W_KN, F_KK, params, group_K = problem(N, K, grid, seed=N + bits)
    fast = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    plain = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert (fast != plain).float().mean() < 0.005  # sums in another order may turn a tie


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_ggml_grids_are_compiled_too_and_a_scale_of_zero_takes_the_code_of_zero(monkeypatch, name):
    grid = registry.load("grids", name)
    W_KN, F_KK, _, group_K = problem(40, 256, grid)
    W_KN[:256, 0] = 0  # every scale of the first row
    params = grid.fit(W_KN.T.contiguous())
    fast = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    plain = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert (fast != plain).float().mean() < 0.005
    assert not grid.decode(fast.T, params.columns(256))[0].any()


def test_the_weight_stays_and_errors_reach_later_columns_only():
    grid = Int(4, True, 32)
    W_KN, F_KK, params, group_K = problem(16, 64, grid)
    before = W_KN.clone()
    codes = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert torch.equal(W_KN, before)
    changed = W_KN.clone()
    changed[40] += 1.0
    moved = _sweep.round_columns(changed, changed.clone(), F_KK, grid, params, group_K)
    assert torch.equal(moved[:40], codes[:40]) and not torch.equal(moved[40:], codes[40:])
