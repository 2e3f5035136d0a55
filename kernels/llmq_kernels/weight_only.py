"""Weight-only linear: y = x @ W^T (+ bias) with W = scale * (code - zero) in 2, 3, 4 or 8 bits, x in fp16 or bf16.

One program makes a tile [BN, BM] of y^T over a contiguous run of K tiles (layout.py). Per tile:

    words [BN, SUB] -> field j -> code - zero, exact in x's dtype       in registers, dequant.py
    part += (code - zero) @ x[:, j * SUB + r]^T                         tensor cores, float32
    acc  += scale * part                                                once per group

The weights are the first operand, which tensor cores take 16 features tall: the second needs 8 tokens only, so decode
multiplies, and scales, half as many sums that nobody asked for as with the tokens first.
Scaling the float32 accumulator instead of the weights costs one multiply per group and output, and is more exact.
With SPLIT_K > 1 every split stores its float32 partial, and a second kernel adds them in a fixed order: no atomics,
equal bits on every run. Padding of K and N keeps the divisibility hints without which Triton drops every async copy.
A float32 x is multiplied in fp16 too, each row first divided by the power of two at its maximum, so that nothing
overflows and 11 bits of it are kept; the sums are float32 and are not rounded.

Many tokens may be the library's, which the tuner says (dense.py).
Beside it: `reference`, what the kernel must equal; it is also what the op does with CPU tensors, exact and slow.
Not here: the layout (layout.py), W8A8 (int8.py), which configuration is fastest (tune.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import dense, tune
from llmq_kernels.decode import decode
from llmq_kernels.dequant import code3_minus_zero, code_minus_zero, fields_of, group_run, scale_of, zero_of
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import DTYPES, OPTIONS, cdiv, no_gradient, on, operator, runs_on, uses_asm
from llmq_kernels.layout import N_MULTIPLE, PackedWeight, dequantize, sub_rows, tile

FEW = 32
"""The most tokens that meet packed codes only."""


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x_ptr,  # [M, K] fp16 or bf16
    w_ptr,  # [K * BITS / 16, NP] int16
    param_ptr,  # [K / GROUP, NP] int32
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
    COUNT: tl.constexpr = fields_of(BITS)
    BK: tl.constexpr = SUB * COUNT
    ROWS: tl.constexpr = BK * BITS // 16
    RUN: tl.constexpr = group_run(GROUP, SUB, COUNT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if GROUP == 0:
        word = tl.load(param_ptr + offs_n)
    for t in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(w_ptrs)
        if BITS == 3:
            w8 = tl.load(w_ptrs + SUB * NP)
            high = tl.load(w_ptrs + 2 * SUB * NP)
        for first in tl.static_range(0, COUNT, RUN):
            if GROUP == 0:
                part = acc
            else:
                part = tl.zeros((BN, BM), dtype=tl.float32)
                word = tl.load(param_ptr + (t * BK + first * SUB) // GROUP * NP + offs_n)
            z = None
            if HAS_ZERO:
                z = zero_of(word)[:, None]
            for j in tl.static_range(first, first + RUN):
                x = tl.load(x_ptrs + j * SUB, mask=x_mask, other=0.0)
                if BITS == 3:
                    a = code3_minus_zero(w if j < 8 else w8, high, z, j, dtype, ASM)
                else:
                    a = code_minus_zero(w, z, j, BITS, dtype, ASM)
                part = tl.dot(a, x, part)
            if GROUP == 0:
                acc = part
            else:
                acc += part * scale_of(word, HAS_ZERO)[:, None]
        x_ptrs += BK
        w_ptrs += ROWS * NP
    if GROUP == 0:
        acc *= scale_of(word, HAS_ZERO)[:, None]
    if HAS_BIAS and SPLIT_K == 1:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=x_mask & (offs_n[:, None] < N))


@triton.jit
def sum_splits_kernel(
    part_ptr,  # [SPLIT_K, MN] float32
    bias_ptr,  # [N]
    y_ptr,  # [MN]
    MN,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partials of all splits, in order, and the bias; round once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    acc = tl.load(part_ptr + at, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLIT_K):
        part_ptr += MN
        acc += tl.load(part_ptr + at, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def reference(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` computed in float32 and rounded once to the dtype of x."""
    x32 = x.float() if w.order is None else x[..., w.order].float()
    return F.linear(x32, dequantize(w), None if bias is None else bias.float()).to(x.dtype)


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32; any float on the CPU) to `[..., N]` in its dtype; bias `[N]`.

    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    return torch.ops.llmq.weight_only_linear(x, w.words, w.params, w.order, bias, w.N, w.K, w.bits, w.group, w.has_zero)


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
    w = PackedWeight(words, params, order, n, k, bits, group, has_zero)
    check_activation(x, w, bias)
    if not runs_on(x) or not x.numel():
        return reference(x, w, bias)
    return multiplied(x, w, bias, ("weight_only", n, k, bits, group, has_zero), configs, launch)


