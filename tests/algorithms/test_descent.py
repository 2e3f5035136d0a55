"""Descent: neither step ever raises the loss of a row, and where it ends no single code can lower it."""

import pytest
import torch

from llmq import gpu, registry
from llmq.algorithms import _walk
from llmq.algorithms._hessian import damped
from llmq.algorithms.descent import Descent, _State
from llmq.algorithms.gptq import Gptq
from llmq.algorithms.rtn import Rtn
from llmq.granularity import PerBlock, PerGroup, PerTensor
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import rescaled
from llmq.stats import Hessian, Stats
from llmq.types import QTensor


def hessian(K, T=1500, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = Hessian(T)
    h.update(torch.randn(T, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5 * (0.2 + torch.rand(K)))
    return h


def weight(N, K, seed=1):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def of(name, *, sym=True):
    return Int(int(name[3:]), sym, 32) if name.startswith("int") else registry.load("grids", name)


def row_loss(W_NK, q, H_KK):
    E = (W_NK - q.dequantize()).double()
    return ((E @ H_KK.double()) * E).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, "channel"])
def test_no_row_gets_worse_and_the_sum_gets_better(bits, sym, group):
    W_NK, h = weight(24, 128), hessian(128)
    before = Gptq().solve(W_NK, Int(bits, sym, group), Stats({Hessian: h}))
    after = Descent().refine(W_NK, before, Stats({Hessian: h}))
    H_KK = Descent().regularize(damped(h.mean(), Descent.damp), h.count)
    old, new = row_loss(W_NK, before.q, H_KK), row_loss(W_NK, after.q, H_KK)
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < old.sum()
    assert after.ratios["descent"] == pytest.approx((float(new.sum()), float(old.sum())), rel=1e-3)
    assert after.q.params.scale.dtype == before.q.params.scale.dtype
    assert int(after.q.codes.max()) < 2**bits


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_ggml_grids_are_refined_in_what_they_store(name):
    W_NK, h, grid = weight(24, 256), hessian(256), registry.load("grids", name)
    before = Gptq().solve(W_NK, grid, Stats({Hessian: h}))
    after = Descent().refine(W_NK, before, Stats({Hessian: h}))
    H_KK = Descent().regularize(damped(h.mean(), Descent.damp), h.count)
    old, new = row_loss(W_NK, before.q, H_KK), row_loss(W_NK, after.q, H_KK)
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < 0.99 * old.sum()
    codes, params = grid.from_bytes(grid.to_bytes(after.q.codes, after.q.params))
    assert torch.equal(codes, after.q.codes)
    assert torch.equal(grid.decode(codes, params.columns(256)), after.q.dequantize())


@pytest.mark.parametrize(
    "grid",
    [Nvfp4(), Mxfp4(), Mxfp8(), Fp8(), Fp8(32), Fp8(32, scale_dtype=torch.bfloat16), Fp8("tensor"), Fp8("16x32")],
    ids=str,
)
@pytest.mark.parametrize("desc_act", [False, True])
def test_small_floats_are_refined_in_what_they_store(grid, desc_act):
    W_NK, h = weight(24, 128), hessian(128)
    W_NK[3] = 0
    before = Gptq(desc_act=desc_act).solve(W_NK, grid, Stats({Hessian: h}))
    after, codes = (Descent(scales=s).refine(W_NK, before, Stats({Hessian: h})) for s in (True, False))
    H_KK = Descent().regularize(damped(h.mean(), Descent.damp), h.count)
    old, new, fixed = (row_loss(W_NK, x.q, H_KK) for x in (before, after, codes))
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < old.sum()
    scale, params = after.q.params.scale, rescaled(after.q.params, after.q.params.scale.float())
    assert scale.dtype == before.q.params.scale.dtype and torch.equal(params.scale, scale)
    assert params.stored is None or torch.equal(params.stored, after.q.params.stored)
    if isinstance(grid.granularity, PerGroup) and not isinstance(grid, Mxfp4 | Mxfp8):
        assert new.sum() < 0.995 * fixed.sum()
    if isinstance(grid.granularity, PerTensor | PerBlock):
        assert torch.equal(scale, before.q.params.scale)


