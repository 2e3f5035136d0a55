"""Rounded inputs: onnxruntime makes of a token the numbers that llmq and compressed-tensors make of it, bit for bit."""

import pytest
import torch
from _onnxruntime import OnnxModel

from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.onnx.graph import Graph
from llmq.onnx.inputs import rounded
from llmq.types import LlmqError, Params

K = 48


def run(folder, grid, x, fixed=None, unsigned=False):
    with Graph(folder, torch.float32) as graph:
        graph.input("input_ids", torch.float32, ["batch", "seq", K])
        graph.node("Identity", [rounded(graph, "input_ids", grid, fixed, K, "w", unsigned=unsigned)], "logits")
        graph.output("logits", torch.float32, ["batch", "seq", K])
        graph.save({"": 21}, 10)
    return OnnxModel(folder)(x)[0]


@pytest.mark.parametrize("sym", [True, False])
def test_a_scale_for_every_token(sym, tmp_path):
    x = torch.randn(2, 7, K, generator=torch.Generator().manual_seed(0)) + (0 if sym else 0.5)
    x[0, 3], x[1, 2] = 0, x[1, 2].abs()
    grid = Int(bits=8, sym=sym, group="channel")
    assert torch.equal(run(tmp_path, grid, x), grid.fake_quantize(x))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("zero", [128, 0, 77, 255])
def test_one_scale_and_zero_that_calibration_fixed(zero, unsigned, tmp_path):
    x = torch.randn(2, 7, K, generator=torch.Generator().manual_seed(0))
    grid = Int(bits=8, sym=zero == 128, group="tensor")
    fixed = Params(torch.tensor([0.013]), torch.tensor([zero], dtype=torch.int32))
    assert torch.equal(run(tmp_path, grid, x, fixed, unsigned), grid.fake_quantize(x, fixed))


@pytest.mark.parametrize(
    ("grid", "said"), [(Int(bits=4, group="channel"), "Int of 4 bits"), (Fp8(group="channel"), "Fp8 of 8 bits")]
)
def test_inputs_of_other_kinds_are_refused_by_name(grid, said, tmp_path):
    with pytest.raises(LlmqError, match=f"w: its input is {said}"):
        run(tmp_path, grid, torch.zeros(1, 1, K))


def test_a_static_input_without_its_scale_is_refused(tmp_path):
    with pytest.raises(LlmqError, match="w: a static input needs a scale"):
        run(tmp_path, Int(bits=8, group="tensor"), torch.zeros(1, 1, K))
