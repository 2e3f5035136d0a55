"""W8A8: y = (x_q @ w_q^T) * x_scale[m] * w_scale[n] (+ bias), int8 x int8 -> int32 on tensor cores.

The activation is quantized beside it, one scale per token, in the order of operations of compressed-tensors:

    x_scale = max|x| / 127.5          in x's dtype, eps of that dtype for a row of zeros
    x_q     = round(clamp(x / x_scale, -128, 127))          the quotient rounded to x's dtype, ties to even

A static scale (one per tensor, rounded to x's dtype) skips the maximum. The int32 sums are scaled in float32 and
rounded once to x's dtype.
Weights are [N, K], K contiguous: with [K, N] the tensor cores' operand takes three times the instructions.
int32 sums are exact, so that split-K needs no order; K is at most 131,071: 128 * 128 * K stays below 2^31.

From 17 tokens on the library's product of int8 (`torch._int_mm`) is a candidate too, where it is CUDA's; a kernel of
ours scales its sums.

Beside it: `reference` and `quantize_reference`; they are also what the ops do with CPU tensors.
Not here: weight-only kernels (weight_only.py); choosing static scales (calibration is llmq's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import tune
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import DTYPES, OPTIONS, cdiv, no_gradient, on, operator, runs_on
from llmq_kernels.rounding import round_even

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


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K] fp16, bf16 or float32
    q_ptr,  # [M, KP] int8
    scale_ptr,  # [M] float32, written; or with STATIC [1], read
    K,
    KP,
    EPS: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize one token: its maximum, then its codes; columns from K to KP become 0."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if STATIC:
        scale = tl.load(scale_ptr)
    else:
        top = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(0, K, BLOCK):
            x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0.0)
            top = tl.maximum(top, tl.abs(x.to(tl.float32)))
        scale = tl.div_rn(tl.max(top, 0), 127.5).to(dtype).to(tl.float32)
        scale = tl.where(scale == 0.0, EPS, scale)
        tl.store(scale_ptr + row, scale)
    for k in range(0, KP, BLOCK):
        x = tl.load(x_ptr + row * K + k + offs, mask=k + offs < K, other=0.0).to(tl.float32)
        ratio = tl.div_rn(x, tl.zeros_like(x) + scale).to(dtype).to(tl.float32)
        code = round_even(tl.minimum(tl.maximum(ratio, -128.0), 127.0))
        tl.store(q_ptr + row * KP + k + offs, code.to(tl.int8), mask=k + offs < KP)


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
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=mask_m[:, None], other=0)
        acc = tl.dot(x, tl.load(w_ptrs), acc, out_dtype=tl.int32)
        x_ptrs += BK
        w_ptrs += BK
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
    part_ptr,  # [SPLIT_K, MN] int32
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
    """Add the int32 sums of all splits, scale, add the bias, round once."""
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


def quantize_reference(x_MK: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 codes `[M, K]` and float32 scales `[M]` (or `[1]`), as `quantize_kernel` makes them."""
    if static is None:
        top = x_MK.abs().amax(-1, keepdim=True)
        scale = top / torch.full_like(top, 127.5)  # by a number, torch multiplies with the reciprocal on a GPU
        scale = scale.masked_fill(scale == 0, torch.finfo(x_MK.dtype).eps)
    else:
        scale = static.reshape(1, 1).to(x_MK.dtype)
    q = (x_MK / scale).clamp(-128, 127).round().to(torch.int8)
    return q, scale.reshape(-1).float()


