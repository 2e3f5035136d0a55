"""Grids of small floats: ties and ends of their values, the properties every grid owes its solvers, shared divisors."""

import pytest
import torch

from llmq.grids.fp8 import Fp8
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import E2M1, E4M3
from llmq.ranges.mse import Mse
from llmq.types import QTensor

GRIDS = [Fp8(), Fp8("tensor"), Fp8("128x128"), Fp8(64), Nvfp4(), Mxfp4(), Mxfp8()]


def test_ties_of_e2m1_go_to_the_even_code_and_zeros_keep_their_sign():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0, 0.0])
    assert E2M1.decode(E2M1.encode(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0]
    assert torch.equal(E2M1.encode(-ties), E2M1.encode(ties) + 8)


@pytest.mark.parametrize("kind", [E2M1, E4M3])
def test_every_value_is_its_own_nearest_and_codes_ascend(kind):
    values = kind.decode(kind.codes)
    assert torch.equal(kind.encode(values), kind.codes) and bool((values.diff() >= 0).all())
    between = (values[1:] + values[:-1]) / 2
    for t in (between * (1 + 1e-6), between * (1 - 1e-6)):
        error = (kind.decode(kind.encode(t)) - t).abs()
        assert torch.equal(error, (values[:, None] - t).abs().amin(0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_survive_decoding(grid):
    W_NK = torch.randn(200, 256) * torch.logspace(-2, 1, 200)[:, None]
    q = QTensor.rounded(W_NK, grid)
    columns = q.params.columns(256)
    assert torch.equal(grid.nearest(q.dequantize(), columns), q.codes.float())
    assert torch.equal(grid.decode(q.codes, columns), q.dequantize())
    error = (q.dequantize() - W_NK).norm() / W_NK.norm()
    assert error < (0.13 if grid.bits == 4 else 0.04)


@pytest.mark.parametrize("grid", [Fp8(range=Mse()), Nvfp4(range=Mse()), Mxfp4(range=Mse())], ids=["fp8", "nv", "mx"])
def test_a_searched_range_has_less_error_than_min_max(grid):
    torch.manual_seed(0)
    W_NK, weight_K = torch.randn(32, 128), torch.rand(128) + 0.1

    def error(q):
        return ((q.dequantize() - W_NK).square() * weight_K).sum()

    found, plain = (error(QTensor.rounded(W_NK, g, weight_K)) for g in (grid, grid.plain()))
    assert found < plain * (0.9 if isinstance(grid, Nvfp4) else 1)


def test_rows_beyond_a_block_are_none_of_its_concern():
    W_NK = torch.randn(200, 256)
    scale = Fp8("128x128").fit(W_NK).scale
    assert torch.equal(scale[:128], (W_NK[:128].view(128, 2, 128).abs().amax((0, 2)) / 448).expand(128, 2))
    assert torch.equal(scale[128:], (W_NK[128:].view(72, 2, 128).abs().amax((0, 2)) / 448).expand(72, 2))


def test_weights_that_are_fused_share_one_divisor():
    W, V = torch.randn(4, 32), 5 * torch.randn(4, 32)
    grid = Nvfp4().spanning([W, V])
    divisors = {grid.fit(x).divisor[0].item() for x in (W, V)}
    assert divisors == {448 * 6 / V.abs().max().item()} or len(divisors) == 1
    assert Nvfp4().fit(W).divisor[0].item() != divisors.pop()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_are_zeros(grid):
    W_NK = torch.zeros(4, 128)
    assert torch.equal(QTensor.rounded(W_NK, grid).dequantize(), W_NK)
