"""Compiled Triton kernels in the simulator: answers, traffic, and that every deliberate fault is caught.

The kernels are small ones of our own (ptx_toys.py): what they compute is known exactly or to a rounding.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import ptx_toys
import pytest
import torch
import triton.language as tl
from ptxsim import PtxError
from ptxsim.launch import Compiled, Launch, compile_sm80, launch

SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32", torch.float32: "fp32"}
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
"""Half a unit in the last place, relative: what one rounding may cost."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Elementwise, reductions, loops of different lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_vector_add_leaves_the_tail_alone(dtype):
    pointer = "*" + SHORT[dtype]
    signature = {"x_ptr": pointer, "y_ptr": pointer, "out_ptr": pointer, "n": "i32"}
    built = compile_sm80(ptx_toys.vector_add, signature, {"SIZE": 256}, ("x_ptr", "y_ptr", "out_ptr"), num_warps=2)
    x, y, out = normal(1000, dtype=dtype), normal(1000, dtype=dtype, seed=1), torch.full((1000,), 7, dtype=dtype)
    done = launch(built, (4,), {"x_ptr": x, "y_ptr": y, "out_ptr": out, "n": 997})
    assert not done.run.faults
    assert torch.equal(done.tensors["out_ptr"], torch.cat([(x + y)[:997], out[997:]]))
    assert torch.equal(done.tensors["x_ptr"], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_across_warps(dtype):
    signature = {"x_ptr": "*" + SHORT[dtype], "out_ptr": "*fp32", "N": "i32"}
    built = compile_sm80(ptx_toys.row_softmax, signature, {"SIZE": 512}, ("x_ptr", "out_ptr"), num_warps=4)
    x = normal(3, 500, dtype=dtype) * 4
    done = launch(built, (3,), {"x_ptr": x, "out_ptr": torch.zeros(3, 500), "N": 500})
    assert not done.run.faults
    torch.testing.assert_close(done.tensors["out_ptr"], x.float().softmax(-1), rtol=2e-6, atol=0)


def test_quantized_rows_round_as_the_reference_does():
    signature = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32"}
    built = compile_sm80(ptx_toys.quantize_rows, signature, {"SIZE": 512}, ("x_ptr", "q_ptr"), num_warps=4)
    x = normal(5, 391, dtype=torch.bfloat16)
    args = {"x_ptr": x, "q_ptr": torch.zeros(5, 391, dtype=torch.int8), "scale_ptr": torch.zeros(5), "K": 391}
    done = launch(built, (5,), args)
    scale = done.tensors["scale_ptr"]
    torch.testing.assert_close(scale, x.float().abs().amax(1) / 127, rtol=2**-22, atol=0)
    want = (x.float() / scale[:, None] + 0.5).floor().clamp(-128, 127).to(torch.int8)
    assert torch.equal(done.tensors["q_ptr"], want) and not done.run.faults


def test_ctas_that_loop_differently():
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32"}
    built = compile_sm80(ptx_toys.triangle_sums, signature, {"SIZE": 128}, ("x_ptr", "out_ptr"), num_warps=2)
    x = torch.arange(600, dtype=torch.float32)
    done = launch(built, (5,), {"x_ptr": x, "out_ptr": torch.zeros(5), "N": 600})
    assert done.tensors["out_ptr"].tolist() == [x[: (p + 1) * 128].sum().item() for p in range(5)]
    assert not done.run.faults


# Matrix products


@functools.cache
def gemm(dtype: torch.dtype, out: torch.dtype, stages: int, warps: int = 4, tile: tuple[int, int, int] = (32, 64, 64)):
    pointer = "*" + SHORT[dtype]
    signature = {"a_ptr": pointer, "b_ptr": pointer, "c_ptr": "*" + SHORT[out], "M": "i32", "N": "i32", "K": "i32"}
    acc = tl.int32 if dtype == torch.int8 else tl.float32
    constants = {"ACC": acc, "BM": tile[0], "BN": tile[1], "BK": tile[2]}
    aligned = ("a_ptr", "b_ptr", "c_ptr", "N", "K")
    return compile_sm80(ptx_toys.gemm, signature, constants, aligned, num_warps=warps, num_stages=stages)


def run_gemm(built: Compiled, dtype: torch.dtype, out: torch.dtype, M: int, N: int, K: int) -> tuple[Launch, float]:
    """Return the launch and its largest error, relative to the largest entry of |A| |B|."""
    if dtype == torch.int8:
        draw = torch.Generator().manual_seed(0)
        A = torch.randint(-128, 128, (M, K), generator=draw, dtype=dtype)
        B = torch.randint(-128, 128, (K, N), generator=draw, dtype=dtype)
    else:
        A, B = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, seed=1)
    args = {"a_ptr": A, "b_ptr": B, "c_ptr": torch.zeros(M, N, dtype=out), "M": M, "N": N, "K": K}
    done = launch(built, (-(-M // 32), N // 64), args)
    error = (done.tensors["c_ptr"].double() - A.double() @ B.double()).abs().max()
    return done, (error / (A.double().abs() @ B.double().abs()).max()).item()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm(dtype, stages):
    done, error = run_gemm(gemm(dtype, torch.float32, stages), dtype, torch.float32, 37, 64, 256)
    assert not done.run.faults
    assert error < 1e-7
    assert any(f".f32.{'f16' if dtype == torch.float16 else 'bf16'}." in op for op in done.run.executed)


def test_gemm_int8_is_exact():
    done, error = run_gemm(gemm(torch.int8, torch.int32, 3), torch.int8, torch.int32, 40, 128, 192)
    assert error == 0 and not done.run.faults


def test_gemm_tf32_reads_ten_bits_of_fraction():
    done, error = run_gemm(gemm(torch.float32, torch.float32, 2), torch.float32, torch.float32, 32, 64, 128)
    assert 1e-6 < error < 2**-10 and not done.run.faults


def test_gemm_with_a_tail_in_k_and_eight_warps():
    done, error = run_gemm(gemm(torch.float16, torch.float16, 3, 8), torch.float16, torch.float16, 33, 64, 144)
    assert error < UNIT[torch.float16] and not done.run.faults


def test_gemm_traffic_is_each_tile_once():
    done, _ = run_gemm(gemm(torch.float16, torch.float32, 3), torch.float16, torch.float32, 64, 128, 256)
    a, b, c = (done.run.traffic(n, k) for n, k in (("a_ptr", "load"), ("b_ptr", "load"), ("c_ptr", "store")))
    assert a.sectors * 32 == 2 * 64 * 256 * 2  # two column tiles read all of A
    assert b.sectors * 32 == 2 * 256 * 128 * 2
    assert c.sectors * 32 == 64 * 128 * 4
    assert (a.distinct * 32, b.distinct * 32) == (64 * 256 * 2, 256 * 128 * 2)
    for kind in ("cp.async", "ldmatrix"):  # Triton swizzles both free of conflicts
        assert done.run.wavefronts[kind].actual == done.run.wavefronts[kind].ideal > 0


# Inline assembly


@functools.cache
def nibble_gemm() -> Compiled:
    signature = {"a_ptr": "*fp16", "q_ptr": "*i16", "c_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"BM": 16, "BN": 64, "BK": 64}
    aligned = ("a_ptr", "q_ptr", "c_ptr", "N", "K")
    return compile_sm80(ptx_toys.nibble_gemm, signature, constants, aligned, num_warps=4, num_stages=3)


def run_nibbles(built: Compiled) -> tuple[Launch, float]:
    M, N, K, half = 13, 128, 256, 32
    Q = torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(0))
    tiles = Q.view(K // 64, 2, half, N)
    words = (tiles[:, 0] | tiles[:, 1] << 4).reshape(K // 2, N).to(torch.int16)
    A = normal(M, K, dtype=torch.float16)
    args = {"a_ptr": A, "q_ptr": words, "c_ptr": torch.zeros(M, N), "M": M, "N": N, "K": K}
    done = launch(built, (1, 2), args)
    want = A.double() @ (Q.double() - 8)
    return done, ((done.tensors["c_ptr"] - want).abs().max() / want.abs().max()).item()


def test_inline_assembly():
    done, error = run_nibbles(nibble_gemm())
    assert error < 1e-6 and not done.run.faults
    assert done.run.executed["lop3.b32"] > 0
    packed = done.run.traffic("q_ptr")
    assert packed.sectors * 32 == 128 * 128 * 2


# Mutations: a fault put into the PTX must be seen, and by the check that is there for it


def nth(pattern: str, n: int, replacement: str) -> Callable[[str], str]:
    """Return a mutation of the n-th match of a pattern (from 0; -1 is the last)."""

    def mutate(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[n]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    return mutate


def everywhere(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda ptx: re.sub(pattern, replacement, ptx)


def verdict(run: Callable[[Compiled], tuple[Launch, float]], built: Compiled, limit: float) -> str:
    """Say how a kernel fails: `error`, `fault`, `answer`; `none` where it does not."""
    try:
        done, error = run(built)
    except PtxError:
        return "error"
    if done.run.faults:
        return "fault"
    return "answer" if not error < limit else "none"


def half_gemm(built: Compiled) -> tuple[Launch, float]:
    return run_gemm(built, torch.float16, torch.float32, 37, 64, 240)


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
    assert verdict(half_gemm, gemm(torch.float16, torch.float32, 3), 1e-7) == "none"


@pytest.mark.parametrize("name", GEMM_MUTATIONS)
def test_a_mutated_gemm_is_caught(name):
    mutate, expected = GEMM_MUTATIONS[name]
    built = gemm(torch.float16, torch.float32, 3)
    mutated = replace(built, ptx=mutate(built.ptx))
    assert mutated.ptx != built.ptx
    assert verdict(half_gemm, mutated, 1e-7) == expected


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
    built = nibble_gemm()
    mutated = replace(built, ptx=mutate(built.ptx))
    assert mutated.ptx != built.ptx
    assert verdict(run_nibbles, mutated, 1e-6) == expected
