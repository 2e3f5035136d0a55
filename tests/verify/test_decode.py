"""Decoding by numpy: peers' files to the weights that peers computed with, ours to the codes that were packed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import Source
from llmq.formats.awq import AWQ
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.model.forward import Forward
from llmq.types import LinearSpec, Params, QTensor, Scheme
from llmq.verify.decode import decode
from llmq.verify.folder import Folder
from llmq.verify.forward import predicted
from llmq.verify.packing import packing
from llmq.verify.report import Report

GOLDEN = Path(__file__).parents[1] / "golden"
READERS_ERROR = 2e-3  # gptqmodel's kernels round decoded weights to float16; scales of bfloat16 do the rest
ACTIVATIONS_ERROR = {  # of inputs rounded to 8 or 4 bits, which are the runtime's, and not in the file
    "ct_int_w8a8_dynamic": 6e-2, "ct_int_w8a8_static": 6e-2, "ct_fp8_dynamic": 0.12, "ct_fp8_static": 0.12,
    "ct_fp8_block": 0.12, "ct_mixed_floats": 0.12, "ct_nvfp4": 0.3, "ct_mxfp4": 0.4,
}  # fmt: skip


def solved(N, K, grid, seed=0):
    """Return a random QTensor on a grid: every code and, where it has zeros, every zero occurs."""
    draw = torch.Generator().manual_seed(seed)
    G, top = grid.granularity.groups(K), 2**grid.bits
    rows = grid.granularity.rows(N)
    scale = (torch.rand(rows, G, generator=draw) + 0.5).half().expand(N, G).contiguous()
    zero = torch.full((N, G), top // 2, dtype=torch.int32)
    if not grid.sym:
        zero = torch.randint(top, (rows, G), generator=draw, dtype=torch.int32).expand(N, G).contiguous()
    codes = torch.randint(top, (N, K), generator=draw, dtype=torch.int64).to(torch.uint8)
    return QTensor(codes, Params(scale, zero), grid)


def decoded(fmt, q, name="model.layers.0.mlp.up_proj"):
    """Pack by llmq's format, decode by verify's."""
    N, K = q.codes.shape
    spec = LinearSpec(name, N, K, Scheme(q.grid))
    tensors = {k: t.float().numpy() if t.is_floating_point() else t.numpy() for k, t in fmt.pack(q, spec).items()}
    how = packing(fmt.config([spec], []))(name)
    if "g_idx" in tensors and q.g_idx is None:
        tensors.pop("g_idx")
    return decode(tensors, how, N, K)


CASES = [
    *((GPTQ("gptq"), Int(bits, True, group)) for bits in (2, 3, 4, 8) for group in (32, "channel")),
    *((GPTQ("gptq_v2"), Int(bits, False, 32)) for bits in (2, 3, 4, 8)),
    (AWQ(), Int(4, False, 32)),
    (AWQ(), Int(4, True, "channel")),
    *((CompressedTensors(), Int(bits, False, 32)) for bits in range(2, 9)),
    (CompressedTensors(), Int(4, False, "tensor")),
]


@pytest.mark.parametrize(
    ("fmt", "grid"), CASES, ids=lambda x: type(x).__name__ if not isinstance(x, Int) else str(x.bits)
)
def test_what_is_packed_comes_back(fmt, grid):
    q = solved(64, 96, grid)
    weight = decoded(fmt, q)
    params = q.params.map(lambda p: p[: grid.granularity.rows(len(p))])
    assert np.array_equal(weight.codes, q.codes.numpy())
    assert np.array_equal(weight.scale, params.scale.float().numpy())
    assert np.array_equal(weight.zero, params.zero.numpy())
    assert np.array_equal(weight.values(), q.dequantize().numpy())
    assert weight.stray == 0


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_that_end_within_a_word(bits):
    q = solved(13, 45, Int(bits, False, 15))
    weight = decoded(CompressedTensors(), q)
    assert np.array_equal(weight.codes, q.codes.numpy()) and np.array_equal(weight.zero, q.params.zero.numpy())


def test_a_v1_zero_of_nought_borrows_from_its_neighbour_and_comes_back():
    words = np.array([[0x32107654 - 0x11111111]], np.uint32).view(np.int32)  # fields 4 5 6 7 0 1 2 3, lowest first
    how = packing({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False})("a.0.b")
    stored = {"qweight": np.zeros((4, 8), np.int32), "qzeros": words, "scales": np.ones((1, 8), np.float32)}
    assert decode(stored, how, 8, 32).zero[:, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_columns_in_activation_order_take_the_scale_of_their_group():
    q = solved(32, 64, Int(4, True, 32))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32) % 2
    q = QTensor(q.codes, q.params, q.grid, order)
    assert np.array_equal(decoded(GPTQ("gptq", desc_act=True), q).values(), q.dequantize().numpy())


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in GOLDEN.glob("*/logits.safetensors")))
def test_peers_files_give_the_logits_that_peers_computed(folder):
    """The whole way, by no code of llmq/formats: config, bits, scales, and the blocks in order."""
    expected = load_file(GOLDEN / folder / "logits.safetensors")
    found = Folder(Source(GOLDEN / folder), {}, Report())
    forward = Forward(found.skeleton, [expected["input_ids"]], torch.device("cpu"))
    for i in range(len(found.skeleton)):
        forward.step(i)
    error = (predicted(forward) - expected["logits"][0]).norm() / expected["logits"].norm()
    assert error < ACTIVATIONS_ERROR.get(folder, READERS_ERROR)