@torch.library.register_fake("llmq::weight_only_linear")
def _(x, words, params, order, bias, n, k, bits, group, has_zero):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


class Packed(Protocol):
    """A packed weight `[N, K]` of either kernel."""

    @property
    def N(self) -> int:
        """Output features."""

    @property
    def K(self) -> int:
        """Input features."""

    @property
    def words(self) -> Tensor:
        """Codes."""


Weight = TypeVar("Weight", bound=Packed)


def multiplied(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    key: tuple[Any, ...],
    configs: Callable[[int, Weight], list[tune.Config]],
    launch: Callable[..., Tensor],
) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` by the fastest configuration of a kernel; see `linear`.

    key: the kernel's name, and all of the weight that bears on the choice.
    """
    name, *weight = key
    x_MK = x.reshape(-1, w.K)
    M = x_MK.shape[0]

    def run(config: tune.Config) -> Tensor:
        if x.dtype == torch.float32 and config != tune.LIBRARY:
            return _scaled(x_MK, w, bias, config, launch)
        return launch(x_MK, w, bias, config)

    with on(x.device):
        y = run(tune.choose(name, x.device, (tune.bucket(M), *weight, x.dtype), lambda: configs(M, w), run))
    return no_gradient(x, y.reshape(*x.shape[:-1], w.N))


def _scaled(x_MK: Tensor, w: Weight, bias: Tensor | None, config: tune.Config, launch: Callable[..., Tensor]) -> Tensor:
    """Return the product of float32 `x`, each row divided by a power of two for the kernel to take it in fp16."""
    unit = power_of_two(x_MK)
    y = launch((x_MK / unit).half(), w, None, config, x_MK.dtype) * unit
    return y if bias is None else y + bias


def check_activation(x: Tensor, w: Packed, bias: Tensor | None) -> None:
    """Raise KernelError for an activation, or a bias, that a packed weight cannot be multiplied with."""
    if x.shape[-1] != w.K:
        raise KernelError(f"the activation has {x.shape[-1]} features, the packed weight {w.K}")
    if x.device != w.words.device:
        raise KernelError(f"the activation is on {x.device}, the packed weight on {w.words.device}; move one")
    if bias is not None and bias.shape != (w.N,):
        raise KernelError(f"the bias is {list(bias.shape)}, not [{w.N}]")
    if x.device.type != "cpu" and x.dtype not in (*DTYPES, torch.float32):
        raise KernelError(f"the weight-only kernel takes fp16, bf16 or float32 activations, not {x.dtype}; convert x")


def power_of_two(x_MK: Tensor) -> Tensor:
    """Return `[M, 1]`: the power of two below the maximum of every row of float32 `x`, 1 where there is none."""
    top = x_MK.abs().amax(-1, keepdim=True)
    unit = (top.view(torch.int32) & 0x7F800000).view(torch.float32)
    return unit.masked_fill(unit == 0, 1)


def configs(M: int, w: PackedWeight, *, asm: bool | None = None) -> list[tune.Config]:
    """Return the configurations worth trying for M tokens, the safest guess first.

    From 33 tokens on the library is one of them, from 513 the first: every tile of tokens decodes the weight anew.
    asm: as for `constants`. AMD's matrix instructions take no fewer than 16 tokens, and its shared memory three stages.
    Two warps a program keep sm_90 from its warp-group products, whose second operand goes through shared memory and
    fences: they pay from 32 tokens on.
    """
    asm = uses_asm() if asm is None else asm
    tiles = -(-w.K // tile(w.bits, w.group))
    split = max(1, min(8, tiles // 4))
    Config, wide, stages = tune.Config, 64 if w.bits == 3 else 128, 4 if asm else 3
    if M <= 16:
        BM = 8 if M <= 8 and asm else 16
        splits = split, split // 2, 1
        found = [Config(BM, 128, s, 2, 4, 168 if BM == 8 else 200) for s in splits] if w.bits in (2, 4) else []
        found += [Config(BM, 64, s, 2, 3, 144) if w.bits == 3 else Config(BM, 64, s, 2, 4, 128) for s in splits]
        found += [Config(BM, wide, split, 4, 3), Config(BM, wide, 1, 4, 3)]
    elif M <= 64:
        BM, half = 32 if M <= 32 else 64, max(1, split // 2)
        n = stages if M <= 32 else 2  # more stages spill on sm_80, and are faster on sm_90
        found = [Config(BM, bn, s, 4, n) for s in (half, 1) for bn in (wide, 64)]
        found += [Config(BM, wide, s, 8, t) for s in (half, 1) for t in (stages, 3)]
        found += [Config(32, wide, half, 4, stages), Config(64, 64, half, 4, stages)]
    else:
        found = [Config(64, wide, 1, 4, stages), Config(128, wide, 1, 8, 3), Config(64, wide, 2, 4, 3)]
        found += [Config(64, 64, 1, 4, 3), Config(64, wide, 1, 8, 3), Config(64, wide, 2, 8, 3)]
        found += [Config(64, 256, 1, 8, 3), Config(128, 64, 1, 4, 3)] if w.bits == 4 else []
    Np = -(-w.N // N_MULTIPLE) * N_MULTIPLE
    fitting = [c for c in found if 1 <= c.split_k <= tiles and Np % c.BN == 0]
    if M > FEW:
        fitting.insert(0 if M > 512 else len(fitting), tune.LIBRARY)
    return list(dict.fromkeys(fitting))


def launch(
    x_MK: Tensor, w: PackedWeight, bias: Tensor | None, config: tune.Config, dtype: torch.dtype | None = None
) -> Tensor:
    """Run a given configuration on fp16 or bf16 `x` `[M, K]`, the library's on float32 too.

    Returns `[M, N]` in `dtype`, else x's.
    """
    M = x_MK.shape[0]
    Kp, Np = w.words.shape[0] * 16 // w.bits, w.words.shape[1]
    x = x_MK if w.order is None else x_MK[:, w.order]
    if config == tune.LIBRARY:
        return dense.product(x, w.N, functools.partial(decode, w), bias)
    x = F.pad(x, (0, Kp - w.K)) if Kp != w.K else x.contiguous()
    y = torch.empty((M, w.N), dtype=dtype or x.dtype, device=x.device)
    if M == 0:
        return y
    splits = config.split_k
    out = y if splits == 1 else torch.empty((splits, M, w.N), dtype=torch.float32, device=x.device)
    grid = (cdiv(M, config.BM) * cdiv(w.N, config.BN), splits)
    weight_only_kernel[grid](
        x, w.words, w.params, y if bias is None else bias.to(x.dtype), out, M, w.N, Np, Kp,
        **constants(w, config, has_bias=bias is not None), **config.options(),
    )  # fmt: skip
    if splits > 1:
        sum_splits_kernel[(cdiv(M * w.N, 1024),)](
            out, y if bias is None else bias, y, M * w.N, w.N, HAS_BIAS=bias is not None, SPLIT_K=splits, BLOCK=1024,
            **OPTIONS,
        )  # fmt: skip
    return y


def constants(w: PackedWeight, config: tune.Config, *, has_bias: bool = False, asm: bool | None = None) -> dict:
    """Return the compile-time arguments of the kernel for a weight and a configuration."""
    return _constants(w.bits, w.group, w.has_zero, has_bias, uses_asm() if asm is None else asm, config)


@functools.cache
def _constants(bits: int, group: int, has_zero: bool, has_bias: bool, asm: bool, config: tune.Config) -> dict:
    return {
        "BITS": bits,
        "SUB": sub_rows(bits, group),
        "GROUP": group,
        "HAS_ZERO": has_zero,
        "HAS_BIAS": has_bias,
        "ASM": asm,
        "SPLIT_K": config.split_k,
        "BM": config.BM,
        "BN": config.BN,
        "STAGES": config.stages,
    }
