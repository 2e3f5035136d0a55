"""`cvt`: between integers of any width, float32, float16, bfloat16 and pairs of the last two.

Float to integer rounds as the modifier says and clamps to the range (NaN is 0). Integer to integer takes the low bits,
or clamps with `.sat`. A result narrower than its register is extended by its own sign. Source: PTX ISA, `cvt`.
Not here: reinterpreting bits (`mov`, integer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .integer import elementwise
from .machine import Action, Builder, Machine
from .program import Instruction, PtxError
from .scalars import TYPES, Array, Scalar, flush, narrow, to_integer, widen

Function = Callable[[Array], Array]

INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cvt.rn.f16.f32 d, a` and its kin. Raises PtxError for a rounding that this pair of types does not have."""
    to, origin, mode, sat = TYPES[match["to"]], TYPES[match["from"]], match["mode"], bool(match["sat"])
    pair = {
        (False, False): _integers,
        (True, False): _to_integer,
        (False, True): _to_float,
        (True, True): _floats,
    }[origin.is_float, to.is_float]
    f = pair(ins, to, origin, mode, sat)
    if not match["ftz"]:
        return elementwise(ins, machine, [origin], f)
    if TYPES["f32"] not in (to, origin):
        raise PtxError(f"{ins.where()}: .ftz is for float32")
    return elementwise(ins, machine, [origin], lambda a: _flushed(f(_flushed(a, origin)), to))


def _flushed(values: Array, scalar: Scalar) -> Array:
    return flush(values) if scalar == TYPES["f32"] else values


def _integers(ins: Instruction, to: Scalar, origin: Scalar, mode: str | None, sat: bool) -> Function:
    if mode:
        raise PtxError(f"{ins.where()}: .{mode} between integers")
    if sat:
        low, high = _common(np.iinfo(to.dtype), np.iinfo(origin.dtype))
        return lambda a: np.clip(a, low, high).astype(to.dtype)
    return lambda a: a.astype(to.dtype)


def _to_integer(ins: Instruction, to: Scalar, origin: Scalar, mode: str | None, sat: bool) -> Function:
    if mode not in INTEGRAL:
        raise PtxError(f"{ins.where()}: float to integer needs .rni, .rzi, .rmi or .rpi")
    return lambda a: to_integer(INTEGRAL[mode](widen(a, origin)), to)  # clamps with .sat or without


def _to_float(ins: Instruction, to: Scalar, origin: Scalar, mode: str | None, sat: bool) -> Function:
    if mode != "rn" or sat:
        raise PtxError(f"{ins.where()}: integer to float is known with .rn alone")
    if to.bits == 32:
        return lambda a: a.astype(np.float32)
    if origin.bits == 64:
        raise PtxError(f"{ins.where()}: 64-bit integer to a 16-bit float is not known")
    return lambda a: narrow(widen(a, origin), to)


def _floats(ins: Instruction, to: Scalar, origin: Scalar, mode: str | None, sat: bool) -> Function:
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
