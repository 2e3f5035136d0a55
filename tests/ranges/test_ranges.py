"""Each range beats min-max, in the loss it minimises, on data made for it."""

import pytest
import torch
from torch.nn.functional import gelu, silu

from llmq.grids.int import Int
from llmq.histogram import Histogram
from llmq.ranges import _search
from llmq.ranges.entropy import Entropy
from llmq.ranges.minmax import MinMax
from llmq.ranges.mse import Mse
from llmq.ranges.output import Output
from llmq.ranges.percentile import Percentile


def error(range_, w, bits=4, H_KK=None, group="channel", norm=2.0):
    """Return decoded - w for a grid fitted with `range_`."""
    grid = Int(bits, True, group, scale_dtype=torch.float32, range=range_)
    params = grid.fit(w, H_KK).columns(w.shape[1])
    return grid.decode(grid.nearest(w, params), params) - w


@pytest.fixture
def outliers():
    """Rows of 4096 normal values with one value of 40 standard deviations."""
    w = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    w[:, 7] = 40.0
    return w


def test_minmax_covers_everything():
    lo, hi = MinMax().interval(torch.tensor([[1.0, 3.0], [-2.0, -1.0]]), None, None)
    assert lo.tolist() == [0.0, -2.0] and hi.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("range_", [Percentile(99.0), Entropy()])
def test_bulk_ranges_beat_minmax_on_all_but_the_outliers(range_, outliers):
    bulk = torch.ones(4096, dtype=torch.bool)
    bulk[7] = False
    assert error(range_, outliers)[:, bulk].square().mean() < 0.2 * error(None, outliers)[:, bulk].square().mean()


def test_mse_has_less_squared_error_than_minmax_and_never_more():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    plain, best = (error(r, w, bits=3).square().sum(1) for r in (None, Mse()))
    assert (best <= plain * (1 + 1e-6)).all()
    assert best.sum() < 0.8 * plain.sum()


def test_mse_norm_minimises_that_norm():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    two, four = (error(Mse(norm=n), w, bits=3) for n in (2.0, 4.0))
    assert two.square().sum() <= four.square().sum()
    assert four.pow(4).sum() <= two.pow(4).sum()


def test_weighted_mse_has_less_weighted_error_than_unweighted():
    g = torch.Generator().manual_seed(2)
    w, diagonal = torch.randn(64, 128, generator=g), torch.rand(128, generator=g).pow(8) + 1e-4
    H_KK = torch.diag(diagonal)
    weighted = error(Mse(), w, bits=3, H_KK=H_KK).square() * diagonal
    unweighted = error(Mse(weighted=False), w, bits=3, H_KK=H_KK).square() * diagonal
    assert weighted.sum() < 0.95 * unweighted.sum()


def test_output_has_less_error_of_the_groups_output_than_mse():
    g = torch.Generator().manual_seed(3)
    w = torch.randn(64, 128, generator=g)
    X = torch.randn(512, 8, generator=g) @ torch.randn(8, 128, generator=g) + 0.1 * torch.randn(512, 128, generator=g)
    H_KK = X.T @ X / 512

    def loss(range_):
        e = error(range_, w, bits=3, H_KK=H_KK, group=64).reshape(64, 2, 64)
        return sum(((e[:, i] @ H_KK[64 * i : 64 * i + 64, 64 * i : 64 * i + 64]) * e[:, i]).sum() for i in range(2))

    assert loss(Output()) < 0.95 * loss(Mse(weighted=False))
    assert loss(Output()) < loss(None)


def test_output_without_a_hessian_says_what_it_needs():
    with pytest.raises(ValueError, match="calibration"):
        error(Output(), torch.randn(4, 64))


def test_percentile_by_weight_equals_percentile_of_repeated_values():
    values, counts = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), torch.tensor([[500.0, 300.0, 195.0, 5.0]])
    repeated = values[0].repeat_interleave(counts[0].long())[None]
    weighted = Percentile(98.0).interval(values, None, counts)
    assert weighted[1].item() == Percentile(98.0).interval(repeated, None, None)[1].item() == 3.0


def test_entropy_keeps_the_whole_of_a_uniform_range():
    w = torch.linspace(-1, 1, 4096)[None]
    lo, hi = Entropy().interval(w, Int(8), None)
    assert hi.item() > 0.95 and lo.item() < -0.95