@pytest.mark.parametrize("grid", [Nvfp4(), Mxfp4(), Fp8(32)], ids=str)
def test_no_other_stored_scale_of_a_group_is_better(grid):
    W_NK, H_KK = weight(8, 96), hessian(96).mean()
    state = _State(W_NK, Rtn().solve(W_NK, grid, Stats()).q, H_KK)
    for _ in range(3):
        state.fit_scales()
    for g in range(state.params.scale.shape[1]):
        for factor in (0.5, 0.88, 1.13, 2):
            scale = state.params.scale.clone()
            scale[:, g] *= factor
            tried = rescaled(state.params, scale)
            E = W_NK - QTensor(state.codes, tried, grid).dequantize()
            assert (((E @ H_KK) * E).sum(1) >= state.loss_N * (1 - 1e-4)).all()


def test_each_step_alone_lowers_the_loss():
    W_NK, H_KK, grid = weight(32, 128), hessian(128).mean(), Int(3, True, 32)
    start = Rtn().solve(W_NK, grid, Stats())
    for step in ("fit_scales", "descend"):
        state = _State(W_NK, start.q, H_KK)
        before = state.loss_N.clone()
        getattr(state, step)()
        assert (state.loss_N <= before).all() and state.loss_N.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("name", ["int4", "int2", "q4_k", "q4_1", "q6_k", "iq4_xs", "nvfp4", "mxfp4", "fp8"])
def test_walking_the_codes_finds_what_sweeping_them_does(name):
    grid = of(name)
    W_NK, h = weight(27, 256), hessian(256)
    start = Gptq().solve(W_NK, grid, Stats({Hessian: h}))
    walked, swept = (_State(W_NK, start.q, h.mean()) for _ in range(2))
    walked.descend(sweeps=2)
    for _ in range(2):
        swept._sweep()
    assert (walked.codes != start.q.codes).any()
    assert (walked.Q_NK != swept.Q_NK).float().mean() < 0.005  # sums in another order may turn a tie
    Q_NK, gradient_NK, loss_N = walked._measure(walked.codes, walked.params)
    torch.testing.assert_close(walked.loss_N, loss_N, rtol=1e-4, atol=0)
    torch.testing.assert_close(walked.gradient_NK, gradient_NK, rtol=1e-3, atol=1e-4)
    assert torch.equal(walked.Q_NK, Q_NK)


