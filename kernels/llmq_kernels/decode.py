"""Integer codes to floats in memory: W = scale * (code - zero), for many tokens (dense.py).

A program decodes ROWS rows of one tile of the layout (layout.py). `code - zero` is an exact fp16 integer (dequant.py);
it is multiplied by the scale in float32 and rounded once to the dtype of `out`: the bits of `layout.dequantize(w)`
rounded to it. Columns are those of the packed order, which act-order sorts.

Not here: E2M1 (e2m1.py), the product that decodes in registers (weight_only.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.dense import ROWS
from llmq_kernels.dequant import field_minus_zero, fields_of, group_run, scale_of, zero_field, zero_of, zeros_beside
from llmq_kernels.launch import OPTIONS, cdiv, uses_asm
from llmq_kernels.layout import PackedWeight, sub_rows, tile


@triton.jit(do_not_specialize=["FIRST", "N"])
def decode_kernel(
    w_ptr,  # [K * BITS / 16, NP] int16, and of every tile a row of zeros where params are floats beside zeros
    param_ptr,  # [K / GROUP, NP] int32, or floats
    out_ptr,  # [N, K] fp16, bf16 or float32: the rows of W from FIRST on
    FIRST,
    N,
    NP,
    K,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
):
    """Decode BN rows of one tile of columns, rounded once. NP is padded; N and K are not."""
    COUNT: tl.constexpr = fields_of(BITS)
    BESIDE: tl.constexpr = zeros_beside(HAS_ZERO, param_ptr.dtype.element_ty)
    CODE_ROWS: tl.constexpr = SUB * COUNT * BITS // 16
    RUN: tl.constexpr = group_run(GROUP, SUB, COUNT)
    t = tl.program_id(1)
    offs_n, offs_r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, SUB)
    w_ptrs = w_ptr + (t * (CODE_ROWS + BESIDE) + offs_r)[None, :] * NP + (FIRST + offs_n)[:, None]
    w = tl.load(w_ptrs)
    w1, w2 = w, w
    if BITS == 3:
        w1 = tl.load(w_ptrs + SUB * NP)
        w2 = tl.load(w_ptrs + 2 * SUB * NP)
    if BESIDE:
        zeros = tl.load(w_ptr + (t * (CODE_ROWS + 1) + CODE_ROWS) * NP + FIRST + offs_n)
    for first in tl.static_range(0, COUNT, RUN):
        if GROUP == 0:
            word = tl.load(param_ptr + FIRST + offs_n)
        else:
            word = tl.load(param_ptr + (t * COUNT + first) * SUB // GROUP * NP + FIRST + offs_n)
        z = None
        if BESIDE:  # in one row of a thread there is no pair for assembly
            z = zero_field(zeros, first, BITS)[:, None]
        elif HAS_ZERO:
            z = zero_of(word)[:, None]
        for j in tl.static_range(first, first + RUN):
            a = field_minus_zero(w, w1, w2, z, j, BITS, False, tl.float16, ASM)
            values = a.to(tl.float32) * scale_of(word, HAS_ZERO)[:, None]
            offs_k = (t * COUNT + j) * SUB + offs_r
            at = out_ptr + offs_n[:, None] * K + offs_k[None, :]
            tl.store(at, values.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def decode(w: PackedWeight, out: Tensor, first: int) -> None:
    """Fill `out` `[rows, K]`, fp16, bf16 or float32, with the rows of W from `first` on, a multiple of ROWS."""
    decode_kernel[cdiv(len(out), ROWS), cdiv(w.K, tile(w.bits, w.group))](
        w.words, w.params, out, first, len(out), w.words.stride(0), w.K, **constants(w), **OPTIONS
    )


def constants(w: PackedWeight, *, asm: bool | None = None) -> dict:
    """Return the compile-time arguments of the kernel for a weight."""
    found = {"BITS": w.bits, "SUB": sub_rows(w.bits, w.group), "GROUP": w.group, "HAS_ZERO": w.has_zero, "BN": ROWS}
    return found | {"ASM": uses_asm() if asm is None else asm}
