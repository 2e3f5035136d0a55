"""Attention over the quantized key-value cache, read as it is stored: flash decoding with dequantized fragments.

One program: a block of query rows that share a key-value head (grouped queries, and the few new tokens of a step) and
one chunk of the cache. Per tile of BT tokens, words [DP / F, BT] and [BT, DP / F] as in kv.py, q and acc in F parts:

    s    = (sum_j q_j @ (k_j - zero)) * k_scale[t] * softmax scale        k_j - zero exact in fp16
    p    = exp2(s - max);   acc_j += (p * v_scale[t]) @ (v_j - zero)      online softmax, float32 sums

bf16 queries are multiplied in fp16, which is more exact, after a power of two per row brings them into its range; so
are p and the values. Chunks store (acc, max, sum), and a second kernel merges them in a fixed order: equal bits on
every run, no atomics. The latest tokens may still be floats, a window behind the cache: one more part for the merge.
Dao, Flash-Decoding (2023), for the split; KIVI (arXiv:2402.02750) and others for scales outside the dot product.

Beside it: `reference`, which is also what the op does with CPU tensors.
Not here: writing the cache (kv.py), long prefill (attend to the float keys there), sliding windows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.dequant import code_minus_zero, scale_of, zero_of
from llmq_kernels.errors import KernelError
from llmq_kernels.kv import KVCache, dequantize, padded
from llmq_kernels.launch import HALF, OPTIONS, cdiv, no_gradient, on, operator, uses_asm

ROWS = 16  # query rows of a program: the least that tensor cores take


@triton.jit
def _load_part(q_row, j: tl.constexpr, real, D: tl.constexpr, PART: tl.constexpr):
    d = j * PART + tl.arange(0, PART)
    return tl.load(q_row + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _power_of_two(size, dtype: tl.constexpr):
    """Return what fits a row of queries into fp16: 1 where they are fp16, else the power of two below their maximum."""
    if dtype == tl.float16:
        return tl.zeros_like(size) + 1.0
    else:
        unit = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return tl.where(unit > 0.0, unit, 1.0)


@triton.jit(do_not_specialize=["PARTS", "WINDOW"])
def attend_kernel(
    q_ptr,  # [B, H * GQ, TQ, D] fp16 or bf16, contiguous
    k_ptr,  # [B, H, T, DP * BITS / 16] int16
    k_param_ptr,  # [B, H, T] int32
    v_ptr,
    v_param_ptr,
    length_ptr,  # [B] int32: tokens in the cache
    acc_ptr,  # [B * H, PARTS, TQ * GQ, DP] float32
    stat_ptr,  # [B * H, PARTS, TQ * GQ, 2] float32: max (base 2) and sum
    softmax_scale,  # times log2(e)
    H,
    TQ,
    T,
    CHUNK,
    PARTS,
    WINDOW,  # tokens behind those in the cache; the TQ new ones are the last of all
    GQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    CAUSAL: tl.constexpr,
    ASM: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend from one block of query rows to one chunk of one head's cache."""
    FIELDS: tl.constexpr = 16 // BITS
    PART: tl.constexpr = DP // FIELDS
    # p * v_scale becomes fp16: lifted, so that small products are not lost, and lowered again at the end. Values up to
    # 65504 give scales up to 65504 / 7.5 in 4 bits and 65504 / 127.5 in 8, which leaves room for these factors.
    LIFT: tl.constexpr = 64.0 if BITS == 8 else 4.0
    bh = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.program_id(2) * BR + tl.arange(0, BR)
    real = rows < TQ * GQ
    new = rows // GQ
    length = tl.load(length_ptr + bh // H)
    limit = length + WINDOW - TQ + 1 + new
    offs_r = tl.arange(0, PART)
    offs_t = tl.arange(0, BT)
    # Head bh of [B, H * GQ, TQ, D] starts at bh * GQ: b * H * GQ + h * GQ.
    q_row = q_ptr + ((bh.to(tl.int64) * GQ + rows % GQ) * TQ + new)[:, None] * D
    q0 = _load_part(q_row, 0, real, D, PART)
    q1 = _load_part(q_row, 1, real, D, PART)
    acc0 = tl.zeros((BR, PART), dtype=tl.float32)
    acc1 = tl.zeros((BR, PART), dtype=tl.float32)
    size = tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1))
    if FIELDS == 4:
        q2 = _load_part(q_row, 2, real, D, PART)
        q3 = _load_part(q_row, 3, real, D, PART)
        acc2 = tl.zeros((BR, PART), dtype=tl.float32)
        acc3 = tl.zeros((BR, PART), dtype=tl.float32)
        size = tl.maximum(size, tl.maximum(tl.max(tl.abs(q2), 1), tl.max(tl.abs(q3), 1)))
    unit = _power_of_two(size, q_ptr.dtype.element_ty)
    q0 = (q0 / unit[:, None]).to(tl.float16)
    q1 = (q1 / unit[:, None]).to(tl.float16)
    if FIELDS == 4:
        q2 = (q2 / unit[:, None]).to(tl.float16)
        q3 = (q3 / unit[:, None]).to(tl.float16)
    top = tl.full((BR,), -1e30, dtype=tl.float32)
    # Summed over t after the loop: a sum across threads in every tile would cost shuffles and a barrier.
    total = tl.zeros((BR, BT), dtype=tl.float32)
    begin = split * CHUNK
    end = tl.minimum(begin + CHUNK, length)
    head = bh.to(tl.int64) * T
    k_ptrs = k_ptr + head * PART + (begin + offs_t)[None, :] * PART + offs_r[:, None]
    v_ptrs = v_ptr + head * PART + (begin + offs_t)[:, None] * PART + offs_r[None, :]
    k_params = k_param_ptr + head + begin + offs_t
    v_params = v_param_ptr + head + begin + offs_t
    for t in tl.range(begin, end, BT, num_stages=STAGES):
        there = t + offs_t < end
        k = tl.load(k_ptrs, mask=there[None, :], other=0)
        k_param = tl.load(k_params, mask=there, other=0)
        zk = None
        if HAS_ZERO:
            zk = zero_of(k_param)[None, :]
        s = tl.dot(q0, code_minus_zero(k, zk, 0, BITS, tl.float16, ASM))
        s = tl.dot(q1, code_minus_zero(k, zk, 1, BITS, tl.float16, ASM), s)
        if FIELDS == 4:
            s = tl.dot(q2, code_minus_zero(k, zk, 2, BITS, tl.float16, ASM), s)
            s = tl.dot(q3, code_minus_zero(k, zk, 3, BITS, tl.float16, ASM), s)
        if q_ptr.dtype.element_ty != tl.float16:
            s *= unit[:, None]
        # A chunk whose tokens are all hidden from a row ends with top = -1e30, and the merge gives it no weight.
        s = s * (scale_of(k_param, HAS_ZERO) * softmax_scale)[None, :] + tl.where(there, 0.0, -1e30)[None, :]
        if CAUSAL:
            s = tl.where((t + offs_t)[None, :] < limit[:, None], s, -1e30)
        higher = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink[:, None] + p
        top = higher
        v = tl.load(v_ptrs, mask=there[:, None], other=0)
        v_param = tl.load(v_params, mask=there, other=0)
        zv = None
        if HAS_ZERO:
            zv = zero_of(v_param)[:, None]
        p16 = (p * (scale_of(v_param, HAS_ZERO) * LIFT)[None, :]).to(tl.float16)
        acc0 = tl.dot(p16, code_minus_zero(v, zv, 0, BITS, tl.float16, ASM), acc0 * shrink[:, None])
        acc1 = tl.dot(p16, code_minus_zero(v, zv, 1, BITS, tl.float16, ASM), acc1 * shrink[:, None])
        if FIELDS == 4:
            acc2 = tl.dot(p16, code_minus_zero(v, zv, 2, BITS, tl.float16, ASM), acc2 * shrink[:, None])
            acc3 = tl.dot(p16, code_minus_zero(v, zv, 3, BITS, tl.float16, ASM), acc3 * shrink[:, None])
        k_ptrs += BT * PART
        v_ptrs += BT * PART
        k_params += BT
        v_params += BT
    at = (bh.to(tl.int64) * PARTS + split) * TQ * GQ + rows
    out = acc_ptr + at[:, None] * DP + offs_r[None, :]
    tl.store(out, acc0 * (1 / LIFT), mask=real[:, None])
    tl.store(out + PART, acc1 * (1 / LIFT), mask=real[:, None])
    if FIELDS == 4:
        tl.store(out + 2 * PART, acc2 * (1 / LIFT), mask=real[:, None])
        tl.store(out + 3 * PART, acc3 * (1 / LIFT), mask=real[:, None])
    tl.store(stat_ptr + at * 2, top, mask=real)
    tl.store(stat_ptr + at * 2 + 1, tl.sum(total, 1), mask=real)


