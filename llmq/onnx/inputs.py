"""Inputs of 8 bits as a pair of nodes: QuantizeLinear rounds, DequantizeLinear decodes, a runtime joins what follows.

    static          one scale and zero, fixed by calibration; int8 (zero 0 where the grid is symmetric), or uint8
    per token       max|x| / 127.5 of a token; int8, zero 0
    ... asymmetric  (max - min) / 255 and a zero of each token; uint8

Scales per token are blocks of one row: the same arithmetic as grids/int.py, in the dtype of the graph.
Not here: the products (dialect.py).
"""

from __future__ import annotations

import torch

from llmq.granularity import PerRow, PerTensor
from llmq.onnx.graph import Graph
from llmq.types import AffineGrid, LlmqError, Parameters, Params, RangedGrid

_WIDE = 255.0  # steps of 8 bits


def require_rounded(grid: RangedGrid, name: str) -> None:
    """Raise LlmqError for a grid of other than 8 bits, per tensor or per token, or that is no integer one."""
    if not isinstance(grid, AffineGrid) or grid.bits != 8 or not isinstance(grid.granularity, PerRow | PerTensor):
        raise LlmqError(
            f"{name}: its input is {type(grid).__name__} of {grid.bits} bits, {grid.granularity}; QuantizeLinear is "
            "written for integers of 8 bits, per tensor or per token"
        )


def rounded(
    graph: Graph, x: str, grid: RangedGrid, fixed: Parameters | None, K: int, name: str, *, unsigned: bool = False
) -> str:
    """Return x `[batch, seq, K]` as a runtime with 8-bit inputs sees it; where the grid is static, x of any shape.

    fixed: what calibration fixed. unsigned: whether static codes are uint8, as the products of x86 want them; TensorRT
    wants int8 and a zero of 0. Raises LlmqError as `require_rounded`, and for a static grid without its scale.
    """
    require_rounded(grid, name)
    if grid.static:
        return _pair(graph, x, _fixed(graph, fixed, name, unsigned), name)
    made = _symmetric(graph, x, name) if grid.sym else _asymmetric(graph, x, name)
    return _pair(graph, x, made, name, axis=2, block_size=K)


def _pair(graph: Graph, x: str, by: list[str], name: str, **attributes: int) -> str:
    codes = graph.node("QuantizeLinear", [x, *by], f"{name}.input_codes", **attributes)
    return graph.node("DequantizeLinear", [codes, *by], f"{name}.input_rounded", **attributes)


def _fixed(graph: Graph, fixed: Parameters | None, name: str, unsigned: bool) -> list[str]:
    """Return the scale and zero that calibration chose."""
    if fixed is None:
        raise LlmqError(f"{name}: a static input needs a scale that calibration chose")
    own, zero = fixed.scale.reshape(()).to(graph.io), Params.of(fixed).zero.reshape(())
    if not own:
        raise LlmqError(f"{name}: the scale of its input is 0 in {graph.io}; say --to onnx:io=float32")
    zero = zero.to(torch.uint8) if unsigned else (zero - 128).to(torch.int8)
    return [graph.constant(f"{name}.input_scale", own), graph.constant(f"{name}.input_zero", zero)]


def _symmetric(graph: Graph, x: str, name: str) -> list[str]:
    """Return the scale and zero of each token."""
    most = graph.node("ReduceMax", [graph.node("Abs", [x], f"{name}.abs"), graph.numbers("last", -1)], f"{name}.most")
    scale = _not_zero(graph, graph.node("Div", [most, graph.scalar("half_wide", _WIDE / 2)], f"{name}.step"), name)
    return [scale, graph.node("Cast", [graph.node("Mul", [scale, _zero(graph)], f"{name}.none")], f"{name}.zero", to=3)]


def _asymmetric(graph: Graph, x: str, name: str) -> list[str]:
    """Return the scale and zero of each token, the zero as the unsigned code of 0."""
    last, zero = graph.numbers("last", -1), _zero(graph)
    high = graph.node("Max", [graph.node("ReduceMax", [x, last], f"{name}.most"), zero], f"{name}.high")
    low = graph.node("Min", [graph.node("ReduceMin", [x, last], f"{name}.least"), zero], f"{name}.low")
    reach = graph.node("Sub", [high, low], f"{name}.reach")
    scale = _not_zero(graph, graph.node("Div", [reach, graph.scalar("wide", _WIDE)], f"{name}.step"), name)
    below = graph.node("Neg", [graph.node("Div", [low, scale], f"{name}.below")], f"{name}.exact_zero")
    return [scale, graph.node("Cast", [graph.node("Round", [below], f"{name}.whole_zero")], f"{name}.zero", to=2)]


def _not_zero(graph: Graph, scale: str, name: str) -> str:
    """Return scales in which that of a token of zeros is the dtype's epsilon."""
    eps = graph.scalar("epsilon", torch.finfo(graph.io).eps)
    return graph.node(
        "Where", [graph.node("Equal", [scale, _zero(graph)], f"{name}.still"), eps, scale], f"{name}.scale"
    )


def _zero(graph: Graph) -> str:
    return graph.scalar("zero", 0.0)
