"""An activation quantized for a product of codes, a scale per token, in compressed-tensors' order of operations.

    x_scale = max|x| / 127.5          in x's dtype, eps of that dtype for a row of zeros
    x_q     = round(clamp(x / x_scale, -128, 127))          the quotient rounded to x's dtype, ties to even

A static scale (one per tensor, rounded to x's dtype) skips the maximum. To E4M3 it is max|x| / 448, as fp8.py says.

Beside it: `quantize_reference`, of int8; torch.compile is shown it too (int8.py).
Not here: the products (int8.py, fp8.py, grouped_int8.py); choosing static scales (calibration is llmq's).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.launch import OPTIONS, blank
from llmq_kernels.rounding import e4m3_code, round_even


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K] fp16, bf16 or float32
    q_ptr,  # [M, KP] int8, or with E4M3 uint8
    static_ptr,  # [1], read with STATIC
    scale_ptr,  # [M] float32, or with STATIC [1]; written
    K,
    KP,
    EPS: tl.constexpr,
    STATIC: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one token: its maximum, then its codes; columns from K to KP become 0.

    E4M3: whether codes are those of floats (fp8.py).
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if STATIC:
        scale = tl.load(static_ptr).to(dtype).to(tl.float32)
        tl.store(scale_ptr, scale, mask=row == 0)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0.0)
            top = tl.maximum(top, tl.abs(x.to(tl.float32)))
        scale = tl.div_rn(tl.max(top, 0), 448.0 if E4M3 else 127.5).to(dtype).to(tl.float32)
        scale = tl.where(scale == 0.0, EPS, scale)
        tl.store(scale_ptr + row, scale)
    for k in range(0, KP, BLOCK):
        x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0.0).to(tl.float32)
        ratio = tl.div_rn(x, tl.zeros_like(x) + scale).to(dtype).to(tl.float32)
        code = e4m3_code(ratio) if E4M3 else round_even(tl.minimum(tl.maximum(ratio, -128.0), 127.0))
        tl.store(q_ptr + row * KP + k + offs, code.to(q_ptr.dtype.element_ty), mask=k + offs < KP)


def quantize_reference(x: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 codes of `x` `[..., K]` and float32 scales `[M]` (or `[1]`), as `quantize_kernel` makes them."""
    scale = scale_reference(x, static, 127.5)
    q = (x / scale).clamp(-128, 127).round().to(torch.int8)
    return q, scale.reshape(-1).float()


def scale_reference(x: Tensor, static: Tensor | None, most: float) -> Tensor:
    """Return scales of `x` `[..., K]` in its dtype: `[..., 1]`, which take maxima to `most`, or the static `[1]`."""
    if static is not None:
        return static.reshape(1).to(x.dtype)
    top = x.abs().amax(-1, keepdim=True)
    scale = top / torch.full_like(top, most)  # by a number, torch multiplies with the reciprocal on a GPU
    return scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)


def quantize(x: Tensor, Kp: int, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the activation kernel on `x` `[..., K]`: int8 codes `[..., Kp]`, zeros beyond K, and float32 scales.

    The scales are `[M]`, of M tokens; or `[1]`, the static one rounded to x's dtype.
    """
    return Quantizing(x, Kp, is_static=static is not None)(x, static)


class Quantizing:
    """The launch of the activation kernel on activations of one shape; e4m3: to E4M3, whose bits are uint8."""

    def __init__(self, x: Tensor, Kp: int, *, is_static: bool, e4m3: bool = False) -> None:
        M, self.K, self.Kp, self.grid = x.shape[:-1].numel(), x.size(-1), Kp, (x.shape[:-1].numel(),)
        self.codes = blank((*x.shape[:-1], Kp), torch.uint8 if e4m3 else torch.int8, x.device)
        self.scales = blank((1 if is_static else M,), torch.float32, x.device)
        block = min(4096, triton.next_power_of_2(Kp))
        kind = {"EPS": torch.finfo(x.dtype).eps, "STATIC": is_static, "E4M3": e4m3}
        self.fixed = {**kind, "BLOCK": block, "num_warps": 4, **OPTIONS}

    def __call__(self, x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return codes and scales; see `quantize`."""
        q, scale = self.codes(), self.scales()
        if self.grid[0]:
            given = scale if static is None else static
            quantize_kernel[self.grid](x.contiguous(), q, given, scale, self.K, self.Kp, **self.fixed)
        return q, scale
