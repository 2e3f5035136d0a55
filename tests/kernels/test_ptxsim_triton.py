"""Compiled Triton kernels in the simulator: answers, traffic, and that every deliberate fault is caught.

The kernels are small ones of our own (ptx_toys.py): what they compute is known exactly or to a rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import ptx_toys
import pytest
import torch
import triton.language as tl
from ptxsim import PtxError, Run
from ptxsim.launch import SimulatedKernel

Mutation = Callable[[str], str]


def unchanged(ptx: str) -> str:
    return ptx


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def simulate(kernel, grid, *args, mutate: Mutation = unchanged, **named) -> Run:
    """Launch a kernel on tensors, which it changes in place; return what was seen."""
    simulated = SimulatedKernel(kernel, mutate=mutate)
    simulated[grid](*args, enable_fp_fusion=True, **named)
    return simulated.launches[0].run


# Elementwise, reductions, loops of different lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vector_add_leaves_the_tail_alone(dtype):
    x, y, out = normal(1000, dtype=dtype), normal(1000, dtype=dtype, seed=1), torch.full((1000,), 7, dtype=dtype)
    kept = x.clone()
    run = simulate(ptx_toys.vector_add, (4,), x, y, out, 997, SIZE=256, num_warps=2)
    assert not run.faults
    assert torch.equal(out, torch.cat([(x + y)[:997], torch.full((3,), 7, dtype=dtype)]))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_across_warps(dtype):
    x, out = normal(3, 500, dtype=dtype) * 4, torch.zeros(3, 500)
    run = simulate(ptx_toys.row_softmax, (3,), x, out, 500, SIZE=512, num_warps=4)
    assert not run.faults
    torch.testing.assert_close(out, x.float().softmax(-1), rtol=2e-6, atol=0)


def test_quantized_rows_round_as_the_reference_does():
    x, q, scale = normal(5, 391, dtype=torch.bfloat16), torch.zeros(5, 391, dtype=torch.int8), torch.zeros(5)
    run = simulate(ptx_toys.quantize_rows, (5,), x, q, scale, 391, SIZE=512, num_warps=4)
    torch.testing.assert_close(scale, x.float().abs().amax(1) / 127, rtol=2**-22, atol=0)
    want = (x.float() / scale[:, None] + 0.5).floor().clamp(-128, 127).to(torch.int8)
    assert torch.equal(q, want) and not run.faults


def test_ctas_that_loop_differently():
    x, out = torch.arange(600, dtype=torch.float32), torch.zeros(5)
    run = simulate(ptx_toys.triangle_sums, (5,), x, out, 600, SIZE=128, num_warps=2)
    assert out.tolist() == [x[: (p + 1) * 128].sum().item() for p in range(5)]
    assert not run.faults


# Matrix products


def gemm(
    dtype: torch.dtype, out: torch.dtype, shape: tuple[int, int, int], mutate: Mutation = unchanged, **options: int
) -> tuple[Run, float]:
    """Return the run and its largest error, relative to the largest entry of |A| |B|."""
    M, N, K = shape
    if dtype == torch.int8:
        draw = torch.Generator().manual_seed(0)
        A = torch.randint(-128, 128, (M, K), generator=draw, dtype=dtype)
        B = torch.randint(-128, 128, (K, N), generator=draw, dtype=dtype)
    else:
        A, B = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, seed=1)
    C = torch.zeros(M, N, dtype=out)
    constants = {"ACC": tl.int32 if dtype == torch.int8 else tl.float32, "BM": 32, "BN": 64, "BK": 64}
    options = {"num_warps": 4, "num_stages": 3} | options
    run = simulate(ptx_toys.gemm, (-(-M // 32), N // 64), A, B, C, M, N, K, mutate=mutate, **constants, **options)
    error = (C.double() - A.double() @ B.double()).abs().max()
    return run, (error / (A.double().abs() @ B.double().abs()).max()).item()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm(dtype, stages):
    run, error = gemm(dtype, torch.float32, (37, 64, 256), num_stages=stages)
    assert not run.faults
    assert error < 1e-7
    assert any(f".f32.{'f16' if dtype == torch.float16 else 'bf16'}." in op for op in run.executed)


def test_gemm_int8_is_exact():
    run, error = gemm(torch.int8, torch.int32, (40, 128, 192))
    assert error == 0 and not run.faults


def test_gemm_tf32_reads_ten_bits_of_fraction():
    run, error = gemm(torch.float32, torch.float32, (32, 64, 128), num_stages=2)
    assert 1e-6 < error < 2**-10 and not run.faults


def test_gemm_with_a_tail_in_k_and_eight_warps():
    run, error = gemm(torch.float16, torch.float16, (33, 64, 144), num_warps=8)
    assert error < 2**-11 and not run.faults


def test_gemm_traffic_is_each_tile_once():
    run, _ = gemm(torch.float16, torch.float32, (64, 128, 256))
    a, b, c = (run.traffic(n, k) for n, k in (("a_ptr", "load"), ("b_ptr", "load"), ("c_ptr", "store")))
    assert a.sectors * 32 == 2 * 64 * 256 * 2  # two column tiles read all of A
    assert b.sectors * 32 == 2 * 256 * 128 * 2
    assert c.sectors * 32 == 64 * 128 * 4
    assert (a.distinct * 32, b.distinct * 32) == (64 * 256 * 2, 256 * 128 * 2)
    for kind in ("cp.async", "ldmatrix"):  # Triton swizzles both free of conflicts
        assert run.wavefronts[kind].actual == run.wavefronts[kind].ideal > 0


# Inline assembly


def nibble_gemm(mutate: Mutation = unchanged) -> tuple[Run, float]:
    M, N, K, half = 13, 128, 256, 32
    Q = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(0))
    tiles = Q.view(K // 64, 2, half, N)
    words = (tiles[:, 0] | tiles[:, 1] << 4).reshape(K // 2, N).to(torch.int16)
    A, C = normal(M, K, dtype=torch.float16), torch.zeros(M, N)
    constants = {"BM": 16, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    run = simulate(ptx_toys.nibble_gemm, (1, 2), A, words, C, M, N, K, mutate=mutate, **constants)
    want = A.double() @ (Q.double() - 8)
    return run, ((C - want).abs().max() / want.abs().max()).item()


def test_inline_assembly():
    run, error = nibble_gemm()
    assert error < 1e-6 and not run.faults
    assert run.executed["lop3.b32"] > 0
    assert run.traffic("q_ptr").sectors * 32 == 128 * 128 * 2


# Mutations: a fault put into the PTX must be seen, and by the check that is there for it


def nth(pattern: str, n: int, replacement: str) -> Mutation:
    """Return a mutation of the n-th match of a pattern (from 0; -1 is the last)."""

    def mutate(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[n]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    return mutate


def everywhere(pattern: str, replacement: str) -> Mutation:
    def mutate(ptx: str) -> str:
        changed, count = re.subn(pattern, replacement, ptx)
        assert count, f"nothing matches {pattern}"
        return changed

    return mutate


def verdict(run: Callable[[Mutation], tuple[Run, float]], mutate: Mutation, limit: float) -> str:
    """Say how a kernel fails: `error`, `fault`, `answer`; `none` where it does not."""
    try:
        seen, error = run(mutate)
    except PtxError:
        return "error"
    if seen.faults:
        return "fault"
    return "answer" if not error < limit else "none"


def half_gemm(mutate: Mutation) -> tuple[Run, float]:
    return gemm(torch.float16, torch.float32, (37, 64, 240), mutate)


GEMM_MUTATIONS = {
    "barrier before the next copies dropped": (nth(r"\tbar\.sync \t0;(?=[^$]*cp\.async\.c[ag]\.)", -1, ""), "fault"),
    "barriers after the waits dropped": (everywhere(r"(wait_group \t\d+;\n)\tbar\.sync \t0;", r"\1"), "fault"),
    "last barrier dropped": (nth(r"\tbar\.sync \t0;", -1, ""), "fault"),
    "every wait_group dropped": (everywhere(r"cp\.async\.wait_group \t\d+;", ""), "fault"),
    "every wait_group one group short": (everywhere(r"(cp\.async\.wait_group \t)2;", r"\g<1>4;"), "fault"),
    "one commit_group dropped": (nth(r"\tcp\.async\.commit_group;", -1, ""), "fault"),
    "ldmatrix not transposed": (everywhere(r"\.trans\.shared", ".shared"), "answer"),
    "lane mapping swapped": (nth(r"(ldmatrix\S+ \{%r\d+), (%r\d+), (%r\d+)", 0, r"\1, \3, \2"), "answer"),
    "A fragments swapped": (nth(r"(mma\S+ \{[^}]*\}, \{ %r\d+), (%r\d+), (%r\d+)", 0, r"\1, \3, \2"), "answer"),
    "B fragments swapped": (nth(r"(mma\S+ \{[^}]*\}, \{[^}]*\}, \{) (%r\d+), (%r\d+)", 0, r"\1 \3, \2"), "answer"),
    "mma of the wrong type": (nth(r"f32\.f16\.f16\.f32", 0, "f32.bf16.bf16.f32"), "answer"),
    "mma of the wrong shape": (nth(r"m16n8k16", 0, "m16n8k8"), "error"),
    "row predicate inverted": (nth(r"@(%p\d+) st\.global", 0, r"@!\1 st.global"), "error"),
    "row bound off by one": (everywhere(r"setp\.lt\.s32 (\t%p\d+, %r\d+, %r\d+;)", r"setp.le.s32 \1"), "error"),
    "copy from a wrong offset": (nth(r"add\.s64 (\t%rd\d+, %rd\d+), 128;", 0, r"add.s64 \1, 64;"), "answer"),
    "swizzle of the fragment reads changed": (nth(r"xor\.b32 (\t%r\d+, %r\d+), 32;", 0, r"xor.b32 \1, 48;"), "answer"),
    "address one word off": (nth(r"(cp\.async\.cg\S+ \[ %r\d+ \+) 0", 0, r"\1 8"), "error"),
}


def test_the_unchanged_gemm_passes():
    assert verdict(half_gemm, unchanged, 1e-7) == "none"


@pytest.mark.parametrize("name", GEMM_MUTATIONS)
def test_a_mutated_gemm_is_caught(name):
    mutate, expected = GEMM_MUTATIONS[name]
    assert verdict(half_gemm, mutate, 1e-7) == expected


NIBBLE_MUTATIONS = {
    "lop3 mask": (nth(r"0x000F000F", 0, "0x000F00F0"), "answer"),
    "lop3 table": (nth(r"0xEA", 0, "0xE8"), "answer"),
    "lop3 exponent": (nth(r"0x64006400", 0, "0x64006000"), "answer"),
    "shift of the upper nibble": (nth(r"shr\.u32 t, (%r\d+), 4;", 0, r"shr.u32 t, \1, 5;"), "answer"),
    "inner register lost": (nth(r"lop3\.b32 (%r\d+), t,", 0, r"lop3.b32 \1, %r1,"), "answer"),
    "bias": (everywhere(r"0xE408", "0xE409"), "answer"),
    "predicate of the copies": (
        everywhere(r"selp\.b32 (\t%r\d+), (\S+), 0, (%p\d+);", r"selp.b32 \1, 0, \2, \3;"),
        "error",
    ),
}


@pytest.mark.parametrize("name", NIBBLE_MUTATIONS)
def test_mutated_inline_assembly_is_caught(name):
    mutate, expected = NIBBLE_MUTATIONS[name]
    assert verdict(nibble_gemm, mutate, 1e-6) == expected
