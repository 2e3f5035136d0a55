"""Floating-point arithmetic, per thread: float32, and float16 and bfloat16 alone or in pairs (`f16x2`, `bf16x2`).

Every result is the exact one rounded once. The `.approx` functions are computed exactly too: a GPU may be off by a few
units in the last place, so tests of what uses them need a tolerance anyway. `.ftz` makes subnormal inputs and results
of float32 zero. `min` and `max` prefer a number to NaN, unless `.NaN`.
Not here: comparison and selection (integer.py), conversions (convert.py), matrices (warp.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .integer import elementwise
from .machine import Action, Builder, Machine
from .program import Instruction, PtxError
from .scalars import TYPES, Array, Scalar, flush, fused_multiply_add, narrow, widen

Function = Callable[..., Array]

BINARY: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}
UNARY: dict[str, Function] = {
    "neg": np.negative,
    "abs": np.abs,
    "rcp": lambda a: 1.0 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


def _typed(ins: Instruction, name: str) -> tuple[Scalar, int]:
    """Return the element's type and how many a register holds."""
    pair = name.endswith("x2")
    scalar = TYPES[name.removesuffix("x2")]
    if pair and scalar.bits != 16:
        raise PtxError(f"{ins.where()}: no pairs of {name}")
    return scalar, 2 if pair else 1


def _action(ins: Instruction, match: re.Match[str], machine: Machine, f: Function, operands: int) -> Action:
    """Return an action that applies `f`, of float64 arrays, to operands of the matched type and rounds the result."""
    scalar, lanes = _typed(ins, match["type"])
    ftz = ".ftz" in ins.opcode
    if ftz and scalar.bits != 32:
        raise PtxError(f"{ins.where()}: .ftz is for float32")
    register = Scalar("b", 32) if lanes == 2 else scalar

    def apply(*values: Array) -> Array:
        if lanes == 2:
            values = tuple(np.ascontiguousarray(v).view(scalar.dtype) for v in values)
            values = tuple(np.broadcast_arrays(*(v.reshape(-1, 2) for v in values)))
        elif ftz:
            values = tuple(flush(v) for v in values)
        result = f(*(widen(v, scalar) for v in values))
        if result.dtype == np.float64:
            result = narrow(result, scalar)
        if ftz:
            result = flush(result)
        return np.ascontiguousarray(result).view(np.uint32).reshape(-1) if lanes == 2 else result

    return elementwise(ins, machine, [register] * operands, apply)


def binary(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`add.rn.f32`, `sub.f16x2`, `max.f32`, `div.full.f32`: float64 holds each exactly enough to round only once."""
    return _action(ins, match, machine, BINARY[match["op"]], 2)


def fused(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`fma.rn.f32 d, a, b, c`: rounded once."""
    scalar, _ = _typed(ins, match["type"])
    return _action(ins, match, machine, lambda a, b, c: fused_multiply_add(a, b, c, scalar), 3)


def unary(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`neg.f32`, `ex2.approx.ftz.f32`, ..."""
    return _action(ins, match, machine, UNARY[match["op"]], 1)


_ANY = r"(?P<type>f32|f16|bf16|f16x2|bf16x2)"

RULES: list[tuple[str, Builder]] = [
    (rf"(?P<op>add|sub|mul)(?:\.rn)?(?:\.ftz)?\.{_ANY}", binary),
    (rf"(?P<op>(?:min|max)(?:\.NaN)?)\.{_ANY}", binary),
    (rf"(?P<op>min|max)\.ftz\.{_ANY}", binary),
    (r"(?P<op>div)\.(?:rn|full|approx)(?:\.ftz)?\.(?P<type>f32)", binary),
    (rf"fma\.rn(?:\.ftz)?\.{_ANY}", fused),
    (rf"(?P<op>neg|abs)(?:\.ftz)?\.{_ANY}", unary),
    (r"(?P<op>rcp|sqrt|rsqrt|ex2|lg2|tanh|sin|cos)\.(?:approx|rn)(?:\.ftz)?\.(?P<type>f32)", unary),
]
