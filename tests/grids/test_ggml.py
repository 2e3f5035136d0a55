"""What every ggml grid owes: gguf's dequantizer agrees bit for bit, bytes survive, decoded values are fixed points."""

import math

import pytest
import torch
from _ggml import values_of

from llmq import registry
from llmq.gguf.kinds import KINDS
from llmq.grids import _ggml_affine, _ggml_linear
from llmq.grids._ggml import GgmlGrid, Stored, error_weights
from llmq.types import GgmlParams, LlmqError, QTensor

NAMES = [n for n in registry.names("grids") if issubclass(registry.find("grids", n), GgmlGrid)]
K = 512
every_grid = pytest.mark.parametrize("grid", [registry.load("grids", n) for n in NAMES], ids=NAMES)


def oracle(grid, rows):
    """Decode stored rows by other code (scripts/_ggml.py), as raw bits."""
    return raw_bits(values_of(rows, type(grid).__name__))


def raw_bits(values):
    return values.contiguous().view(torch.int32)


def encode(grid, W_NK, importance=None):
    params = grid.fit(W_NK, importance)
    return grid.nearest(W_NK, params.columns(W_NK.shape[1])).to(torch.uint8), params


def spread(params):
    return params.columns(K)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard_rows():
    """Rows that encoders trip over."""
    spike = torch.zeros(K)
    spike[37] = 3e4
    outlier = 0.01 * randn(K)
    outlier[300] = -1e3
    one_group = torch.zeros(K)
    one_group[64:80] = randn(16)
    rows = {
        "zero": torch.zeros(K),
        "spike": spike,
        "outlier": outlier,
        "one group": one_group,
        "subnormal halves": 1e-7 * randn(K),
        "float32 denormals": 1e-40 * randn(K),
        "beyond float16": 1e12 * randn(K),
        "constant": torch.full((K,), 0.37),
        "negative": -randn(K).abs() - 1,
        "positive": randn(K).abs() + 1,
        "offset": 5 + 1e-3 * randn(K),
        "scales apart": randn(K) * torch.logspace(-8, 8, K),
        "alternating": torch.tensor([1.0, -1.0]).repeat(K // 2),
        "tails": randn(K) ** 5,
    }
    return torch.stack(list(rows.values()))


@every_grid
def test_block_sizes_are_those_of_gguf(grid):
    kind = KINDS[type(grid).__name__]
    assert (kind.columns, kind.size) == (grid.qblock, grid.qblock_bytes)
    assert grid.row_bytes(K) == K // grid.qblock * grid.qblock_bytes
    assert grid.bits < grid.bits_per_weight < grid.bits + 1.1


@every_grid
@pytest.mark.parametrize("rows", ["random", "hard"])
@pytest.mark.parametrize("importance", [None, torch.logspace(-3, 3, K)], ids=["plain", "weighted"])
def test_gguf_decodes_our_bytes_to_our_values(grid, rows, importance):
    W_NK = 0.02 * randn(24, K) if rows == "random" else hard_rows()
    codes, params = encode(grid, W_NK, importance)
    decoded = QTensor(codes, params, grid).dequantize()
    stored = grid.to_bytes(codes, params)
    assert stored.dtype == torch.uint8 and stored.shape == (len(W_NK), grid.row_bytes(K))
    assert torch.isfinite(decoded).all()
    assert torch.equal(oracle(grid, stored), raw_bits(decoded))
    assert torch.equal(raw_bits(grid.decode(codes, params.columns(K))), raw_bits(decoded))


@every_grid
def test_any_bytes_survive_and_decode_like_gguf(grid):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 256, (64, grid.row_bytes(K)), dtype=torch.uint8, generator=generator)
    codes, params = grid.from_bytes(rows)
    halves = [p for p in (params.d, params.dmin) if p is not None]
    finite = torch.stack([torch.isfinite(p).all(1) for p in halves]).all(0)  # one random half in 32 is no number
    assert finite.sum() > 10
    assert codes.dtype == torch.uint8 and codes.max() == 2**grid.bits - 1
    assert torch.equal(grid.to_bytes(codes, params)[finite], rows[finite])
    decoded = grid.decode(codes, params.columns(K))
    assert torch.equal(oracle(grid, rows[finite]), raw_bits(decoded[finite]))


@every_grid
@pytest.mark.parametrize("rows", ["random", "hard"])
def test_bytes_and_params_survive(grid, rows):
    codes, params = encode(grid, randn(8, K) if rows == "random" else hard_rows())
    again, read = grid.from_bytes(grid.to_bytes(codes, params))
    assert torch.equal(again, codes)
    for name in GgmlParams.__dataclass_fields__:
        ours, theirs = getattr(params, name), getattr(read, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs)), name


