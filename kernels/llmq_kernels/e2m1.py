"""Weight-only linear of E2M1: y = x @ W^T (+ bias), W = factor * scale * value(code), for NVFP4 and MXFP4.

For few tokens a program makes a tile of y^T as the integers' kernel does (weight_only.py), in the like layout: K is cut
into tiles of four groups, a sub-dot is one group, and its float32 sums are multiplied by its scale. From 33
on the library multiplies what is decoded to the dtype of x (dense.py): there every sum would cost a multiplication by
a scale for each 16 or 32 columns, more than decoding does, and registers that are not there.

    words  int16 [K / 4, N]      row r of a tile: the codes of the columns j * SUB + r, field j = 0 .. 3, SUB = group
    params int32 [K / 4 SUB, N]  byte j: the bits of the scale of field j, E4M3 (NVFP4) or E8M0 (MXFP4), as in the file
    factor                       what all of them are multiplied by: 1 / divisor of NVFP4

    field  0      1     2     3         The bits of a code lie in a word so that as many as can be found by one shift
    sign   15     12    14    13        and one mask where a float has them. Multiplied by a power of two, they are it,
    value  11-9   8-6   5-3   2-0       exactly: 2 bits of exponent are 5 or 8 bits of which the upper are 0.

A scale of E4M3 is that of a float32 2^-120 times as large, likewise; one of E8M0 is the exponent of a float32 (0 stands
for 0 there, not for 2^-127). Beside it, `reference`. Not here: integers (weight_only.py), how scales are chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import constexpr_function

from llmq_kernels import dense, tune
from llmq_kernels.dense import ROWS
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import OPTIONS, cdiv, direct, operator, uses_asm
from llmq_kernels.layout import N_MULTIPLE, spans_of
from llmq_kernels.product import FEW, Call, Kernel, Launches, check_activation, multiplied

_PLACES = ((15, 9), (12, 6), (14, 3), (13, 0))  # of the sign, and of the lowest bit of the others, in a word
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class E2M1Weight:
    """A weight `[N, K]` for the kernel; see the module.

    group: 16 or 32, the columns of a scale. e8m0: whether scales are E8M0, not E4M3.
    """

    words: Tensor
    params: Tensor
    N: int
    K: int
    group: int
    e8m0: bool
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What of the weight bears on the choice of a configuration."""
        return self.N, self.K, self.group, self.e8m0

    @property
    def Np(self) -> int:
        """N padded."""
        return self.words.shape[1]


@constexpr_function
def _field_text(j, fp16):
    """Return PTX for two lanes: $0 = the sign and the value of field j of $1, where a float has them."""
    sign, low = _PLACES[j]
    to = 9 if fp16 else 6
    mask, shifts = 7 << to, (15 - sign, to - low)
    first, second = (f"{'shl' if s >= 0 else 'shr'}.b32 {r}, $1, {abs(s)};" for r, s in zip("ut", shifts, strict=True))
    if shifts[0] == shifts[1]:
        return f"{{ .reg .b32 u; {first} and.b32 $0, u, 0x{(0x8000 | mask) * 0x10001:08X}; }}"
    signed = "lop3.b32 $0, u, 0x80008000, t, 0xEA;"
    return f"{{ .reg .b32 t, u; {second} and.b32 t, t, 0x{mask * 0x10001:08X}; {first} {signed} }}"


@constexpr_function
def _sign_place(j):
    return _PLACES[j][0]


@constexpr_function
def _value_place(j):
    return _PLACES[j][1]


