"""The quantized key-value cache: append new tokens to it, in int8 or int4, one grid per token and head.

    scale = max|x| / ((2^b - 1) / 2), zero = 2^(b-1)                     symmetric
    scale = (max - min) / (2^b - 1),  zero = round(-min / scale)         asymmetric, min <= 0 <= max
    code  = clamp(round(x / scale) + zero, 0, 2^b - 1)                   ties to even, all in float32

One head of one token, D channels padded to DP (a power of two, at least 64), F = 16 / bits fields:

    words  int16 [B, H, T, DP / F]   field j (at bit bits * j) of word r is channel j * DP / F + r
    params int32 [B, H, T]           the bits of the float32 scale; asymmetric: its low 8 mantissa bits are the zero
                                     (the scale is cut to the other 16 before any code is chosen)

so that attention (attention.py) turns words into tensor-core fragments without a shuffle, as weight_only.py does.
A static scale (one per head, from calibration) replaces the maximum; tokens beyond it are clamped.

Beside it: `quantize_reference`, which is also what the op does with CPU tensors.
Not here: reading the cache (attention.py), evicting from it, paging.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.errors import KernelError
from llmq_kernels.launch import OPTIONS, cdiv, on, operator
from llmq_kernels.rounding import round_even

_FLOOR = 1e-8


@dataclass(frozen=True)
class KVCache:
    """Keys and values of T tokens at most. Tensors as above; D: channels of a head; sym: without zeros."""

    k_words: Tensor
    k_params: Tensor
    v_words: Tensor
    v_params: Tensor
    D: int
    bits: int
    sym: bool


def padded(D: int) -> int:
    """Return DP: the channels of a head as stored."""
    return max(64, triton.next_power_of_2(D))


def empty(B: int, H: int, T: int, D: int, bits: int, *, sym: bool, device: torch.device | str) -> KVCache:
    """Return a cache for T tokens (rounded up to 16) of H key-value heads of D channels.

    Raises KernelError for other bits than 4 or 8, and for heads of more than 256 channels.
    """
    if bits not in (4, 8):
        raise KernelError(f"no cache kernel for {bits} bits; there are 4 and 8")
    if D > 256:
        raise KernelError(f"heads of {D} channels are beyond the cache kernels' 256")

    T = -(-T // 16) * 16

    def words() -> Tensor:
        return torch.zeros((B, H, T, padded(D) * bits // 16), dtype=torch.int16, device=device)

    def params() -> Tensor:
        return torch.zeros((B, H, T), dtype=torch.int32, device=device)

    return KVCache(words(), params(), words(), params(), D, bits, sym)


@triton.jit
def append_kernel(
    x_ptr,  # [B, H, TN, D] fp16, bf16 or float32, by strides, channels contiguous
    words_ptr,  # [B, H, T, DP * BITS / 16] int16
    param_ptr,  # [B, H, T] int32
    length_ptr,  # [B] int32: tokens already there
    static_ptr,  # [H] float32, if STATIC
    H,
    TN,
    T,
    stride_b,
    stride_h,
    stride_t,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    SYM: tl.constexpr,
    STATIC: tl.constexpr,
    BT: tl.constexpr,
):
    """Quantize BT new tokens of one head and store them behind those already there; none go beyond T."""
    FIELDS: tl.constexpr = 16 // BITS
    PART: tl.constexpr = DP // FIELDS
    TOP: tl.constexpr = (1 << BITS) - 1
    bh = tl.program_id(0)
    b, h = bh // H, bh % H
    new = tl.program_id(1) * BT + tl.arange(0, BT)
    to = tl.load(length_ptr + b) + new
    mask_t = (new < TN) & (to < T)
    offs_r = tl.arange(0, PART)
    row = x_ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + new.to(tl.int64)[:, None] * stride_t
    low = tl.zeros((BT,), dtype=tl.float32)
    high = tl.zeros((BT,), dtype=tl.float32)
    for j in tl.static_range(FIELDS):
        d = j * PART + offs_r
        x = tl.load(row + d[None, :], mask=mask_t[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(x, 1))
        high = tl.maximum(high, tl.max(x, 1))
    if STATIC:
        scale = tl.zeros_like(low) + tl.load(static_ptr + h)
    elif SYM:
        scale = tl.maximum(tl.div_rn(tl.maximum(high, -low), tl.zeros_like(low) + TOP * 0.5), 1e-8)
    else:
        scale = tl.maximum(tl.div_rn(high - low, tl.zeros_like(low) + TOP * 1.0), 1e-8)
    bits = scale.to(tl.int32, bitcast=True)
    if SYM:
        zero = tl.zeros_like(low) + (1 << (BITS - 1))
    else:
        bits = bits & ~0xFF
        scale = bits.to(tl.float32, bitcast=True)
        zero = tl.minimum(tl.maximum(round_even(tl.div_rn(-low, scale)), 0.0), TOP)
        bits = bits | zero.to(tl.int32)
    word = tl.zeros((BT, PART), dtype=tl.int32)
    for j in tl.static_range(FIELDS):
        d = j * PART + offs_r
        x = tl.load(row + d[None, :], mask=mask_t[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        ratio = tl.div_rn(x, tl.zeros_like(x) + scale[:, None])
        ratio = tl.minimum(tl.maximum(ratio, -256.0), 256.0)
        code = tl.minimum(tl.maximum(round_even(ratio) + zero[:, None], 0.0), TOP)
        word |= code.to(tl.int32) << (BITS * j)
    at = bh.to(tl.int64) * T + to
    tl.store(words_ptr + at[:, None] * PART + offs_r[None, :], word.to(tl.int16), mask=mask_t[:, None])
    tl.store(param_ptr + at, bits, mask=mask_t)


def quantize_reference(x: Tensor, bits: int, *, sym: bool, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return words int16 `[B, H, T, DP * bits / 16]` and params int32 `[B, H, T]` of `x` `[B, H, T, D]`."""
    top, fields = 2**bits - 1, 16 // bits
    x = F.pad(x.float(), (0, padded(x.shape[-1]) - x.shape[-1]))
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if static is not None:
        scale = static.float()[None, :, None].expand_as(low).contiguous()
    else:  # by a tensor: by a number, torch multiplies with the reciprocal on a GPU
        steps = torch.full_like(low, top / 2 if sym else top)
        scale = ((torch.maximum(high, -low) if sym else high - low) / steps).clamp(min=_FLOOR)
    params = scale.view(torch.int32)
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if not sym:
        params = params & ~0xFF
        scale = params.view(torch.float32)
        zero = (-low / scale).round().clamp(0, top)
        params = params | zero.to(torch.int32)
    codes = ((x / scale[..., None]).clamp(-256, 256).round() + zero[..., None]).clamp(0, top).to(torch.int32)
    parts = codes.unflatten(-1, (fields, -1))
    words = torch.zeros_like(parts[..., 0, :])
    for j in range(fields):
        words |= parts[..., j, :] << (bits * j)
    return words.to(torch.int16), params


