"""Small Triton kernels, one for each thing that the simulator must get right in compiled code."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def vector_add(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    """out = x + y, the tail masked."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < n
    x = tl.load(x_ptr + i, mask=inside)
    y = tl.load(y_ptr + i, mask=inside)
    tl.store(out_ptr + i, x + y, mask=inside)


@triton.jit
def row_softmax(x_ptr, out_ptr, N, SIZE: tl.constexpr):
    """Softmax of each row: two reductions across warps, exponentials, a division."""
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    x = tl.load(x_ptr + row * N + i, mask=i < N, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * N + i, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty), mask=i < N)


@triton.jit
def quantize_rows(x_ptr, q_ptr, scale_ptr, K, SIZE: tl.constexpr):
    """Each row to int8 by its own absolute maximum; rounds halves up, which is easy to say exactly."""
    row, i = tl.program_id(0), tl.arange(0, SIZE)
    x = tl.load(x_ptr + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-8) / 127.0
    q = tl.minimum(tl.maximum(tl.floor(x / scale + 0.5), -128.0), 127.0)
    tl.store(q_ptr + row * K + i, q.to(tl.int8), mask=i < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def triangle_sums(x_ptr, out_ptr, N, SIZE: tl.constexpr):
    """out[p] = sum of the first p + 1 tiles: every CTA loops a different number of times."""
    p, i = tl.program_id(0), tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for t in range(0, p + 1):
        total += tl.load(x_ptr + t * SIZE + i, mask=t * SIZE + i < N, other=0.0)
    tl.store(out_ptr + p, tl.sum(total, 0))


@triton.jit
def gemm(a_ptr, b_ptr, c_ptr, M, N, K, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C = A B, pipelined by num_stages; rows of A and columns of K masked."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), ACC)
    for k0 in range(0, K, BK):
        a = tl.load(a_ptr + m[:, None] * K + (k0 + k)[None, :], mask=(m[:, None] < M) & (k0 + k < K)[None, :], other=0)
        b = tl.load(b_ptr + (k0 + k)[:, None] * N + n[None, :], mask=(k0 + k < K)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty), mask=m[:, None] < M)


LOW_NIBBLES = tl.constexpr("lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;")
SHIFTED_NIBBLES = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 4; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }")


@triton.jit
def nibble_gemm(a_ptr, q_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C = A (Q - 8), two 4-bit codes in the low byte of an int16: code j of word r in a tile is row j * BK / 2 + r.

    A code becomes the float16 1024 + code by bit logic, as in the real kernels, so that inline assembly is run.
    """
    HALF: tl.constexpr = BK // 2
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, HALF)
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(0, K // BK):
        word = tl.load(q_ptr + (t * HALF + k)[:, None] * N + n[None, :])
        a0 = tl.load(a_ptr + m[:, None] * K + (t * BK + k)[None, :], mask=m[:, None] < M, other=0.0)
        low = tl.inline_asm_elementwise(LOW_NIBBLES, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
        acc = tl.dot(a0, low - 1032.0, acc)
        a1 = tl.load(a_ptr + m[:, None] * K + (t * BK + HALF + k)[None, :], mask=m[:, None] < M, other=0.0)
        high = tl.inline_asm_elementwise(SHIFTED_NIBBLES, "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2)
        acc = tl.dot(a1, high - 1032.0, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc, mask=m[:, None] < M)