@pytest.mark.parametrize(
    ("name", "K"),
    [("int4", 64), ("int2", 256), ("q4_k", 256), ("q6_k", 256), ("nvfp4", 64), ("fp8", 64), ("mxfp8", 256)],
)
def test_walking_panel_by_panel_finds_what_walking_row_by_row_does(name, K, monkeypatch):
    """What a GPU does, by the kernels' references; of one panel, bit for bit."""
    grid = of(name, sym=False)
    W_NK, h = weight(27, K), hessian(K)
    start = Gptq().solve(W_NK, grid, Stats({Hessian: h}))
    by_rows, by_panels = (_State(W_NK, start.q, h.mean()) for _ in range(2))
    by_rows.descend(sweeps=3)
    monkeypatch.setattr(_walk, "compiled", lambda *_: None)
    monkeypatch.setattr(gpu, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(_State, "_sweep", None)
    by_panels.descend(sweeps=3)
    assert (by_rows.codes != start.q.codes).any()
    assert (by_panels.codes != by_rows.codes).float().mean() < 0.005  # products between panels
    if K == 64:
        for what in ("codes", "gradient_NK", "Q_NK"):
            assert torch.equal(getattr(by_panels, what), getattr(by_rows, what))
    Q_NK, gradient_NK, loss_N = by_panels._measure(by_panels.codes, by_panels.params)
    torch.testing.assert_close(by_panels.loss_N, loss_N, rtol=1e-4, atol=0)
    torch.testing.assert_close(by_panels.gradient_NK, gradient_NK, rtol=1e-3, atol=1e-4)
    assert torch.equal(by_panels.Q_NK, Q_NK)


def test_rows_are_done_when_a_sweep_moves_nothing_and_not_before():
    W_NK, H_KK, grid = weight(27, 256), hessian(256).mean(), Int(3, True, 32)
    start = Rtn().solve(W_NK, grid, Stats())
    at_once, one_by_one = (_State(W_NK, start.q, H_KK) for _ in range(2))
    at_once.descend(sweeps=40)
    moved = []
    for _ in range(40):
        before = one_by_one.codes.clone()
        one_by_one.descend(sweeps=1)
        moved.append(not torch.equal(one_by_one.codes, before))
    assert moved[3] and not moved[-1]
    for what in ("codes", "gradient_NK", "loss_N"):
        assert torch.equal(getattr(at_once, what), getattr(one_by_one, what))


def test_without_a_compiled_loop_the_codes_are_swept(monkeypatch):
    W_NK, H_KK, grid = weight(16, 64), hessian(64).mean(), Int(3, True, 32)
    start = Rtn().solve(W_NK, grid, Stats())
    plain, walked = (_State(W_NK, start.q, H_KK) for _ in range(2))
    walked.descend(sweeps=3)
    monkeypatch.setattr(_walk, "compiled", lambda *_: None)
    plain.descend(sweeps=3)
    assert (plain.codes != walked.codes).float().mean() < 0.005
    torch.testing.assert_close(plain.loss_N, walked.loss_N, rtol=1e-2, atol=0)


def test_where_it_ends_no_single_code_lowers_the_loss():
    W_NK, H_KK, grid = weight(6, 64), hessian(64).mean(), Int(3, True, 32)
    start = Rtn().solve(W_NK, grid, Stats())
    state = _State(W_NK, start.q, H_KK)
    for _ in range(30):
        state.descend()
    codes, columns = state.codes.float(), state.params.columns(64)
    for j in range(64):
        for step in (-1, 1):
            tried = codes.clone()
            tried[:, j] = (tried[:, j] + step).clamp(0, 7)
            E = W_NK - grid.decode(tried, columns)
            assert (((E @ H_KK) * E).sum(1) >= state.loss_N * (1 - 1e-4)).all()


def test_scales_are_the_least_squares_solution_of_a_dense_system():
    W_NK, H_KK, grid = weight(4, 64), hessian(64).mean(), Int(4, True, 32, scale_dtype=torch.float32)
    start = Rtn().solve(W_NK, grid, Stats())
    state = _State(W_NK, start.q, H_KK)
    codes = state.codes.double() - 8
    state.fit_scales()
    L = torch.linalg.cholesky(H_KK.double())
    for n in range(4):
        U = torch.stack([torch.cat([codes[n, :32], torch.zeros(32)]), torch.cat([torch.zeros(32), codes[n, 32:]])], 1)
        want = torch.linalg.lstsq(L.T @ U.double(), L.T @ W_NK[n].double()).solution
        torch.testing.assert_close(state.params.scale[n].double(), want, rtol=1e-3, atol=1e-6)


def test_groups_of_the_act_order_are_kept():
    W_NK, h = weight(16, 64), hessian(64)
    before = Gptq(desc_act=True).solve(W_NK, Int(4, True, 32), Stats({Hessian: h}))
    after = Descent().refine(W_NK, before, Stats({Hessian: h}))
    assert torch.equal(after.q.g_idx, before.q.g_idx)
    assert row_loss(W_NK, after.q, h.mean()).sum() < row_loss(W_NK, before.q, h.mean()).sum()


def test_one_scale_for_the_tensor_stays_one_scale():
    W_NK, h = weight(16, 64), hessian(64)
    before = Gptq().solve(W_NK, Int(8, True, "tensor"), Stats({Hessian: h}))
    after = Descent().refine(W_NK, before, Stats({Hessian: h}))
    assert torch.equal(after.q.params.scale, before.q.params.scale)
