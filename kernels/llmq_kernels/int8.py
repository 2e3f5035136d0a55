"""W8A8: y = (x_q @ w_q^T) * x_scale[m] * w_scale[n] (+ bias), int8 x int8 -> int32 on tensor cores.

The activation is quantized in a launch before (activation.py). The int32 sums are scaled in float32 and rounded once
to x's dtype.
Weights are [N, K], K contiguous: with [K, N] the tensor cores' operand takes three times the instructions.
int32 sums are exact, so that split-K needs no order; K is at most 131,071: 128 * 128 * K stays below 2^31.

torch.compile is shown the activation's quantization as torch's own operators, so that Inductor makes it part of the
launch that makes the activation: a norm with the residual's sum before it, or the product of a gate. The codes enter
`llmq::int8_product`. (Rows beyond 8,192 columns want its option `split_reductions=False`, which llmq gives: it would
take their maximum in launches of its own.) Those that have to be padded stay with `llmq::int8_linear`, one operator
with both launches in it.

From 17 tokens on the library's product of int8 (`torch._int_mm`) is a candidate too, where it is CUDA's; a kernel of
ours scales its sums.

Beside it: `reference`; it is also what the ops do with CPU tensors.
Not here: weight-only kernels (weight_only.py); choosing static scales (calibration is llmq's).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from llmq_kernels import tune
from llmq_kernels.activation import Quantizing, quantize, quantize_reference
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import FLOATS, OPTIONS, blank, cdiv, check_operands, direct, no_gradient, on, operator, runs_on
from llmq_kernels.layout import spans_of

TILE_K = 128
N_MULTIPLE = 128
MAX_K = 131_071


@dataclass(frozen=True)
class PackedInt8:
    """A weight `[N, K]`: q int8 `[Np, Kp]`, padded with zeros; scale float32 `[Np]`."""

    q: Tensor
    scale: Tensor
    N: int
    K: int

    @property
    def Np(self) -> int:
        """N padded."""
        return len(self.q)

    def to(self, device: torch.device | str) -> PackedInt8:
        """Return the weight on another device."""
        return PackedInt8(self.q.to(device), self.scale.to(device), self.N, self.K)


def pack(codes_NK: Tensor, scale_N: Tensor) -> PackedInt8:
    """Pack signed int8 codes `[N, K]` with one scale per output feature, `[N]` or `[N, 1]`, for the W8A8 kernel.

    Raises KernelError for other dtypes or shapes, or a K beyond 131,071.
    """
    N, K = codes_NK.shape
    if codes_NK.dtype != torch.int8 or scale_N.numel() != N:
        raise KernelError(
            f"W8A8 takes int8 codes [N, K] and a scale per output feature, not {codes_NK.dtype} {list(codes_NK.shape)} "
            f"and {list(scale_N.shape)}"
        )
    if K > MAX_K:
        raise KernelError(f"K = {K} could overflow int32 sums; W8A8 takes K up to {MAX_K}")
    up = (-(-N // N_MULTIPLE) * N_MULTIPLE - N, -(-K // TILE_K) * TILE_K - K)
    return PackedInt8(F.pad(codes_NK, (0, up[1], 0, up[0])), F.pad(scale_N.reshape(N).float(), (0, up[0])), N, K)


def join(weights: Sequence[PackedInt8]) -> tuple[PackedInt8, list[PackedInt8]]:
    """Return weights of one activation as one, and each as a part of it; see `layout.join`.

    Raises KernelError for weights that differ in K.
    """
    if len({w.K for w in weights}) > 1:
        raise KernelError("weights that differ in K are not one weight")
    q, scale = (torch.cat([getattr(w, n) for w in weights]) for n in ("q", "scale"))
    spans = spans_of([w.Np for w in weights])
    parts = [PackedInt8(q[at], scale[at], w.N, w.K) for w, at in zip(weights, spans, strict=True)]
    return PackedInt8(q, scale, spans[-1].start + weights[-1].N, weights[0].K), parts


@triton.jit
def int8_sums(x_ptrs, x_mask, w_ptrs, begin, end, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Return the int32 sums [BM, BN] over tiles of 128 columns, `begin` to `end`; the pointers are of the first."""
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=x_mask, other=0)
        acc = tl.dot(x, tl.load(w_ptrs), acc, out_dtype=tl.int32)
        x_ptrs += 128
        w_ptrs += 128
    return acc


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    x_ptr,  # [M, K] int8
    w_ptr,  # [NP, K] int8
    x_scale_ptr,  # [M] float32, or with STATIC [1]
    w_scale_ptr,  # [NP] float32
    bias_ptr,  # [N], in y's dtype, if HAS_BIAS
    y_ptr,  # [M, N] fp16, bf16 or float32, or partials [SPLIT_K, M, N] int32
    M,
    N,
    K,
    STATIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile [BM, BN] of y, or of one split's int32 sums. K is a multiple of 128."""
    BK: tl.constexpr = 128
    m_tiles = tl.cdiv(M, BM)
    offs_m = tl.program_id(0) % m_tiles * BM + tl.arange(0, BM)
    offs_n = tl.program_id(0) // m_tiles * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    split = tl.program_id(1)
    tiles = K // BK
    per_split = tl.cdiv(tiles, SPLIT_K)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tiles)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * K + (begin * BK + offs_k)[None, :]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :] * K + (begin * BK + offs_k)[:, None]
    acc = int8_sums(x_ptrs, mask_m[:, None], w_ptrs, begin, end, BM, BN, STAGES)
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    y_mask = mask_m[:, None] & (offs_n[None, :] < N)
    if SPLIT_K == 1:
        x_scale = tl.load(x_scale_ptr + (offs_m * 0 if STATIC else offs_m), mask=mask_m, other=0.0)
        y = acc.to(tl.float32) * x_scale[:, None] * tl.load(w_scale_ptr + offs_n)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)
    else:
        tl.store(y_ptrs, acc, mask=y_mask)