@every_grid
def test_decoded_values_are_fixed_points(grid):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 256, (64, grid.row_bytes(K)), dtype=torch.uint8, generator=generator)
    codes, params = grid.from_bytes(rows)
    columns = params.columns(K)
    decoded = grid.decode(codes, columns)
    keep = torch.isfinite(decoded).all(1)
    again = grid.nearest(decoded, columns)
    assert again[keep].min() >= 0 and again[keep].max() <= 2**grid.bits - 1
    assert (grid.decode(again, columns) == decoded)[keep].all()  # -0.0 may become 0.0
    W_NK = hard_rows()
    codes, params = encode(grid, W_NK)
    columns = params.columns(K)
    decoded = grid.decode(codes, columns)
    assert (grid.decode(grid.nearest(decoded, columns), columns) == decoded).all()


@every_grid
def test_nearest_is_the_nearest_of_all_codes(grid):
    W_NK = randn(16, K)
    params = grid.fit(W_NK).columns(K)
    nearest = grid.decode(grid.nearest(W_NK, params), params)
    best = torch.full_like(W_NK, math.inf)
    for code in range(2**grid.bits):
        best = torch.minimum(best, (grid.decode(torch.full_like(W_NK, code), params) - W_NK).abs())
    assert torch.allclose((nearest - W_NK).abs(), best, rtol=1e-4, atol=1e-7)


@every_grid
def test_zero_rows_decode_to_zero(grid):
    codes, params = encode(grid, torch.zeros(2, K))
    assert (grid.decode(codes, params.columns(K)) == 0).all()


@every_grid
def test_importance_lowers_the_error_it_weighs(grid):
    W_NK, importance = 0.02 * randn(32, K), torch.exp(2 * randn(K, seed=5))

    def error(given):
        codes, params = encode(grid, W_NK, given)
        return ((grid.decode(codes, params.columns(K)) - W_NK).square() * importance).sum()

    assert error(importance) < 0.97 * error(None)
    assert torch.equal(error(torch.diag(importance)), error(importance))  # a Hessian counts by its diagonal
    assert torch.equal(error(torch.full((K,), 7.0)), error(torch.full((K,), 1e-9)))  # only ratios count


