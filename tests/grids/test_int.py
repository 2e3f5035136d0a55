"""Integer grids: the worked examples of affine quantization, and the properties every grid owes its solvers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.grids.int import Int
from llmq.params import stored
from llmq.types import QTensor


def test_int8_of_1_2_has_the_textbook_scale():
    grid = Int(8, sym=True, group="channel", restricted=True, scale_dtype=torch.float32)
    scale = grid.fit(torch.tensor([[0.3, -1.0, 1.2]])).scale
    assert scale.item() == pytest.approx(1.2 / 127, rel=1e-6)
    assert round(scale.item(), 5) == 0.00945


def test_an_all_positive_range_has_zero_point_0():
    grid = Int(8, sym=False, group="channel", scale_dtype=torch.float32)
    params = grid.fit(torch.tensor([[0.5, 2.0, 5.1]]))
    assert params.zero.item() == 0
    assert params.scale.item() == pytest.approx(5.1 / 255, rel=1e-6)


def test_an_all_negative_range_has_the_top_code_as_zero():
    params = Int(4, sym=False, group="channel").fit(torch.tensor([[-3.0, -1.0]]))
    assert params.zero.item() == 15


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, "channel"])
def test_codes_survive_decoding_and_errors_stay_within_half_a_step(bits, sym, group):
    torch.manual_seed(bits)
    W_NK = torch.randn(16, 128)
    grid = Int(bits, sym, group, scale_dtype=torch.float32)
    params = grid.fit(W_NK)
    columns = params.columns(128)
    codes = grid.nearest(W_NK, columns)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.equal(grid.nearest(grid.decode(codes, columns), columns), codes)
    step = columns.scale
    inside = (codes > 0) & (codes < 2**bits - 1)
    error = (grid.decode(codes, columns) - W_NK).abs()
    assert (error[inside] <= step[inside] * (0.5 + 1e-5)).all()
    assert (error <= step * (1 + 1e-5)).all()  # at the ends at most half a step of clipping is added


def test_zero_stays_exactly_zero():
    W_NK = torch.randn(4, 64) + 3
    W_NK[:, 5] = 0
    for sym in (True, False):
        grid = Int(4, sym, 32)
        params = grid.fit(W_NK).columns(64)
        assert (grid.decode(grid.nearest(W_NK, params), params)[:, 5] == 0).all()


def test_per_tensor_has_one_scale():
    params = Int(8, True, "tensor").fit(torch.randn(8, 32))
    assert params.scale.shape == (8, 1) and params.scale.unique().numel() == 1


def test_scales_are_rounded_to_the_stored_dtype_before_codes_are_chosen():
    params = Int(4, True, 32, scale_dtype=torch.bfloat16).fit(torch.randn(4, 64))
    assert params.scale.dtype == torch.bfloat16


def test_all_zero_groups_decode_to_zero_and_huge_ones_do_not_overflow():
    W_NK = torch.zeros(2, 64)
    W_NK[1, 40] = 1e9
    for sym in (True, False):
        grid = Int(4, sym, 32)
        params = grid.fit(W_NK)
        assert torch.isfinite(params.scale).all() and (params.scale > 0).all()
        columns = params.columns(64)
        decoded = grid.decode(grid.nearest(W_NK, columns), columns)
        assert (decoded[0] == 0).all() and torch.isfinite(decoded).all()


@given(st.floats(-(2.0**21), 2.0**21, width=32))
@settings(max_examples=200)
def test_rounding_equals_torch_round(x):
    grid = Int(8, False, "channel", scale_dtype=torch.float32)
    params = grid.params(torch.tensor(0.0), torch.tensor(255.0))
    want = torch.tensor(x).round().clamp(0, 255)
    assert grid.nearest(torch.tensor(x), params) == want


def test_dequantize_with_g_idx_reads_the_named_group():
    grid = Int(4, True, 2)
    params = grid.fit(torch.tensor([[1.0, 1.0, 8.0, 8.0]]))
    codes = torch.full((1, 4), 9, dtype=torch.uint8)
    mixed = QTensor(codes, params, grid, torch.tensor([1, 0, 0, 1], dtype=torch.int32)).dequantize()
    s = params.scale.float()[0]
    assert torch.equal(mixed, torch.stack([s[1], s[0], s[0], s[1]])[None])


@pytest.mark.parametrize("bad", [{"bits": 9}, {"bits": 1}, {"group": "8x8"}])
def test_impossible_grids_are_refused(bad):
    with pytest.raises(ValueError):
        Int(**bad)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_small_weights_are_held_or_told_of(dtype, size, sym):
    grid = Int(4, sym, 32, scale_dtype=dtype)
    W_NK = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    W_NK[0] = 0
    params = grid.fit(W_NK)
    assert (params.scale > 0).all() and params.scale.isfinite().all()
    columns = params.columns(64)
    lost = (grid.decode(grid.nearest(W_NK, columns), columns) - W_NK).norm() / W_NK.norm()
    beyond = grid.held.beyond(grid.covering(W_NK))
    assert not beyond[0].any()  # zeros are held by any scale
    if dtype == torch.float16 and size <= 1e-7:
        assert beyond[1:].all()
    else:
        assert not beyond.any() and lost < 0.15


def test_groups_too_large_for_their_scales_are_told_of():
    W_NK = torch.ones(2, 64)
    W_NK[1, 40] = -1e6

    def beyond(grid):
        return grid.held.beyond(grid.covering(W_NK)).tolist()

    assert beyond(Int(4, True, 32)) == [[False, False], [False, True]]
    assert beyond(Int(4, True, 32, scale_dtype=torch.bfloat16)) == [[False, False], [False, False]]
    assert beyond(Int(4, True, "tensor")) == [[True]]


def test_groups_whose_scales_are_lost_coarse_or_clipped_are_counted():
    """float16: nothing below 2^-24, fewer than 11 bits below 2^-14, nothing above 65504."""
    W_NK = torch.zeros(1, 5 * 32)
    W_NK[0, ::32] = 7.5 * torch.tensor([2.0**-25, 2.0**-15, 2.0**-14, 1e5, 0])
    for dtype, found in ((torch.float16, {"lost": 1, "coarse": 1, "clipped": 1}), (torch.bfloat16, {})):
        grid = Int(4, True, 32, scale_dtype=dtype)
        assert grid.strain(W_NK, grid.fit(W_NK)) == grid.held.strain(grid.covering(W_NK)) == found
        assert grid.strain(W_NK[:, 64:96], grid.fit(W_NK[:, 64:96])) == {}
    large, whole = torch.full((8, 64), 1e6), Int(4, True, "tensor")
    assert whole.strain(large, whole.fit(large)) == {"clipped": 1}


def test_a_moved_scale_that_the_file_cannot_hold_stays_as_it_was():
    old = torch.tensor([2.0**-24, 6e4, 1.0, -(2.0**-24)], dtype=torch.float16)
    moved = torch.tensor([2.0**-26, 1e5, 1.5, -(2.0**-26)])
    assert stored(moved, old).tolist() == [2.0**-24, float(old[1]), 1.5, -(2.0**-24)]
