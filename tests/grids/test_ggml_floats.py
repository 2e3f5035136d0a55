"""ggml's blocks of small floats: gguf decodes ours to our values, bytes survive, the peer's scales are ours."""

import gguf
import pytest
import torch
from _ggml import values_of

from llmq.gguf import kinds
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.nvfp4 import Nvfp4
from llmq.types import QTensor

K = 512
GRIDS = {
    "MXFP4": Mxfp4(),
    "NVFP4": Nvfp4(),
    "MXFP4 searched": kinds.grid("MXFP4"),
    "NVFP4 searched": kinds.grid("NVFP4"),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


@every_grid
@pytest.mark.parametrize("size", [1e-8, 0.02, 3e4])
def test_gguf_decodes_our_bytes_to_our_values(grid, size):
    """A searched divisor is a power of two, so that its reciprocal in the file means the same to the last bit."""
    W_NK = size * torch.randn(24, K) * torch.logspace(-1, 1, K)
    W_NK[3] = 0
    W_NK[5, 16:32] = 0
    q = QTensor.rounded(W_NK, grid)
    rows, beside = grid.to_bytes(q.codes, q.params), grid.stored_once(q.params)
    assert rows.shape == (24, grid.row_bytes(K)) and beside.keys() == set(grid.once)
    meant = values_of(rows, grid.kind) * beside.get("scale", 1)
    if grid.range is None:
        torch.testing.assert_close(meant, q.dequantize(), rtol=1e-6, atol=0)
    else:
        assert torch.equal(meant, q.dequantize())
    codes, params = grid.from_bytes(rows, beside)
    assert torch.equal(codes, q.codes) and torch.equal(params.stored, q.params.stored)
    torch.testing.assert_close(params.scale, q.params.scale, rtol=1e-6, atol=0)


@every_grid
def test_any_bytes_survive_and_decode_like_gguf(grid):
    rows = torch.randint(0, 256, (64, K // grid.qblock, grid.row_bytes(grid.qblock)), dtype=torch.uint8)
    scales = rows[..., : grid.qblock // grid.granularity.columns(K)]
    scales %= 250 if grid.kind == "MXFP4" else 127  # more overflows float32, 127 is NaN
    rows = rows.flatten(1)
    codes, params = grid.from_bytes(rows)
    assert codes.max() == 15 and torch.equal(grid.to_bytes(codes, params), rows)
    assert torch.equal(grid.decode(codes, params.columns(K)), values_of(rows, grid.kind))


@every_grid
def test_block_sizes_are_those_of_gguf(grid):
    kind = kinds.KINDS[grid.kind]
    assert (kind.columns, kind.size) == (grid.qblock, grid.row_bytes(grid.qblock))
    assert grid.bits_per_weight == 8 * kind.size / kind.columns
    with pytest.raises(ValueError, match=f"{grid.kind} stores {grid.qblock} columns together"):
        grid.row_bytes(K + 16)


def test_ggufs_own_quantizer_has_the_scales_of_the_plain_grid_but_for_its_carry_and_more_error():
    W_NK = torch.randn(64, K)
    theirs = gguf.quants.quantize(W_NK.numpy(), gguf.GGMLQuantizationType.MXFP4)
    _, params = Mxfp4().from_bytes(torch.from_numpy(theirs))
    largest = W_NK.unflatten(1, (-1, 32)).abs().amax(-1)
    carried = torch.frexp(largest).mantissa >= 0.875  # 1.75 of the power below
    assert torch.equal(params.stored + carried, Mxfp4().fit(W_NK).stored) and carried.any()
    errors = [(values_of(theirs, "MXFP4") - W_NK).norm()]
    errors += [(QTensor.rounded(W_NK, g).dequantize() - W_NK).norm() for g in (Mxfp4(), kinds.grid("MXFP4"))]
    assert errors[0] > errors[1] > errors[2]