@triton.jit
def e2m1(w, j: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return the values of field j of an int16 tile, fp16 or bf16, exactly."""
    text: tl.constexpr = _field_text(j, dtype == tl.float16)
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2) * (2.0**14)
    elif ASM:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2) * (2.0**126)
    else:
        code = (w >> _value_place(j)) & 7
        twice = code + tl.maximum(code - 4, 0) + 2 * tl.maximum(code - 6, 0)
        twice = tl.where((w >> _sign_place(j)) & 1 != 0, -twice, twice)
        return (twice.to(tl.float32) * 0.5).to(dtype)


@triton.jit
def scale_of_field(word, j: tl.constexpr, E8M0: tl.constexpr):
    """Return the float32 scale of field j of a parameter word."""
    bits = (word >> (8 * j)) & 0xFF
    if E8M0:
        return (bits << 23).to(tl.float32, bitcast=True)
    else:
        return (bits << 20).to(tl.float32, bitcast=True) * (2.0**120)


@triton.jit
def e2m1_sums(
    x_ptrs,  # [SUB, BM], of the activations at the first of these tiles; fp16 or bf16
    x_mask,  # [1, BM]
    w_ptrs,  # [BN, SUB], of the words there
    param_ptr,
    offs_n,
    NP,
    begin,
    end,
    dtype: tl.constexpr,
    SUB: tl.constexpr,
    E8M0: tl.constexpr,
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return the float32 sums `[BN, BM]` of the tiles of K from `begin` to before `end`, scaled but for the factor."""
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for t in tl.range(begin, end, num_stages=STAGES):
        w = tl.load(w_ptrs)
        word = tl.load(param_ptr + t * NP + offs_n)
        for j in tl.static_range(4):
            x = tl.load(x_ptrs + j * SUB, mask=x_mask, other=0.0)
            part = tl.dot(e2m1(w, j, dtype, ASM), x)
            acc += part * scale_of_field(word, j, E8M0)[:, None]
        x_ptrs += 4 * SUB
        w_ptrs += SUB * NP
    return acc


@triton.jit(do_not_specialize=["M"])
def e2m1_kernel(
    x_ptr,  # [M, K] fp16 or bf16
    w_ptr,  # [K / 4, NP] int16
    param_ptr,  # [K / (4 SUB), NP] int32
    bias_ptr,  # [N], in x's dtype, if HAS_BIAS
    y_ptr,  # [M, N] in x's dtype or float32, or partials [SPLIT_K, M, N] float32
    factor,
    M,
    N,
    NP,
    K,
    SUB: tl.constexpr,
    E8M0: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of y, or of one split's partial. K and NP are padded; N is not."""
    BK: tl.constexpr = 4 * SUB
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
    w_ptrs = w_ptr + (begin * SUB + offs_r)[None, :] * NP + offs_n[:, None]
    acc = e2m1_sums(
        x_ptrs, x_mask, w_ptrs, param_ptr, offs_n, NP, begin, end, dtype, SUB, E8M0, ASM, BM, BN, STAGES
    )  # fmt: skip
    acc *= factor
    if HAS_BIAS and SPLIT_K == 1:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=x_mask & (offs_n[:, None] < N))


@triton.jit(do_not_specialize=["FIRST", "N"])
def decode_kernel(
    w_ptr,  # [K / 4, NP] int16
    param_ptr,  # [K / (4 SUB), NP] int32
    out_ptr,  # [N, K] fp16, bf16 or float32: the rows of W from FIRST on
    factor,
    FIRST,
    N,
    NP,
    K,
    SUB: tl.constexpr,
    E8M0: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
):
    """Decode a tile of BN rows and 4 SUB columns, rounded once. NP is padded; N and K are not."""
    t = tl.program_id(1)
    offs_n, offs_r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, SUB)
    w = tl.load(w_ptr + (t * SUB + offs_r)[None, :] * NP + (FIRST + offs_n)[:, None])
    word = tl.load(param_ptr + t * NP + FIRST + offs_n)
    for j in tl.static_range(4):
        values = e2m1(w, j, tl.float16, ASM).to(tl.float32) * (scale_of_field(word, j, E8M0) * factor)[:, None]
        offs_k = (t * 4 + j) * SUB + offs_r
        at = out_ptr + offs_n[:, None] * K + offs_k[None, :]
        tl.store(at, values.to(out_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def pack(codes_NK: Tensor, scale_NG: Tensor, *, e8m0: bool, factor: float = 1.0) -> E2M1Weight:
    """Pack codes, the bits of E2M1 in uint8, and the bits of scales, uint8, for 16 or 32 columns.

    Raises KernelError for shapes that the kernel cannot take, and for scales that are negative, NaN or infinite.
    """
    check(codes_NK, scale_NG, e8m0=e8m0)
    (N, K), G = codes_NK.shape, scale_NG.shape[1]
    group = K // G
    Gp, Np = -(-G // 4) * 4, -(-N // N_MULTIPLE) * N_MULTIPLE
    codes = F.pad(codes_NK, (0, Gp * group - K, 0, Np - N)).t().reshape(-1, 4, group, Np).int()
    words = torch.zeros(len(codes), group, Np, dtype=torch.int32, device=codes.device)
    for j, (sign, low) in enumerate(_PLACES):
        words |= (codes[:, j] >> 3) << sign | (codes[:, j] & 7) << low
    scales = F.pad(scale_NG, (0, Gp - G, 0, Np - N)).reshape(Np, -1, 4).contiguous().view(torch.int32)
    params = scales.squeeze(-1).t().contiguous()
    return E2M1Weight(words.to(torch.int16).reshape(-1, Np), params, N, K, group, e8m0, factor)


def check(codes_NK: Tensor, scale_NG: Tensor, *, e8m0: bool) -> None:
    """Raise the KernelError that `pack` would raise, without packing."""
    (N, K), G = codes_NK.shape, scale_NG.shape[1]
    if codes_NK.dtype != torch.uint8 or scale_NG.dtype != torch.uint8 or scale_NG.shape[0] != N:
        said = f"{codes_NK.dtype} {list(codes_NK.shape)} and {scale_NG.dtype} {list(scale_NG.shape)}"
        raise KernelError(f"codes must be uint8 [N, K] and scales uint8 [N, G], not {said}")
    if K % G or K // G not in (16, 32):
        raise KernelError(f"{G} groups over K = {K} are not groups of 16 or 32 columns, which the E2M1 kernel needs")
    if -(-K // 128) * 32 * -(-N // N_MULTIPLE) * N_MULTIPLE >= 2**31:
        raise KernelError(f"N x K = {N} x {K} is beyond the kernel's 32-bit offsets; split N")
    if int(codes_NK.max()) >= 16:
        raise KernelError(f"a code is {int(codes_NK.max())}, beyond 4 bits")
    if int(scale_NG.max()) > (254 if e8m0 else 126):
        raise KernelError("a scale is negative or not a number; quantize again")


def unpack(w: E2M1Weight) -> tuple[Tensor, Tensor]:
    """Return codes and the bits of scales, uint8 `[N, K]` and `[N, G]`, exactly."""
    words = w.words.reshape(-1, w.group, w.words.shape[1]).int()
    fields = [(words >> sign & 1) << 3 | words >> low & 7 for sign, low in _PLACES]
    codes = torch.stack(fields, 1).to(torch.uint8).reshape(-1, words.shape[2]).t()[: w.N, : w.K]
    params = w.params.t().clone(memory_format=torch.contiguous_format)  # one row of wider ones is contiguous as it is
    scales = params.view(torch.uint8)[: w.N, : w.K // w.group]
    return codes.contiguous(), scales.contiguous()


def join(weights: Sequence[E2M1Weight]) -> tuple[E2M1Weight, list[E2M1Weight]]:
    """Return weights of one activation as one, and each as a part of it; see `layout.join`.

    Raises KernelError for weights that differ in K, groups, kind of scales or factor.
    """
    first = weights[0]
    if len({(w.shape[1:], w.factor) for w in weights}) > 1:
        raise KernelError("weights that differ in K, groups, kind of scales or factor are not one weight")
    words, params = (torch.cat([getattr(w, n) for w in weights], 1) for n in ("words", "params"))
    spans = spans_of([w.Np for w in weights])
    parts = [replace(w, words=words[:, at], params=params[:, at]) for w, at in zip(weights, spans, strict=True)]
    return replace(first, words=words, params=params, N=spans[-1].start + weights[-1].N), parts


def dequantize(w: E2M1Weight) -> Tensor:
    """Return the weight that the kernel multiplies with, float32 `[N, K]`."""
    codes, bits = unpack(w)
    values = torch.tensor([*_VALUES, *(-v for v in _VALUES)], device=codes.device)[codes.int()]
    scale = (bits.int() << 23).view(torch.float32) if w.e8m0 else bits.view(torch.float8_e4m3fn).float()
    return values * (scale * w.factor).repeat_interleave(w.group, 1)


def reference(x: Tensor, w: E2M1Weight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` computed in float32 and rounded once to the dtype of x."""
    if not x.numel():  # an expert without tokens decodes nothing
        return x.new_zeros(*x.shape[:-1], w.N)
    return F.linear(x.float(), dequantize(w), None if bias is None else bias.float()).to(x.dtype)


def linear(x: Tensor, w: E2M1Weight, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32; any float on the CPU) to `[..., N]` in its dtype; bias `[N]`.

    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    if direct(x):
        return compute(x, w, bias)
    return torch.ops.llmq.e2m1_linear(x, w.words, w.params, bias, *w.shape, w.factor)


def compute(x: Tensor, w: E2M1Weight, bias: Tensor | None = None) -> Tensor:
    """See `linear`: what the operator does."""
    return multiplied(x, w, bias, _KERNEL)


@operator("llmq::e2m1_linear")
def _op(
    x: Tensor, words: Tensor, params: Tensor, bias: Tensor | None, n: int, k: int, group: int, e8m0: bool, factor: float
) -> Tensor:
    return compute(x, E2M1Weight(words, params, n, k, group, e8m0, factor), bias)


@torch.library.register_fake("llmq::e2m1_linear")
def _(x, words, params, bias, n, k, group, e8m0, factor):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], n)


def decode(w: E2M1Weight, out: Tensor, first: int) -> None:
    """Fill `out` `[rows, K]`, fp16, bf16 or float32, with the rows of W from `first` on, a multiple of ROWS."""
    rows, Np = w.words.shape[0], w.words.stride(0)
    sizes = {"SUB": w.group, "E8M0": w.e8m0, "ASM": uses_asm(), "BN": ROWS}
    decode_kernel[cdiv(len(out), ROWS), rows // w.group](
        w.words, w.params, out, w.factor, first, len(out), Np, w.K, **sizes, **OPTIONS
    )


def configs(M: int, w: E2M1Weight, *, asm: bool | None = None) -> list[tune.Config]:
    """Return the configurations worth trying for M tokens, the safest guess first; asm: as for `constants`.

    They are like those of the integers' kernel (weight_only.py), with room for the registers of more sums.
    """
    if M > FEW:
        return [tune.LIBRARY]
    asm = uses_asm() if asm is None else asm
    tiles = w.words.shape[0] // w.group
    split = max(1, min(8, tiles // 4))
    BM, Config = 8 if M <= 8 and asm else 16, tune.Config
    found = [Config(8, 128, s, 2, 4, 168) for s in (split, split // 2, 1)] if BM == 8 else []
    found += [Config(BM, 64, s, 2, 4, 144) for s in (split, split // 2, 1)]
    found += [Config(BM, 128, s, 4, 4) for s in (split, 1)]
    return list(dict.fromkeys(c for c in found if c.split_k >= 1))


def launch(
    x: Tensor, w: E2M1Weight, bias: Tensor | None, config: tune.Config, dtype: torch.dtype | None = None
) -> Tensor:
    """Run a given configuration on fp16 or bf16 `x` `[..., K]`, the library's on float32 too.

    Returns `[..., N]` in `dtype`, else x's.
    """
    if config == tune.LIBRARY:
        return dense.product(x, w.N, functools.partial(decode, w), bias)
    return planned(x, w, config, bias is not None, dtype)(x, w, bias)


def planned(x: Tensor, w: E2M1Weight, config: tune.Config, has_bias: bool, dtype: torch.dtype | None = None) -> Call:
    """Return what launches a configuration on activations and weights like `x` and `w`."""
    rows, Np = w.words.shape[0], w.words.stride(0)
    fixed = constants(w, config, has_bias=has_bias) | config.options()
    shape = *x.shape[:-1], w.N
    launches = Launches(x, shape, (Np, 4 * rows), config, fixed, dtype or x.dtype, late_bias=has_bias)
    return lambda x, w, bias: launches(e2m1_kernel, x, w.words, w.params, bias, w.factor)


_KERNEL = Kernel("e2m1", reference, configs, launch, planned, check_activation)


def constants(w: E2M1Weight, config: tune.Config, *, has_bias: bool = False, asm: bool | None = None) -> dict:
    """Return the compile-time arguments of the kernel for a weight and a configuration."""
    tiles = {"SPLIT_K": config.split_k, "BM": config.BM, "BN": config.BN, "STAGES": config.stages}
    asm = uses_asm() if asm is None else asm
    return {"SUB": w.group, "E8M0": w.e8m0, "HAS_BIAS": has_bias, "ASM": asm} | tiles