def static_kl(range_, act, outliers):
    """KL of the softmax of a two-layer network whose inputs of both layers are int8 on one static scale each."""
    g = torch.Generator().manual_seed(0)
    W1, W2 = torch.randn(256, 64, generator=g) / 8, torch.randn(16, 256, generator=g) / 8
    X = torch.randn(4096, 64, generator=g)
    X[:, 3] *= 20 if outliers else 1
    grid = Int(8, True, "channel", scale_dtype=torch.float32)

    def rounded(x):
        seen = Histogram(1)
        seen.update(x)
        values, counts = seen.values()
        params = grid.params(*range_.interval(values[None], grid, counts[None]))
        return grid.decode(grid.nearest(x, params), params)

    want = (act(X @ W1.T) @ W2.T).log_softmax(-1)
    got = (rounded(act(rounded(X) @ W1.T)) @ W2.T).log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1).mean().item()


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("act", [torch.relu, gelu, silu, lambda x: x.relu().square(), lambda x: x.relu() * (x > 1)])
def test_entropy_of_activations_with_many_zeros_is_level_with_minmax(act, outliers):
    """Zeros, exact or nearly so, outweigh all other values; without a word on them the threshold falls on the bulk."""
    assert static_kl(Entropy(), act, outliers) < 1.05 * static_kl(MinMax(), act, outliers)


def test_entropy_does_not_clip_the_few_values_that_carry_a_language_models_function():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2**16, generator=g).pow(3)  # as peaked at zero as gate times up
    x[0, :16] = 3000.0
    grid = Int(8, True, "channel", scale_dtype=torch.float32)
    seen = Histogram(1)
    seen.update(x)
    values, counts = seen.values()

    def squares(range_):
        params = grid.params(*range_.interval(values[None], grid, counts[None]))
        return (grid.decode(grid.nearest(x, params), params) - x).square().sum()

    assert squares(Entropy()) < 1.01 * squares(MinMax())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_compiled_and_torch_searches_agree(monkeypatch, bits, sym, weighted):
    g = torch.Generator().manual_seed(bits)
    w, H_KK = torch.randn(33, 128, generator=g), torch.diag(torch.rand(128, generator=g).pow(4))
    assert _search.compiled(_search._search, _search._KINDS, reassociate=True) is not None
    losses = []
    for path in ("compiled", "torch"):
        if path == "torch":
            monkeypatch.setattr(_search, "compiled", lambda *_, **__: None)
        mass = H_KK.diagonal() if weighted else torch.ones(128)
        grid = Int(bits, sym, 32, scale_dtype=torch.float32, range=Mse())
        params = grid.fit(w, H_KK if weighted else None).columns(128)
        losses.append((((grid.decode(grid.nearest(w, params), params) - w) ** 2) * mass).reshape(33, 4, 32).sum(-1))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sym", [True, False])
def test_falling_grids_and_shifted_zeros_lower_the_weighted_error(sym):
    g = torch.Generator().manual_seed(5)
    w, mass = torch.randn(256, 64, generator=g), torch.rand(64, generator=g).pow(4)
    losses = []
    for shift in (True, False):
        grid = Int(3, sym, 32, scale_dtype=torch.float32, range=Mse(shift=shift))
        params = grid.fit(w, torch.diag(mass)).columns(64)
        losses.append(((grid.decode(grid.nearest(w, params), params) - w) ** 2 * mass).reshape(256, 2, 32).sum(-1))
    assert (losses[0] <= losses[1] * (1 + 1e-5)).all()
    assert losses[0].sum() < 0.95 * losses[1].sum()


def test_a_falling_grid_has_its_surplus_level_above_zero():
    grid = Int(2, True, "channel", scale_dtype=torch.float32)
    rising, falling = (grid.params(torch.tensor([lo]), torch.tensor([hi])) for lo, hi in ((-3.0, 3.0), (3.0, -3.0)))
    codes = torch.arange(4.0)
    assert grid.decode(codes, rising).tolist() == [-4.0, -2.0, 0.0, 2.0]
    assert grid.decode(codes, falling).tolist() == [4.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize("sym", [True, False])
def test_mse_searches_rows_in_parts_as_all_at_once(monkeypatch, sym):
    g = torch.Generator().manual_seed(0)
    w, mass = torch.randn(50, 3, 32, generator=g), torch.rand(3, 32, generator=g)
    grid = Int(3, sym, 32)
    whole = Mse().interval(w, grid, mass)
    monkeypatch.setattr("llmq.ranges.mse._AT_ONCE", 7 * 96)
    for all_at_once, in_parts in zip(whole, Mse().interval(w, grid, mass), strict=True):
        assert torch.equal(all_at_once, in_parts)
