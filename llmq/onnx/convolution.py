"""A convolution of 8 bits as nodes: Conv between an input that was rounded and a kernel that is decoded.

    x -> QuantizeLinear -> DequantizeLinear ----.
    codes [N, C, h, w] -> DequantizeLinear ------+--> Conv -> y

That is the form in which TensorRT, OpenVINO, QNN and onnxruntime look for a convolution of integers. A kernel is a
weight like any other, `[N, C * h * w]`, with a scale for each output channel; its bias stays float.
Source: onnx docs/Operators.md (Conv, DequantizeLinear).
Not here: the rounding of the input, which all that read it share (inputs.py); the net (docs/learn, chapter 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmq.granularity import PerRow
from llmq.onnx.graph import Graph
from llmq.types import AffineGrid, LlmqError, Params, QTensor


def convolution(  # noqa: PLR0913, PLR0917, what Conv is given
    graph: Graph, x: str, kernel: QTensor, bias: Tensor, size: Sequence[int], name: str, stride: int = 1, pad: int = 0
) -> str:
    """Add a convolution of a rounded x `[batch, C, height, width]`. Returns the name of what it gives, also `name`.

    kernel: `[N, C * h * w]`, symmetric, of 8 bits, per channel; LlmqError for any other. bias: `[N]`. size: h and w.
    """
    grid = kernel.grid
    if not isinstance(grid, AffineGrid) or not grid.sym or grid.bits != 8 or not isinstance(grid.granularity, PerRow):
        raise LlmqError(f"{name}: the kernel of a convolution is written symmetric, of 8 bits, with a scale a channel")
    inputs = [x, _decoded(graph, kernel, size, name), graph.constant(f"{name}.bias", bias.to(graph.io))]
    return graph.node("Conv", inputs, name, strides=[stride] * 2, pads=[pad] * 4)


def _decoded(graph: Graph, kernel: QTensor, size: Sequence[int], name: str) -> str:
    N, K = kernel.codes.shape
    h, w = size
    codes = (kernel.codes.to(torch.int16) - 128).to(torch.int8).reshape(N, K // (h * w), h, w)
    inputs = [
        graph.constant(f"{name}.codes", codes),
        graph.constant(f"{name}.scales", Params.of(kernel.params).scale[:, 0].to(graph.io)),
        graph.constant(f"{name}.zeros", torch.zeros(N, dtype=torch.int8)),
    ]
    return graph.node("DequantizeLinear", inputs, f"{name}.decoded", axis=0)
