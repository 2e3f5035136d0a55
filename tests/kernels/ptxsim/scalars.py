"""What the bits of a register mean: PTX's scalar types, and rounding that is right to the last bit.

Registers hold bits. Integers and float32 are numpy views of them; float16 and bfloat16 are computed in float64 and
rounded once at the end. Where a float64 sum is itself inexact (a fused multiply-add) it is rounded to odd first: a last
bit of 1 remembers that something was cut off, so that the second rounding cannot see a tie that is none
(Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
Not here: which instruction computes what (integer, floating, convert).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class Scalar:
    """A PTX type. kind: `u`, `s` integers, `b` bits, `f` IEEE float, `bf` bfloat16, `pred`."""

    kind: str
    bits: int

    @property
    def dtype(self) -> type:
        """The numpy type of one value's bits; bfloat16, which numpy lacks, stays raw."""
        if self.kind == "pred":
            return np.bool_
        if self.kind == "f":
            return {16: np.float16, 32: np.float32, 64: np.float64}[self.bits]
        return SIGNED[self.bits] if self.kind == "s" else UNSIGNED[self.bits]

    @property
    def is_float(self) -> bool:
        """Whether values of this type have a fraction."""
        return self.kind in ("f", "bf")


TYPES = {f"{kind}{bits}": Scalar(kind, bits) for kind in "usb" for bits in (8, 16, 32, 64)} | {
    "f16": Scalar("f", 16),
    "f32": Scalar("f", 32),
    "bf16": Scalar("bf", 16),
    "pred": Scalar("pred", 1),
}


def widen(values: Array, scalar: Scalar) -> Array:
    """Return values of any type as float64, exactly (64-bit integers excepted, which round)."""
    if scalar.kind == "bf":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def narrow(values: Array, scalar: Scalar) -> Array:
    """Round float64 to the nearest value of a float type, ties to even; bfloat16 comes back as raw bits."""
    if scalar.kind != "bf":
        return values.astype(scalar.dtype)
    single = values.astype(np.float32)
    if (single != values).any():
        single = to_odd(single, values)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_odd(rounded: Array, exact: Array) -> Array:
    """Turn a float rounded to nearest into the one rounded to odd; `exact` only tells on which side the truth lies."""
    bits = rounded.view(UNSIGNED[rounded.itemsize * 8])
    even = (bits & bits.dtype.type(1)) == 0
    low, high = exact < rounded, exact > rounded
    down = np.nextafter(rounded, rounded.dtype.type(-np.inf))
    up = np.nextafter(rounded, rounded.dtype.type(np.inf))
    return np.where(even & low, down, np.where(even & high, up, rounded))


def fused_multiply_add(a: Array, b: Array, c: Array, scalar: Scalar) -> Array:
    """Return a * b + c of float64 values that came from `scalar`, rounded once to it.

    The product of two float32 is exact in float64; the sum's error is recovered exactly (Knuth's two-sum).
    """
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    if not error.any():
        return narrow(total, scalar)
    odd = to_odd(total, np.where(np.isfinite(error) & (error != 0), total + np.sign(error) * np.inf, total))
    return narrow(odd, scalar)


def flush(values: Array) -> Array:
    """Return float32 values with subnormals replaced by a zero of their sign (`.ftz`)."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values).astype(np.float32)


def to_integer(values: Array, scalar: Scalar) -> Array:
    """Return integral float64 values as integers of a type: clamped to its range, NaN as 0 (`cvt` from float)."""
    limits = np.iinfo(scalar.dtype)
    clean = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=-np.inf)
    if scalar.bits == 64:  # the upper limit is no float64: 2**63 and up must be clamped by hand
        over = clean >= float(limits.max)
        inside = np.where(over, 0.0, np.maximum(clean, float(limits.min)))
        return np.where(over, limits.max, inside.astype(scalar.dtype)).astype(scalar.dtype)
    return np.clip(clean, limits.min, limits.max).astype(scalar.dtype)
