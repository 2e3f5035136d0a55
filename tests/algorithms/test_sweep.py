"""The column loop: compiled and plain torch leaves round alike."""

import pytest
import torch

from llmq import gpu, registry
from llmq.algorithms import _sweep
from llmq.algorithms.gptq import Gptq
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.jit import compiled
from llmq_kernels import panel


def problem(N, K, grid, seed=0):
    g = torch.Generator().manual_seed(seed)
    W_NK, X_TK = torch.randn(N, K, generator=g), torch.randn(400, K, generator=g) @ torch.randn(K, K, generator=g)
    F_KK, *_ = Gptq().factor(X_TK.T @ X_TK / 400, 400)
    W_KN = W_NK.T.contiguous()
    return W_KN, F_KK, grid.fit(W_NK), torch.arange(K) // grid.granularity.columns(K)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"sym": False}, {"restricted": True}], ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (24, 96), (300, 160)])
def test_compiled_and_torch_leaves_round_alike(monkeypatch, bits, options, N, K):
    assert compiled(_sweep._loop, _sweep._KINDS) is not None, "numba is a dependency"
    grid = Int(bits=bits, group=32, **options)
    W_KN, F_KK, params, group_K = problem(N, K, grid, seed=N + bits)
    fast = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    plain = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert (fast != plain).float().mean() < 0.005  # sums in another order may turn a tie


@pytest.mark.parametrize(
    "name", ["q4_0", "q8_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
)
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


@pytest.mark.parametrize("grid", [Fp8(), Fp8("tensor"), Nvfp4(), Mxfp4(), Mxfp8()], ids=str)
def test_tables_of_values_are_compiled_too(monkeypatch, grid):
    W_KN, F_KK, params, group_K = problem(300, 96, grid)
    fast = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    plain = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert (fast != plain).float().mean() < 0.01


@pytest.mark.parametrize("grid", [Fp8(32), Mxfp4(), "iq4_nl", "q4_0"], ids=str)
def test_ties_fall_in_compiled_loops_as_in_the_grid(grid):
    """Scales are powers of two, and no column feeds another."""
    grid = registry.load("grids", grid) if isinstance(grid, str) else grid
    scale, kind = torch.exp2(torch.randint(-3, 3, (500, 1)).float()), type(grid.fit(torch.ones(1, 32)))
    values = grid.decode(torch.arange(2**grid.bits)[None], kind(torch.ones(1, 1))).unique()
    values = values[values.isfinite()]
    between = (values[1:] + values[:-1]) / 2
    t = torch.cat([between, between.nextafter(values[1:]), between.nextafter(values[:-1]), values])
    t = torch.cat([t[t.abs() > 1e-30], torch.tensor([0, 1e-30, -1e-30])])
    W_NK = t[torch.randint(len(t), (500, 32))] * scale
    W_KN = W_NK.T.contiguous()
    codes = _sweep.round_columns(
        W_KN, W_KN.clone(), torch.eye(32), grid, kind(scale), torch.zeros(32, dtype=torch.long)
    )
    assert torch.equal(codes.T.float(), grid.nearest(W_NK, kind(scale)))


@pytest.fixture
def by_kernels(monkeypatch):
    """What rounds on a GPU, on the CPU, where the kernels' operators are their references; returns its launches."""
    launches = []
    counted = panel.round_panel
    monkeypatch.setattr(_sweep, "compiled", lambda *_: None)
    monkeypatch.setattr(gpu, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(panel, "round_panel", lambda w, *args: launches.append(len(w)) or counted(w, *args))
    return launches


@pytest.mark.parametrize(
    ("grid", "K"),
    [
        *((Int(4, False, 16), 48), (Int(8, True, "channel", restricted=True), 40), (Int(2, True, 32), 224)),
        *(("q4_k", 256), (Nvfp4(), 48), (Fp8(), 40), ("iq4_xs", 256)),
    ],
    ids=str,
)
@pytest.mark.parametrize("mixed", [False, True], ids=["groups as they lie", "groups by chance"])
def test_a_panel_a_launch_rounds_as_the_compiled_loop_does(grid, K, mixed, request):
    """Bit for bit where neither needs a product outside its loop."""
    grid = registry.load("grids", grid) if isinstance(grid, str) else grid
    W_KN, F_KK, params, group_K = problem(40, K, grid)
    if mixed:
        group_K = group_K[torch.randperm(K, generator=torch.Generator().manual_seed(3))]
    wanted = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    launches = request.getfixturevalue("by_kernels")
    found = _sweep.round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)
    assert sum(launches) == K and launches[:-1] == [64] * ((K - 1) // 64)
    assert torch.equal(found, wanted) if K <= 48 else (found != wanted).float().mean() < 0.005
    assert (grid.nearest(W_KN.T, params.columns(K, group_K)) != found.T).any()


def test_a_gpu_without_triton_rounds_by_torch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "refuses_device", lambda *_: "triton is not installed: pip install triton")
    gpu.warn.cache_clear()
    for _ in range(2):
        assert not gpu.runs_kernels(torch.device("cuda"), "columns are rounded one by one")
    assert not gpu.runs_kernels(torch.device("cpu"), "columns are rounded one by one")
    (record,) = caplog.records
    assert "columns are rounded one by one by torch, without the Triton kernels: triton is" in record.getMessage()


@pytest.mark.parametrize(("K", "width", "step"), [(130, 64, 64), (700, 64, 64), (100, 16, 1), (5, 8, 1)])
def test_every_column_is_told_of_every_other(K, width, step):
    told = torch.eye(K, dtype=torch.int32)
    worked = []
    for a, b in _sweep.halves(0, K, width, step, back=True):
        if a == b:
            assert not told[a, a].triu(1).any()
            worked.append((a.start, a.stop))
            told[a, a] = 1
        else:
            told[a, b] += 1
    assert (told == 1).all()
    assert [hi for _, hi in worked[:-1]] == [lo for lo, _ in worked[1:]] and worked[-1][1] == K
    assert all(hi - lo <= width and lo % step == 0 for lo, hi in worked)
    forward = list(_sweep.halves(0, K, width, step))
    assert forward == [(a, b) for a, b in _sweep.halves(0, K, width, step, back=True) if a.start <= b.start]


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