def reference(x: Tensor, w: PackedInt8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the W8A8 linear of `x` `[..., K]`, int32 sums exact (float64), scaled in float32, rounded once."""
    q, x_scale = quantize_reference(x.reshape(-1, w.K), static)
    sums = (q.double() @ w.q[: w.N, : w.K].double().t()).float()
    y = sums * x_scale[:, None] * w.scale[None, : w.N]
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], w.N)


def linear(x: Tensor, w: PackedInt8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32; any float on the CPU) to `[..., N]` in its dtype, in int8.

    static: `[1]`, the scale of the activation, or None for one per token. bias: `[N]`.
    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    return torch.ops.llmq.int8_linear(x, w.q, w.scale, static, bias, w.N, w.K)


@operator("llmq::int8_linear")
def _op(x: Tensor, q: Tensor, scale: Tensor, static: Tensor | None, bias: Tensor | None, n: int, k: int) -> Tensor:
    w = PackedInt8(q, scale, n, k)
    if x.shape[-1] != k:
        raise KernelError(f"the activation has {x.shape[-1]} features, the packed weight {k}")
    if x.device != q.device:
        raise KernelError(f"the activation is on {x.device}, the packed weight on {q.device}; move one")
    if bias is not None and bias.shape != (n,):
        raise KernelError(f"the bias is {list(bias.shape)}, not [{n}]")
    if not runs_on(x) or not x.numel():
        return reference(x, w, static, bias)
    if x.dtype not in (*DTYPES, torch.float32):
        raise KernelError(f"the W8A8 kernel takes fp16, bf16 or float32 activations, not {x.dtype}; convert x")
    x_MK = x.reshape(-1, k)
    M = x_MK.shape[0]
    key = (tune.bucket(M), n, k, x.dtype)
    with on(x.device):
        quantized = quantize(x_MK, q.shape[1], static)

        def run(config: tune.Config) -> Tensor:
            return launch(*quantized, w, bias, config, x.dtype)

        config = tune.choose("int8", x.device, key, lambda: configs(M, k), run)
        return no_gradient(x, run(config).reshape(*x.shape[:-1], n))


@torch.library.register_fake("llmq::int8_linear")
def _(x, q, scale, static, bias, n, k):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


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


def quantize(x_MK: Tensor, Kp: int, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the activation kernel: int8 codes `[M, Kp]`, zeros beyond K, and float32 scales `[M]` (or `[1]`)."""
    M, K = x_MK.shape
    q = torch.empty((M, Kp), dtype=torch.int8, device=x_MK.device)
    scale = torch.empty(M, dtype=torch.float32, device=x_MK.device)
    if static is not None:
        scale = static.reshape(1).to(x_MK.dtype).float()
    if M:
        eps = torch.finfo(x_MK.dtype).eps
        block = min(4096, triton.next_power_of_2(Kp))
        quantize_kernel[(M,)](
            x_MK.contiguous(), q, scale, K, Kp, EPS=eps, STATIC=static is not None, BLOCK=block, num_warps=4, **OPTIONS
        )
    return q, scale


def launch(
    q_MK: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None, config: tune.Config, dtype: torch.dtype
) -> Tensor:
    """Run the matrix product on int8 activations `[M, Kp]`. Returns `[M, N]` in `dtype`."""
    M, splits, has_bias, static = q_MK.shape[0], config.split_k, bias is not None, x_scale.numel() == 1
    y = torch.empty((M, w.N), dtype=dtype, device=q_MK.device)
    if M == 0:
        return y
    if config == tune.LIBRARY:
        _scale(_library_sums(q_MK, w), x_scale, w, bias, y, 1)
        return y
    out = y if splits == 1 else torch.empty((splits, M, w.N), dtype=torch.int32, device=y.device)
    grid = (cdiv(M, config.BM) * cdiv(w.N, config.BN), splits)
    b = y if bias is None else bias
    int8_kernel[grid](
        q_MK, w.q, x_scale, w.scale, b, out, M, w.N, q_MK.shape[1], STATIC=static, HAS_BIAS=has_bias, SPLIT_K=splits,
        BM=config.BM, BN=config.BN, STAGES=config.stages, **config.options(),
    )  # fmt: skip
    if splits > 1:
        _scale(out, x_scale, w, bias, y, splits)
    return y


def _library_sums(q_MK: Tensor, w: PackedInt8) -> Tensor:
    """Return the int32 sums `[M, N]` by the library, which takes multiples of 8 features."""
    sums = torch._int_mm(q_MK, w.q[: -(-w.N // 8) * 8].t())
    return sums[:, : w.N].contiguous()


def _scale(sums: Tensor, x_scale: Tensor, w: PackedInt8, bias: Tensor | None, y: Tensor, splits: int) -> None:
    """Add int32 sums `[splits, M, N]` over the splits, scale them, add the bias, and write them to `y`."""
    MN, has_bias = y.numel(), bias is not None
    sum_int32_kernel[(cdiv(MN, 1024),)](
        sums, x_scale, w.scale, y if bias is None else bias, y, MN, w.N, STATIC=x_scale.numel() == 1,
        HAS_BIAS=has_bias, SPLIT_K=splits, BLOCK=1024, **OPTIONS,
    )  # fmt: skip