@triton.jit
def merge_kernel(
    acc_ptr,  # [B * H, SPLITS, TQ * GQ, DP] float32
    stat_ptr,  # [B * H, SPLITS, TQ * GQ, 2] float32
    y_ptr,  # [B, H * GQ, TQ, D]
    TQ,
    SPLITS,
    GQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Merge the chunks of one query row, BP at a time: one by one, each would wait for memory alone."""
    BP: tl.constexpr = 32
    bh = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    offs_d = tl.arange(0, DP)
    offs_p = tl.arange(0, BP)
    rows = TQ * GQ
    top = tl.full((BP,), -1e30, dtype=tl.float32)
    for i in range(0, SPLITS, BP):
        at = (bh * SPLITS + i + offs_p) * rows + row
        top = tl.maximum(top, tl.load(stat_ptr + at * 2, mask=i + offs_p < SPLITS, other=-1e30))
    highest = tl.max(top, 0)
    total = tl.zeros((BP,), dtype=tl.float32)
    acc = tl.zeros((BP, DP), dtype=tl.float32)
    for i in range(0, SPLITS, BP):
        there = i + offs_p < SPLITS
        at = (bh * SPLITS + i + offs_p) * rows + row
        weight = tl.exp2(tl.load(stat_ptr + at * 2, mask=there, other=-1e30) - highest)
        total += weight * tl.load(stat_ptr + at * 2 + 1, mask=there, other=0.0)
        part = tl.load(acc_ptr + at[:, None] * DP + offs_d[None, :], mask=there[:, None], other=0.0)
        acc += weight[:, None] * part
    y = y_ptr + ((bh * GQ + row % GQ) * TQ + row // GQ) * D + offs_d
    tl.store(y, (tl.sum(acc, 0) / tl.sum(total, 0)).to(y_ptr.dtype.element_ty), mask=offs_d < D)


Window = tuple[Tensor, Tensor]
"""Float keys and values `[B, H, W, D]` of the tokens behind those in the cache."""


def reference(q: Tensor, cache: KVCache, lengths: Tensor, softmax_scale: float, window: Window | None = None) -> Tensor:
    """Return attention `[B, HQ, TQ, D]` over the dequantized cache, in float32, rounded once to q's dtype."""
    _B, HQ, TQ, D = q.shape
    k = dequantize(cache.k_words, cache.k_params, D, cache.bits, sym=cache.sym)
    v = dequantize(cache.v_words, cache.v_params, D, cache.bits, sym=cache.sym)
    at = torch.arange(k.shape[2], device=q.device).expand(len(q), -1)
    at = at.masked_fill(at >= lengths[:, None], torch.iinfo(torch.int64).max)  # nothing was stored there
    W = 0
    if window is not None:
        W = window[0].shape[2]
        k, v = (torch.cat([old, new.float()], dim=2) for old, new in zip((k, v), window, strict=True))
        at = torch.cat([at, lengths[:, None] + torch.arange(W, device=q.device)], dim=1)
    k, v = (t.repeat_interleave(HQ // t.shape[1], dim=1) for t in (k, v))
    s = q.float() @ k.transpose(-1, -2) * softmax_scale
    last = lengths[:, None] + W - TQ + torch.arange(TQ, device=q.device)
    hidden = at[:, None, :] > last[:, :, None]
    return (s.masked_fill(hidden[:, None], -math.inf).softmax(-1) @ v).to(q.dtype)


def attend(
    q: Tensor, cache: KVCache, lengths: Tensor, softmax_scale: float | None = None, window: Window | None = None
) -> Tensor:
    """Return causal attention `[B, HQ, TQ, D]` of the last TQ tokens over the cache, without unpacking it in memory.

    q: fp16 or bf16 `[B, HQ, TQ, D]` (any float on the CPU), HQ a multiple of the cache's heads; lengths: int32 `[B]`,
    tokens in the cache. window: what follows them, still in float. The TQ new tokens are the last of cache and window.
    softmax_scale: 1 / sqrt(D) unless given.
    Raises KernelError for shapes, dtypes or devices that the kernel cannot take.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    tensors = (cache.k_words, cache.k_params, cache.v_words, cache.v_params)
    k, v = window or (None, None)
    return torch.ops.llmq.kv_attend(q, *tensors, lengths, k, v, scale, cache.bits, cache.sym)


@operator("llmq::kv_attend")
def _op(
    q: Tensor,
    k_words: Tensor,
    k_params: Tensor,
    v_words: Tensor,
    v_params: Tensor,
    lengths: Tensor,
    window_k: Tensor | None,
    window_v: Tensor | None,
    softmax_scale: float,
    bits: int,
    sym: bool,
) -> Tensor:
    B, HQ, _TQ, D = q.shape
    cache = KVCache(k_words, k_params, v_words, v_params, D, bits, sym)
    window = None if window_k is None or window_v is None else (window_k, window_v)
    if k_words.shape[0] != B or HQ % k_words.shape[1] or padded(D) * bits != k_words.shape[3] * 16:
        raise KernelError(f"queries {list(q.shape)} do not fit a cache of words {list(k_words.shape)} in {bits} bits")
    if window is not None and not window[0].shape == window[1].shape == (B, k_words.shape[1], window[0].shape[2], D):
        raise KernelError(f"a window {list(window[0].shape)} does not fit a cache of words {list(k_words.shape)}")
    if q.device != k_words.device or lengths.device != q.device:
        raise KernelError(f"queries on {q.device}, cache on {k_words.device}, lengths on {lengths.device}; move them")
    if q.device.type == "cpu":
        return reference(q, cache, lengths, softmax_scale, window)
    if q.dtype not in HALF:
        raise KernelError(f"the attention kernel takes fp16 or bf16 queries, not {q.dtype}; convert q")
    with on(q.device):
        return no_gradient(q, launch(q, cache, lengths, softmax_scale, splits(q, cache), window))


@torch.library.register_fake("llmq::kv_attend")
def _(q, k_words, k_params, v_words, v_params, lengths, window_k, window_v, softmax_scale, bits, sym):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def splits(q: Tensor, cache: KVCache) -> int:
    """Return into how many chunks the cache is cut, so that the programs fill the device twice."""
    B, HQ, TQ, _D = q.shape
    H, T = cache.k_params.shape[1:]
    programs = B * H * cdiv(TQ * HQ // H, ROWS)
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(cdiv(wanted, programs), cdiv(T, 256)))


def launch(
    q: Tensor, cache: KVCache, lengths: Tensor, softmax_scale: float, parts: int, window: Window | None = None
) -> Tensor:
    """Run both kernels with the cache in at most `parts` chunks."""
    B, HQ, TQ, D = q.shape
    H, T = cache.k_params.shape[1:]
    rows, DP, BT = TQ * HQ // H, padded(D), tile_tokens(D)
    chunk = cdiv(cdiv(T, parts), BT) * BT
    chunks = cdiv(T, chunk)
    q = q.contiguous()
    y = torch.empty_like(q)
    if not q.numel():
        return y
    softmax_scale *= math.log2(math.e)
    W = 0 if window is None else window[0].shape[2]
    parts = chunks + (W > 0)
    acc = torch.empty((B * H, parts, rows, DP), dtype=torch.float32, device=q.device)
    stat = torch.empty((B * H, parts, rows, 2), dtype=torch.float32, device=q.device)
    if window is not None and W:
        acc[:, -1, :, :D], stat[:, -1, :, 0], stat[:, -1, :, 1] = _window_part(q, window, softmax_scale)
    attend_kernel[(B * H, chunks, cdiv(rows, ROWS))](
        q, cache.k_words, cache.k_params, cache.v_words, cache.v_params, lengths, acc, stat,
        softmax_scale, H, TQ, T, chunk, parts, W,
        **constants(HQ // H, D, cache.bits, sym=cache.sym, TQ=TQ, W=W), **LAUNCH, **OPTIONS,
    )  # fmt: skip
    merge_kernel[(B * H, rows)](acc, stat, y, TQ, parts, GQ=HQ // H, D=D, DP=DP, **OPTIONS)
    return y


def _window_part(q: Tensor, window: Window, softmax_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a chunk stores, acc `[B * H, TQ * GQ, D]`, max and sum, for the float tokens; they are few."""
    k, v = (t.flatten(0, 1).float() for t in window)
    TQ, D, W = q.shape[2], q.shape[3], k.shape[1]
    rows = q.reshape(len(k), -1, TQ, D).transpose(1, 2).reshape(len(k), -1, D).float()
    s = rows @ k.transpose(1, 2) * softmax_scale
    row = torch.arange(rows.shape[1], device=q.device) // (rows.shape[1] // TQ)
    hidden = torch.arange(W, device=q.device) > (row + W - TQ)[:, None]
    s = s.masked_fill(hidden, -1e30)
    top = s.amax(-1)
    p = torch.exp2(s - top[..., None])
    return p @ v, top, p.sum(-1)


LAUNCH = {"num_warps": 4, "num_stages": 3}


def tile_tokens(D: int) -> int:
    """Return BT, so that three stages of keys and values fit 64 KiB."""
    return 64 if padded(D) <= 128 else 32


def constants(GQ: int, D: int, bits: int, *, sym: bool, TQ: int, W: int = 0, asm: bool | None = None) -> dict[str, int]:
    """Return the compile-time arguments of the attention kernel; a window of W tokens may hold all new ones."""
    asm = uses_asm() if asm is None else asm
    shape = {"GQ": GQ, "D": D, "DP": padded(D), "BITS": bits, "HAS_ZERO": not sym, "CAUSAL": TQ > W + 1}
    return shape | {"ASM": asm, "BR": ROWS, "BT": tile_tokens(D), "STAGES": LAUNCH["num_stages"]}