@every_grid
def test_columns_that_no_token_excites_still_get_a_scale(grid):
    W_NK, importance = 0.02 * randn(4, K), torch.ones(K)
    importance[: K // 2] = 0
    codes, params = encode(grid, W_NK, importance)
    error = (grid.decode(codes, params.columns(K)) - W_NK)[:, : K // 2]
    assert error.square().sum() < 0.3 * W_NK[:, : K // 2].square().sum()
    assert torch.equal(grid.fit(W_NK, torch.zeros(K)).d, grid.fit(W_NK).d)


@every_grid
def test_rows_are_fitted_alone(grid):
    """A row's scales do not depend on its neighbours, but for sums that round otherwise in a chunk of another size."""
    W_NK = 0.02 * randn(600, K)
    params = grid.fit(W_NK)
    parts = params.split([3, 597])
    assert torch.equal(torch.cat([p.scale for p in parts]), params.scale)
    for part, rows in zip(parts, W_NK.split([3, 597]), strict=True):
        alone = grid.fit(rows)
        assert (part.scale == alone.scale).float().mean() > 0.8
        errors = [(grid.decode(grid.nearest(rows, c), c) - rows).square().sum() for c in map(spread, (part, alone))]
        assert abs(errors[0] / errors[1] - 1) < 0.01


@every_grid
@pytest.mark.parametrize("importance", [None, torch.logspace(-3, 3, K)], ids=["plain", "weighted"])
def test_compiled_and_torch_searches_agree(monkeypatch, grid, importance):
    """By the error that the search weighs; ties, turned by sums in another order, move single rows by a few percent."""
    assert _ggml_affine._loop() and _ggml_linear._loop(), "numba is a dependency"
    W_NK = 0.02 * randn(1024, K)
    plain = error_weights(W_NK.reshape(-1, grid.group_size), None).reshape(W_NK.shape)
    errors = []
    for path in ("compiled", "torch"):
        if path == "torch":
            for module in (_ggml_affine, _ggml_linear):
                monkeypatch.setattr(module, "_loop", lambda: None)
        params = grid.fit(W_NK, importance).columns(K)
        square = (grid.decode(grid.nearest(W_NK, params), params) - W_NK).double().square()
        errors.append((square * (plain if importance is None else importance)).sum())
    assert abs(errors[0] / errors[1] - 1) < 5e-4


@every_grid
def test_what_cannot_be_stored_is_refused(grid):
    with pytest.raises(ValueError, match=f"{grid.qblock} columns"):
        grid.fit(randn(2, grid.qblock + 16))
    bad = randn(2, K)
    bad[1, 7] = math.nan
    with pytest.raises(LlmqError, match="NaN"):
        grid.fit(bad)
    with pytest.raises(LlmqError, match="importance"):
        grid.fit(randn(2, K), torch.full((K,), math.inf))
    codes, params = encode(grid, randn(2, K))
    with pytest.raises(ValueError, match="stored"):
        grid.to_bytes(codes, params.columns(K))


def test_params_by_group_are_the_columns_of_their_group():
    grid = registry.load("grids", "q4_1")
    params = grid.fit(randn(6, K))
    groups = params.by_group()
    assert len(groups) == K // 32 and groups[3].d is None
    assert torch.equal(groups[3].scale, params.scale[:, 3]) and groups[3].offset.is_contiguous()
    g_idx = torch.arange(K).flip(0) // 32
    assert torch.equal(params.columns(K, g_idx).offset, params.columns(K).offset.flip(1))


def test_stored_scales_give_the_params():
    """A solved symmetric 4-bit group copies into Q4_0: codes as they are, scales in float16."""
    grid = registry.load("grids", "q4_0")
    scale = torch.rand(3, K // 32, generator=torch.Generator().manual_seed(0)).half()
    params = grid.params(Stored(scale))
    codes = torch.arange(K, dtype=torch.uint8).remainder(16).expand(3, K)
    want = (codes.float() - 8) * scale.float().repeat_interleave(32, 1)
    assert torch.equal(grid.decode(codes, params.columns(K)), want)
    assert torch.equal(oracle(grid, grid.to_bytes(codes, params)), raw_bits(want))


def refined_params(grid, W_NK, codes, params, H_KK):
    E = W_NK - grid.decode(codes, params.columns(W_NK.shape[1]))
    return grid.refine(E, E @ H_KK, codes, params, H_KK, torch.arange(W_NK.shape[1]))


def quadratic(W_NK, Q_NK, H_KK):
    E = (W_NK - Q_NK).double()
    return ((E @ H_KK.double()) * E).sum()


@every_grid
def test_refined_scales_lower_the_loss_of_solved_codes(grid):
    """Monotone, in stored precision; and most of the way back in one sweep from scales that are far off."""
    W_NK, X_TK = 0.02 * randn(12, K), randn(300, K, seed=3) @ randn(K, K, seed=4) / K**0.5
    H_KK = X_TK.T @ X_TK / len(X_TK)
    codes, params = encode(grid, W_NK, H_KK)
    losses = [quadratic(W_NK, grid.decode(codes, params.columns(K)), H_KK)]
    for _ in range(2):
        params = refined_params(grid, W_NK, codes, params, H_KK)
        losses.append(quadratic(W_NK, grid.decode(codes, params.columns(K)), H_KK))
    again, read = grid.from_bytes(grid.to_bytes(codes, params))
    assert torch.equal(again, codes) and torch.equal(read.scale, params.scale)
    assert losses[1] < losses[0] and losses[2] <= losses[1] * (1 + 1e-5)
    shrunk = grid.params(Stored(params.d * 0.7, params.dmin, params.sc, params.m))
    before, refined = (
        quadratic(W_NK, grid.decode(codes, p.columns(K)), H_KK)
        for p in (shrunk, refined_params(grid, W_NK, codes, shrunk, H_KK))
    )
    assert refined - losses[2] < 0.2 * (before - losses[2])


@every_grid
def test_refining_solves_a_lone_qblock_like_least_squares(grid):
    """With one d to find and everything else exact, a sweep finds it to the precision of float16."""
    H_KK = torch.eye(grid.qblock) + 0.1
    codes, params = encode(grid, randn(6, grid.qblock))
    W_NK = grid.decode(codes, params.columns(grid.qblock))
    off = grid.params(Stored(params.d * 1.01, params.dmin, params.sc, params.m))
    refined = refined_params(grid, W_NK, codes, off, H_KK)
    before = quadratic(W_NK, grid.decode(codes, off.columns(grid.qblock)), H_KK)
    assert quadratic(W_NK, grid.decode(codes, refined.columns(grid.qblock)), H_KK) < 2e-2 * before


@every_grid
def test_blocks_that_no_scale_holds_are_told_of(grid):
    """A block's d is a float16: below it nothing is left, above it all is clipped, and both are said of the float."""
    for size in (1e-2, 1e-4, 1e-6, 1e-8, 1e8):
        W_NK = size * randn(4, K)
        W_NK[0] = 0
        beyond = grid.held.beyond(grid.covering(W_NK))
        codes, params = encode(grid, W_NK)
        lost = (grid.decode(codes.float(), spread(params)) - W_NK).norm() / W_NK.norm()
        assert beyond.shape == (4, K // grid.qblock) and not beyond[0].any()
        assert beyond[1:].all() if size in (1e-8, 1e8) else size < 1e-2 or not beyond.any()
        assert beyond.any() or lost < 0.4
        assert sum(grid.strain(W_NK, params).values()) == beyond.sum()
