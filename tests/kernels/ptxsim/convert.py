"""`cvt`: between integers of any width, float32, float16, bfloat16 and pairs of the last two.

Float to integer rounds as the modifier says and clamps to the range (NaN is 0). Integer to integer takes the low bits,
or clamps with `.sat`. A result narrower than its register is extended by its own sign. Source: PTX ISA, `cvt`.
Not here: reinterpreting bits (`mov`, integer.py).
"""

from __future__ import annotations

import re

import numpy as np

from .integer import elementwise
from .machine import Action, Builder, Machine
from .program import Instruction, PtxError
from .scalars import TYPES, Array, Scalar, flush, narrow, to_integer, widen

INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cvt.rn.f16.f32 d, a` and its kin."""
    to, origin, mode = TYPES[match["to"]], TYPES[match["from"]], match["mode"]
    f = _function(ins, to, origin, mode, bool(match["sat"]))
    if match["ftz"]:
        if "f32" not in (match["to"], match["from"]):
            raise PtxError(f"{ins.where()}: .ftz is for float32")
        inner = f
        f = lambda a: _flushed(inner(_flushed(a, origin)), to)  # noqa: E731, a wrapper of one expression
    return elementwise(ins, machine, [origin], f)


def _flushed(values: Array, scalar: Scalar) -> Array:
    return flush(values) if scalar == TYPES["f32"] else values


def _function(ins: Instruction, to: Scalar, origin: Scalar, mode: str | None, sat: bool):  # noqa: ANN202
    """Return the conversion. Raises PtxError for a rounding mode that this pair of types does not have."""
    if not to.is_float:
        limits = np.iinfo(to.dtype)
        if origin.is_float:
            if mode not in INTEGRAL:
                raise PtxError(f"{ins.where()}: float to integer needs .rni, .rzi, .rmi or .rpi")
            return lambda a: to_integer(INTEGRAL[mode](widen(a, origin)), to)
        if mode:
            raise PtxError(f"{ins.where()}: .{mode} between integers")
        if sat:
            return lambda a: np.clip(a, *_common(limits, np.iinfo(a.dtype))).astype(to.dtype)
        return lambda a: a.astype(to.dtype)
    if not origin.is_float:
        if mode != "rn":
            raise PtxError(f"{ins.where()}: integer to float is known with .rn only")
        if to.bits == 32:
            return lambda a: a.astype(np.float32)
        if origin.bits == 64:
            raise PtxError(f"{ins.where()}: 64-bit integer to a 16-bit float is not known")
        return lambda a: narrow(widen(a, origin), to)
    lossy = to.bits < origin.bits or (to.bits == origin.bits and to.kind != origin.kind)
    if mode in INTEGRAL:
        return lambda a: narrow(_clamped(INTEGRAL[mode](widen(a, origin)), sat), to)
    if mode != ("rn" if lossy else None):
        raise PtxError(f"{ins.where()}: rounding .{mode} of this pair is not known")
    return lambda a: narrow(_clamped(widen(a, origin), sat), to)


def _common(a: np.iinfo, b: np.iinfo) -> tuple[int, int]:
    return max(a.min, b.min), min(a.max, b.max)


def _clamped(values: Array, sat: bool) -> Array:
    return np.clip(np.nan_to_num(values, nan=0.0), 0.0, 1.0) if sat else values


def convert_pair(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cvt.rn.f16x2.f32 d, high, low`: two float32 to a pair; the first operand is the upper half."""
    scalar = TYPES[match["to"]]

    def f(high: Array, low: Array) -> Array:
        halves = [narrow(widen(v, TYPES["f32"]), scalar).view(np.uint16).astype(np.uint32) for v in (high, low)]
        return halves[0] << np.uint32(16) | halves[1]

    return elementwise(ins, machine, [TYPES["f32"]] * 2, f)


_INTEGER = r"[su](?:8|16|32|64)"
_ANY = rf"{_INTEGER}|f16|bf16|f32"

RULES: list[tuple[str, Builder]] = [
    (r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32", convert_pair),
    (
        rf"cvt(?:\.(?P<mode>rn|rni|rzi|rmi|rpi))?(?P<ftz>\.ftz)?(?P<sat>\.sat)?\.(?P<to>{_ANY})\.(?P<from>{_ANY})",
        convert,
    ),
]
