"""Each range beats min-max, in the loss it minimises, on data made for it."""

import pytest
import torch

from llmq.grids.int import Int
from llmq.ranges.entropy import Entropy
from llmq.ranges.minmax import MinMax
from llmq.ranges.mse import Mse
from llmq.ranges.output import Output
from llmq.ranges.percentile import Percentile


def error(range_, w, bits=4, H_KK=None, group_size=None, norm=2.0):
    """Return decoded - w for a grid fitted with `range_`."""
    grid = Int(bits, True, group_size, scale_dtype=torch.float32, range=range_)
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
        e = error(range_, w, bits=3, H_KK=H_KK, group_size=64).reshape(64, 2, 64)
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
