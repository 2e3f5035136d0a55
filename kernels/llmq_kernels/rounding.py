"""Round to the nearest integer, or E4M3 value, inside a kernel, the same on every GPU."""

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """Round float32 below 2^22 half to even: what falls off when 1.5 * 2^23 is added and taken away."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_code(x):
    """Return the bits of the E4M3 value nearest to float32 x, ties to even; beyond 448 it is 448. int32.

    Without the conversions of sm_89 and later. Below 2^-6 values are whole multiples of 2^-9; from there on a float32
    loses 20 bits of its fraction, and 120 of its exponent's bias.
    """
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0.015625, round_even(size * 512.0).to(tl.int32), normal)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
