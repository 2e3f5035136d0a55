"""Weight-only linear: y = x @ W^T (+ bias) with W = scale * (code - zero) in 2, 3, 4 or 8 bits, x in fp16 or bf16.

One program makes a tile [BN, BM] of y^T over a contiguous run of K tiles (layout.py). Per tile:

    words [BN, SUB] -> field j -> code - zero, exact in x's dtype       in registers, dequant.py
    part += (code - zero) @ x[:, j * SUB + r]^T                         tensor cores, float32
    acc  += scale * part                                                once per group

The weights are the first operand, which tensor cores take 16 features tall: the second needs 8 tokens only, so decode
multiplies, and scales, half as many sums that nobody asked for as with the tokens first.
Scaling the float32 accumulator instead of the weights costs one multiply per group and output, and is more exact.
Padding of K and N keeps the divisibility hints without which Triton drops every async copy.

Many tokens may be the library's, which the tuner says (dense.py).
Beside it: `reference`, what the kernel must equal; it is also what the op does with CPU tensors, exact and slow.
Not here: the layout (layout.py), W8A8 (int8.py), float32, splits of K and what is launched (product.py).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import dense, tune
from llmq_kernels.decode import decode
from llmq_kernels.dequant import field_minus_zero, fields_of, group_run, scale_of, zero_of, zeros_beside
from llmq_kernels.launch import cdiv, direct, has_warp_groups, operator, uses_asm
from llmq_kernels.layout import N_MULTIPLE, REVISION, PackedWeight, dequantize, sub_rows, tile
from llmq_kernels.product import FEW, Call, Kernel, Launches, check_activation, multiplied


@triton.jit
def sums(
    x_ptrs,  # [SUB, BM], of the activations at the first of these tiles; fp16 or bf16
    x_mask,  # [1, BM]
    w_ptrs,  # [BN, SUB], of the words there
    zero_ptr,  # of the zeros of the first of all tiles, where params are floats
    param_ptr,
    offs_n,
    NP,
    begin,
    end,
    dtype: tl.constexpr,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the float32 sums `[BN, BM]` of the tiles of K from `begin` to before `end`, scaled."""
    COUNT: tl.constexpr = fields_of(BITS)
    BK: tl.constexpr = SUB * COUNT
    RUN: tl.constexpr = group_run(GROUP, SUB, COUNT)
    BESIDE: tl.constexpr = zeros_beside(HAS_ZERO, param_ptr.dtype.element_ty)
    ROWS: tl.constexpr = BK * BITS // 16 + BESIDE
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if GROUP == 0:
        word = tl.load(param_ptr + offs_n)
    for t in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(w_ptrs)
        w1, w2 = w, w
        if BITS == 3:
            w1 = tl.load(w_ptrs + SUB * NP)
            w2 = tl.load(w_ptrs + 2 * SUB * NP)
        z = None
        if BESIDE:
            z = tl.load(zero_ptr + t * ROWS * NP + offs_n)
        for first in tl.static_range(0, COUNT, RUN):
            if GROUP == 0:
                part = acc
            else:
                part = tl.zeros((BN, BM), dtype=tl.float32)
                word = tl.load(param_ptr + (t * BK + first * SUB) // GROUP * NP + offs_n)
            if HAS_ZERO and not BESIDE:
                z = zero_of(word)[:, None]
            for j in tl.static_range(first, first + RUN):
                x = tl.load(x_ptrs + j * SUB, mask=x_mask, other=0.0)
                a = field_minus_zero(w, w1, w2, z, j, BITS, BESIDE, dtype, ASM)
                part = tl.dot(a, x, part)
            if GROUP == 0:
                acc = part
            else:
                acc += part * scale_of(word, HAS_ZERO)[:, None]
        x_ptrs += BK
        w_ptrs += ROWS * NP
    if GROUP == 0:
        acc *= scale_of(word, HAS_ZERO)[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x_ptr,  # [M, K] fp16 or bf16
    w_ptr,  # [K * BITS / 16, NP] int16, and of every tile a row of zeros where params are floats beside zeros
    param_ptr,  # [K / GROUP, NP] int32, or floats
    bias_ptr,  # [N], in x's dtype, if HAS_BIAS
    y_ptr,  # [M, N] in x's dtype or float32, or partials [SPLIT_K, M, N] float32
    M,
    N,
    NP,
    K,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of y, or of one split's partial. K and NP are padded; N is not."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BK: tl.constexpr = SUB * fields_of(BITS)
    ROWS: tl.constexpr = BK * BITS // 16 + zeros_beside(HAS_ZERO, param_ptr.dtype.element_ty)
    # M tiles run fastest: neighbouring programs read the same words.
    m_tiles = tl.cdiv(M, BM)
    offs_m = tl.program_id(0) % m_tiles * BM + tl.arange(0, BM)
    offs_n = tl.program_id(0) // m_tiles * BN + tl.arange(0, BN)
    offs_r = tl.arange(0, SUB)
    split = tl.program_id(1)
    tiles = K // BK
    per_split = tl.cdiv(tiles, SPLIT_K)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tiles)

    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * K + (begin * BK + offs_r)[:, None]
    x_mask = offs_m[None, :] < M
    w_ptrs = w_ptr + (begin * ROWS + offs_r)[None, :] * NP + offs_n[:, None]
    acc = sums(
        x_ptrs, x_mask, w_ptrs, w_ptr + BK * BITS // 16 * NP, param_ptr, offs_n, NP, begin, end, dtype,
        BITS, SUB, GROUP, HAS_ZERO, ASM, BM, BN, STAGES,
    )  # fmt: skip
    if HAS_BIAS and SPLIT_K == 1:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=x_mask & (offs_n[:, None] < N))


