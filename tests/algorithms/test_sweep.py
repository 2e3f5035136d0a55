"""The column loop: compiled and plain torch leaves round alike."""

import pytest
import torch

from llmq.algorithms import _sweep
from llmq.algorithms.gptq import factor
from llmq.compiled import compiled
from llmq.grids.int import Int


def problem(N, K, grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_NK, X_TK = torch.randn(N, K, generator=g), torch.randn(400, K, generator=g) @ torch.randn(K, K, generator=g)
    F_KK, _ = factor(X_TK.T @ X_TK / 400, 0.01)
    W_KN = W_NK.T.contiguous()
    return W_KN, F_KK, grid.fit(W_NK), torch.arange(K) // grid.group_size


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"restricted": True}], ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (24, 96), (300, 160)])
def test_compiled_and_torch_leaves_round_alike(monkeypatch, bits, options, N, K):
    assert compiled(_sweep._leaf, _sweep._KINDS) is not None, "numba is a dependency"
    grid = Int(bits=bits, group_size=32, **options)
    W_KN, F_KK, params, group_K = problem(N, K, grid, seed=N + bits)
    fast = _sweep.sweep(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    plain = _sweep.sweep(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert (fast != plain).float().mean() < 0.005  # sums in another order may turn a tie


def test_the_weight_stays_and_errors_reach_later_columns_only():
    grid = Int(4, True, 32)
    W_KN, F_KK, params, group_K = problem(16, 64, grid)
    before = W_KN.clone()
    codes = _sweep.sweep(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert torch.equal(W_KN, before)
    changed = W_KN.clone()
    changed[40] += 1.0
    moved = _sweep.sweep(changed, changed.clone(), F_KK, grid, params, group_K)
    assert torch.equal(moved[:40], codes[:40]) and not torch.equal(moved[40:], codes[40:])
