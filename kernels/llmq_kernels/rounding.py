"""Round to the nearest integer inside a kernel, the same on every GPU."""

import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it beside a kernel


@triton.jit
def round_even(x):
    """Round float32 below 2^22 half to even: what falls off when 1.5 * 2^23 is added and taken away."""
    return (x + 12582912.0) - 12582912.0