def reference(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` computed in float32 and rounded once to the dtype of x."""
    if not x.numel():  # an expert without tokens decodes nothing
        return x.new_zeros(*x.shape[:-1], w.N)
    x32 = x.float() if w.order is None else x[..., w.order].float()
    return F.linear(x32, dequantize(w), None if bias is None else bias.float()).to(x.dtype)


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32; any float on the CPU) to `[..., N]` in its dtype; bias `[N]`.

    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    if direct(x):
        return compute(x, w, bias)
    return torch.ops.llmq.weight_only_linear(x, w.words, w.params, w.order, bias, *w.shape)


def compute(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See `linear`: what the operator does."""
    return multiplied(x, w, bias, _KERNEL)


@operator("llmq::weight_only_linear")
def _op(
    x: Tensor,
    words: Tensor,
    params: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group: int,
    has_zero: bool,
) -> Tensor:
    return compute(x, PackedWeight(words, params, order, n, k, bits, group, has_zero), bias)


@torch.library.register_fake("llmq::weight_only_linear")
def _(x, words, params, order, bias, n, k, bits, group, has_zero):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


def configs(M: int, w: PackedWeight, *, asm: bool | None = None, groups: bool | None = None) -> list[tune.Config]:
    """Return the configurations worth trying for M tokens, the safest guess first.

    From 33 tokens on the library is one of them, from 513 the first: every tile of tokens decodes the weight anew.
    asm: as for `constants`. AMD's matrix instructions take no fewer than 16 tokens, and its shared memory three stages.
    Two warps a program keep sm_90 from its warp-group products, whose second operand goes through shared memory and
    fences: they pay from 32 tokens on. groups: whether the device has them; None is what that of the weight has.
    """
    asm = uses_asm() if asm is None else asm
    tiles = tiles_of(w)
    split = max(1, min(8, tiles // 4))
    Config, wide, stages = tune.Config, 64 if w.bits == 3 else 128, 4 if asm else 3
    if M <= 16:
        BM = 8 if M <= 8 and asm else 16
        splits, registers = (split, split // 2, 1), 168 if BM == 8 else 200
        if w.zeros_beside:  # a word of zeros lives through a tile
            registers = 224 if BM > 8 else 176 if w.bits == 4 else 208
        found = [Config(BM, 128, s, 2, 4, registers) for s in splits] if w.bits in (2, 4) else []
        found += [Config(BM, 64, s, 2, 3, 240) if w.bits == 3 else Config(BM, 64, s, 2, 4, 128) for s in splits]
        found += [Config(BM, wide, split, 4, 3), Config(BM, wide, 1, 4, 3)]
    elif M <= 64:
        BM, half = 32 if M <= 32 else 64, max(1, split // 2)
        n = stages if M <= 32 else 2  # more stages spill on sm_80, and are faster on sm_90
        found = [Config(BM, bn, s, 4, n) for s in (half, 1) for bn in (wide, 64)]
        found += [Config(BM, wide, s, 8, t) for s in (half, 1) for t in (stages, 3)]
        found += [Config(32, wide, half, 4, stages), Config(64, 64, half, 4, stages)]
    elif w.bits == 3:  # whose tiles are 512 columns: two stages of 64 tokens are what shared memory holds
        BM = 64 if asm else 32
        found = [Config(BM, bn, s, warps, 2) for s in (1, 2) for bn, warps in ((64, 4), (128, 8))]
        found += [Config(32, 64, 1, 4, stages - 1)]
    else:
        found = [Config(64, wide, 1, 4, stages), Config(128, wide, 1, 8, 3), Config(64, wide, 2, 4, 3)]
        found += [Config(64, 64, 1, 4, 3), Config(64, wide, 1, 8, 3), Config(64, wide, 2, 8, 3)]
        found += [Config(64, 256, 1, 8, 3), Config(128, 64, 1, 4, 3)] if w.bits == 4 else []
    if M > FEW and (has_warp_groups(w.words.device) if groups is None else groups):
        found += _tall(w, (max(1, split // 2), 1) if M <= 64 else (1, 2))
    Np = -(-w.N // N_MULTIPLE) * N_MULTIPLE
    fitting = [c for c in found if 1 <= c.split_k <= tiles and Np % c.BN == 0]
    if M > FEW:
        fitting.insert(0 if M > 512 else len(fitting), tune.LIBRARY)
    return list(dict.fromkeys(fitting))


def _tall(w: PackedWeight, splits: tuple[int, int]) -> list[tune.Config]:
    """Return tiles of more features, for two warp groups: a weight reads half of the activations from the L2 cache.

    Groups of 32 and 64 scale too many sums for that (docs/kernels.md).
    """
    Config = tune.Config
    if 0 < w.group < 128:
        return []
    if w.bits == 3:
        return [Config(64, 128, s, 8, 2) for s in splits]
    found = [Config(64, 256, s, 8, 2 if w.bits == 2 else 3) for s in splits]
    return found + [Config(128, 256, s, 8, 3) for s in splits if w.bits == 4 and not w.group]


def tiles_of(w: PackedWeight) -> int:
    """Return how many tiles K has."""
    return cdiv(w.K, tile(w.bits, w.group))


def launch(
    x: Tensor, w: PackedWeight, bias: Tensor | None, config: tune.Config, dtype: torch.dtype | None = None
) -> Tensor:
    """Run a given configuration on fp16 or bf16 `x` `[..., K]`, the library's on float32 too.

    Returns `[..., N]` in `dtype`, else x's.
    """
    if config == tune.LIBRARY:
        return dense.product(_ordered(x, w), w.N, functools.partial(decode, w), bias)
    return planned(x, w, config, bias is not None, dtype)(x, w, bias)


def planned(x: Tensor, w: PackedWeight, config: tune.Config, has_bias: bool, dtype: torch.dtype | None = None) -> Call:
    """Return what launches a configuration on activations and weights like `x` and `w`."""
    Np = w.words.stride(0)
    fixed = constants(w, config, has_bias=has_bias) | config.options()
    shape, padded = (*x.shape[:-1], w.N), (Np, w.Kp)
    launches = Launches(x, shape, padded, config, fixed, dtype or x.dtype, late_bias=has_bias)
    return lambda x, w, bias: launches(weight_only_kernel, _ordered(x, w), w.words, w.params, bias)


def _ordered(x: Tensor, w: PackedWeight) -> Tensor:
    return x if w.order is None else x[..., w.order]


_KERNEL = Kernel(f"weight_only {REVISION}", reference, configs, launch, planned, check_activation)


def constants(w: PackedWeight, config: tune.Config, *, has_bias: bool = False, asm: bool | None = None) -> dict:
    """Return the compile-time arguments of the kernel for a weight and a configuration."""
    return {
        "BITS": w.bits,
        "SUB": sub_rows(w.bits, w.group),
        "GROUP": w.group,
        "HAS_ZERO": w.has_zero,
        "HAS_BIAS": has_bias,
        "ASM": uses_asm() if asm is None else asm,
        "SPLIT_K": config.split_k,
        "BM": config.BM,
        "BN": config.BN,
        "STAGES": config.stages,
    }