@triton.jit
def sum_int32_kernel(
    part_ptr,  # [SPLIT_K, MN] int32, or of FP8 float32
    x_scale_ptr,  # [M] float32, or with STATIC [1]
    w_scale_ptr,  # [N] float32
    bias_ptr,  # [N]
    y_ptr,  # [MN]
    MN,
    N,
    STATIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the sums of all splits, scale, add the bias, round once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    acc = tl.load(part_ptr + at, mask=mask, other=0)
    for _ in tl.static_range(1, SPLIT_K):
        part_ptr += MN
        acc += tl.load(part_ptr + at, mask=mask, other=0)
    x_scale = tl.load(x_scale_ptr + (at * 0 if STATIC else at // N), mask=mask, other=0.0)
    y = acc.to(tl.float32) * x_scale * tl.load(w_scale_ptr + at % N, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def reference(x: Tensor, w: PackedInt8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the W8A8 linear of `x` `[..., K]`, int32 sums exact (float64), scaled in float32, rounded once."""
    return product_reference(*quantize_reference(x, static), w, bias, x.dtype)


def product_reference(
    q: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the linear of int8 codes `[..., K]`, padded or not, and their scales: `[..., N]`.

    Codes of uint8 are those of E4M3.
    """
    sums = (_values(q[..., : w.K].reshape(-1, w.K)) @ _values(w.q[: w.N, : w.K]).t()).float()
    y = sums * x_scale[:, None] * w.scale[None, : w.N]
    y = y if bias is None else y + bias.float()
    return y.to(dtype).reshape(*q.shape[:-1], w.N)


def _values(codes: Tensor) -> Tensor:
    return (codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes).double()


def linear(x: Tensor, w: PackedInt8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32; any float on the CPU) to `[..., N]` in its dtype, in int8.

    static: `[1]`, the scale of the activation, or None for one per token. bias: `[N]`.
    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    if direct(x):
        return compute(x, w, static, bias)
    if torch.compiler.is_compiling() and w.q.size(1) == w.K:
        q, x_scale = quantize_reference(x, static)
        return torch.ops.llmq.int8_product(q, x_scale, w.q, w.scale, bias, w.N, x.dtype)
    return torch.ops.llmq.int8_linear(x, w.q, w.scale, static, bias, w.N, w.K)


def compute(x: Tensor, w: PackedInt8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `linear`: what the operator does."""
    call = tune.settled.get(_signature(x, w, static, bias))
    if call is not None:
        return call(x, w, static, bias)
    check_operands(x, w.q, w.N, w.K, bias)
    if not runs_on(x) or not x.numel():
        return reference(x, w, static, bias)
    if x.dtype not in FLOATS:
        raise KernelError(f"the W8A8 kernel takes fp16, bf16 or float32 activations, not {x.dtype}; convert x")
    asked, config = _chosen(x, w, bias, x.dtype, lambda: quantize(x, w.q.size(1), static))
    call = planned(x, w, config, static is not None, bias is not None)
    tune.settle(_signature(x, w, static, bias), *asked, call)
    return call(x, w, static, bias)


def _chosen(
    x: Tensor, w: PackedInt8, bias: Tensor | None, dtype: torch.dtype, codes: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[tuple[str, torch.device, tuple[Any, ...]], tune.Config]:
    """Return the fastest configuration for as many tokens as `x` has, behind what the tuner was asked for it."""
    M, device, quantized = x.shape[:-1].numel(), x.device, functools.cache(codes)  # once, if anything is to be timed
    asked = "int8", device, (tune.bucket(M), w.N, w.K, dtype)
    with on(device):
        return asked, tune.choose(*asked, lambda: configs(M, w.K), lambda c: launch(*quantized(), w, bias, c, dtype))


def planned(x: Tensor, w: PackedInt8, config: tune.Config, is_static: bool, has_bias: bool) -> Callable[..., Tensor]:
    """Return what quantizes and multiplies, in one configuration, activations and weights like `x` and `w`."""
    K, Kp, device, dtype = w.K, w.q.size(1), x.device, x.dtype
    quantizing, q_shape = Quantizing(x, Kp, is_static=is_static), (*x.shape[:-1], Kp)
    launches = Launches(q_shape, w.N, config, is_static or x.numel() == K, has_bias, device, dtype)

    def call(x: Tensor, w: PackedInt8, static: Tensor | None, bias: Tensor | None) -> Tensor:
        with on(device):
            return no_gradient(x, launches(*quantizing(x, static), w, bias))

    return call


def product(
    q: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Map int8 codes `[..., Kp]` of an activation, with their float32 scales `[M]` or `[1]`, to `[..., N]`."""
    of_bias = None if bias is None else bias.shape
    key = "int8 product", q.shape, x_scale.shape, dtype, q.device, w.N, w.K, w.q.device, of_bias
    call = tune.settled.get(key)
    if call is not None:
        return call(q, x_scale, w, bias)
    check_operands(q, w.q, w.N, w.q.size(1), bias)
    if not runs_on(q) or not q.numel():
        return product_reference(q, x_scale, w, bias, dtype)
    asked, config = _chosen(q, w, bias, dtype, lambda: (q, x_scale))
    launches = Launches(q.shape, w.N, config, x_scale.numel() == 1, bias is not None, q.device, dtype)

    def multiplied(q: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None) -> Tensor:
        with on(q.device):
            return no_gradient(x_scale, launches(q.contiguous(), x_scale, w, bias))

    tune.settle(key, *asked, multiplied)
    return multiplied(q, x_scale, w, bias)


def _signature(x: Tensor, w: PackedInt8, static: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Return all that a call's checks, its configuration and its launches depend on."""
    of_bias = None if bias is None else bias.shape
    return "int8", x.shape, x.dtype, x.device, w.N, w.K, w.q.device, static is None, of_bias


@operator("llmq::int8_linear")
def _op(x: Tensor, q: Tensor, scale: Tensor, static: Tensor | None, bias: Tensor | None, n: int, k: int) -> Tensor:
    return compute(x, PackedInt8(q, scale, n, k), static, bias)


@library.register_fake("llmq::int8_linear")
def _(x, q, scale, static, bias, n, k):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


@operator("llmq::int8_product")
def _product_op(
    q: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    return product(q, x_scale, PackedInt8(w, w_scale, n, q.size(-1)), bias, dtype)


@library.register_fake("llmq::int8_product")
def _(q, x_scale, w, w_scale, bias, n, dtype):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], n, dtype=dtype)


def configs(M: int, K: int) -> list[tune.Config]:
    """Return the configurations worth trying for M tokens, the safest guess first."""
    tiles = -(-K // TILE_K)
    split = max(1, min(8, tiles // 4))
    Config = tune.Config
    if M <= 64:
        BM = 16 if M <= 16 else 32 if M <= 32 else 64
        found = [Config(BM, bn, s, 4, n) for s in (split, split // 2, 1) for bn in (128, 64) for n in (4, 3)]
    else:
        found = [Config(128, 128, 1, 8, 3), Config(64, 128, 1, 4, 3), Config(128, 64, 1, 4, 3), Config(64, 64, 1, 4, 4)]
    if M > 16 and torch.version.hip is None:  # cuBLAS takes 17 rows or more; older hipBLASLt have no such product
        found.append(tune.LIBRARY)
    return list(dict.fromkeys(c for c in found if c.split_k >= 1))


def launch(
    q: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None, config: tune.Config, dtype: torch.dtype
) -> Tensor:
    """Run the matrix product on int8 activations `[..., Kp]` with `[M]` scales, or one: `[..., N]` in `dtype`."""
    launches = Launches(q.shape, w.N, config, x_scale.numel() == 1, bias is not None, q.device, dtype)
    return launches(q, x_scale, w, bias)


class Launches:
    """The launches of one configuration on activations of one shape: the product, and a sum of splits."""

    def __init__(
        self,
        shape: tuple[int, ...],
        N: int,
        config: tune.Config,
        one_scale: bool,
        has_bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        *batch, Kp = shape
        M, splits = math.prod(batch), config.split_k
        self.sizes, self.splits, self.by_library = (M, N, Kp), splits, config == tune.LIBRARY
        self.outputs, self.partials = blank((*batch, N), dtype, device), blank((splits, M, N), torch.int32, device)
        self.grid = (0, 0) if self.by_library else (cdiv(M, config.BM) * cdiv(N, config.BN), splits)
        scaled = {"STATIC": one_scale, "HAS_BIAS": has_bias, "SPLIT_K": splits}
        tiles = {"BM": config.BM, "BN": config.BN, "STAGES": config.stages}
        self.fixed = scaled | tiles | config.options()
        self.sum_grid, self.sum_fixed = (cdiv(M * N, 1024),), scaled | {"BLOCK": 1024, **OPTIONS}

    def __call__(self, q: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None) -> Tensor:
        """Return `[..., N]`."""
        y = self.outputs()
        M, N, Kp = self.sizes
        b = y if bias is None else bias
        if not M:
            return y
        if self.by_library:
            sums = _library_sums(q.view(M, Kp), w)
        elif self.splits > 1:
            sums = self.partials()
            int8_kernel[self.grid](q, w.q, x_scale, w.scale, b, sums, M, N, Kp, **self.fixed)
        else:
            int8_kernel[self.grid](q, w.q, x_scale, w.scale, b, y, M, N, Kp, **self.fixed)
            return y
        sum_int32_kernel[self.sum_grid](sums, x_scale, w.scale, b, y, M * N, N, **self.sum_fixed)
        return y


def _library_sums(q_MK: Tensor, w: PackedInt8) -> Tensor:
    """Return the int32 sums `[M, N]` by the library, which takes multiples of 8 features."""
    sums = torch._int_mm(q_MK, w.q[: -(-w.N // 8) * 8].t())
    return sums[:, : w.N].contiguous()
