"""Convolutions of 8 bits: onnxruntime computes what torch does with the decoded kernel."""

import numpy as np
import onnxruntime
import pytest
import torch

from llmq.grids.int import Int
from llmq.onnx.convolution import convolution
from llmq.onnx.graph import Graph, checked
from llmq.types import LlmqError, QTensor


def solved(grid, N=6, K=5 * 9):
    return QTensor.rounded(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), grid)


@pytest.mark.parametrize(("size", "stride", "pad"), [((3, 3), 1, 1), ((3, 3), 2, 0), ((1, 9), 1, 4)])
@pytest.mark.parametrize("restricted", [False, True])
def test_a_convolution_is_that_of_the_decoded_kernel(size, stride, pad, restricted, tmp_path):
    q = solved(Int(bits=8, group="channel", restricted=restricted, scale_dtype=torch.float32))
    bias = torch.linspace(-1, 1, 6)
    with Graph(tmp_path, torch.float32) as graph:
        x = graph.input("x", torch.float32, ["batch", 5, 11, 11])
        y = convolution(graph, x, q, bias, size, "y", stride, pad)
        graph.output(y, torch.float32, ["batch", 6, "h", "w"])
        graph.save({"": 21}, 10)
    checked(tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    given = torch.randn(2, 5, 11, 11, generator=torch.Generator().manual_seed(1))
    (got,) = session.run(None, {"x": given.numpy()})
    kernel = q.dequantize().reshape(6, 5, *size)
    want = torch.nn.functional.conv2d(given, kernel, bias, stride, pad)
    assert np.abs(got - want.numpy()).max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    "grid",
    [Int(bits=4, group="channel"), Int(bits=8, group=15), Int(bits=8, group="tensor"), Int(8, sym=False, group=-1)],
)
def test_other_kernels_are_refused_by_name(grid, tmp_path):
    with Graph(tmp_path, torch.float32) as graph, pytest.raises(LlmqError, match="^y: the kernel of a convolution"):
        convolution(graph, "x", solved(grid), torch.zeros(6), (3, 3), "y")