def dequantize(words: Tensor, params: Tensor, D: int, bits: int, *, sym: bool) -> Tensor:
    """Return the float32 values `[B, H, T, D]` that a cache holds."""
    word = words.to(torch.int32)
    codes = torch.cat([(word >> (bits * j)) & (2**bits - 1) for j in range(16 // bits)], dim=-1)[..., :D]
    if sym:
        return (codes - 2 ** (bits - 1)) * params.view(torch.float32)[..., None]
    return (codes - (params & 0xFF)[..., None]) * (params & ~0xFF).view(torch.float32)[..., None]


def append(cache: KVCache, k: Tensor, v: Tensor, lengths: Tensor, static: tuple[Tensor, Tensor] | None = None) -> None:
    """Quantize new keys and values `[B, H, TN, D]` into `cache` (mutated) behind `lengths` int32 `[B]` tokens.

    static: float32 scales `[H]` of keys and of values from calibration (symmetric caches only). `lengths` is not
    changed. Raises KernelError for other shapes; a token beyond the cache's T is not stored: see to its size first.
    """
    k_scale, v_scale = static or (None, None)
    torch.ops.llmq.kv_append(k, cache.k_words, cache.k_params, lengths, k_scale, cache.bits, cache.sym)
    torch.ops.llmq.kv_append(v, cache.v_words, cache.v_params, lengths, v_scale, cache.bits, cache.sym)


@operator("llmq::kv_append", mutates=("words", "params"))
def _op(x: Tensor, words: Tensor, params: Tensor, lengths: Tensor, static: Tensor | None, bits: int, sym: bool) -> None:
    if x.dim() != 4 or x.shape[:2] != params.shape[:2] or padded(x.shape[3]) * bits != words.shape[3] * 16:
        raise KernelError(
            f"new keys or values {list(x.shape)} do not fit a cache of words {list(words.shape)} in {bits} bits"
        )
    if static is not None and not sym:
        raise KernelError("static scales are for symmetric caches; make the cache with sym=True")
    if x.device.type != "cpu":
        with on(x.device):
            return launch_append(x, words, params, lengths, static, bits, sym=sym)
    new_words, new_params = quantize_reference(x, bits, sym=sym, static=static)
    for b, at in enumerate(lengths.tolist()):
        count = min(x.shape[2], words.shape[2] - at)
        words[b, :, at : at + count] = new_words[b, :, :count]
        params[b, :, at : at + count] = new_params[b, :, :count]
    return None


@torch.library.register_fake("llmq::kv_append")
def _(x, words, params, lengths, static, bits, sym):  # type: ignore[no-untyped-def]
    return None


def launch_append(
    x: Tensor, words: Tensor, params: Tensor, lengths: Tensor, static: Tensor | None, bits: int, *, sym: bool
) -> None:
    """Run the kernel; arguments as those of the op."""
    B, H, TN, D = x.shape
    if not TN:
        return
    if x.stride(3) != 1:
        x = x.contiguous()
    BT = 4 if TN <= 4 else 16
    append_kernel[(B * H, cdiv(TN, BT))](
        x, words, params, lengths, params if static is None else static, H, TN, words.shape[2], *x.stride()[:3],
        D=D, DP=padded(D), BITS=bits, SYM=sym, STATIC=static is not None, BT=BT, num_warps=4, **OPTIONS,
    )  # fmt: skip
