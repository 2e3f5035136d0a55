"""Grouped weight-only linear: y = x @ W_e^T (+ bias_e) for the experts of a layer, all tokens of all of them at once.

    pair p of token p // k and expert e (routing.py):   y[p // k, p % k] = x[p // k] @ W_e^T + bias_e

One program makes a tile [BN, BM] of y^T of one expert: the rows of x are fetched, and those of y stored, by the numbers
of its pairs, so that nothing is sorted but these. What it sums is `weight_only.sums`, or for NVFP4 and MXFP4
`e2m1.e2m1_sums`, of the same words: those of an expert lie behind the last one's. A pair that is sent to no expert has
a row of zeros. Split over K as there; the bias is in the first split's sums. There is no library for many tokens: a
tile of 64 (of E2M1 16) decodes what it meets, and an expert has only its part of the tokens.

Beside it: `reference`, one expert after the other; it is what the op does with CPU tensors.
Not here: where the activation lies between the two products of an expert, and what sums its tokens (llmq/runtime).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from llmq_kernels import e2m1, layout, tune, weight_only
from llmq_kernels.dequant import fields_of, zeros_beside
from llmq_kernels.e2m1 import E2M1Weight, e2m1_sums
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import cdiv, direct, operator
from llmq_kernels.layout import REVISION, PackedWeight, spans_of
from llmq_kernels.product import FEW, Call, Kernel, Launches, check_activation, multiplied
from llmq_kernels.routing import Plan, slots, tile_of
from llmq_kernels.weight_only import sums


@dataclass(frozen=True)
class StackedWeight:
    """The weights `[N, K]` of a layer's experts, alike in all that a kernel fixes.

    words: int16 `[E, K * bits / 16, Np]`; params: `[E, G, Np]`, as of one weight. one: that of expert 0.
    factors: float32 `[E, Np]`, what sums of E2M1 are multiplied by; None of integers.
    """

    words: Tensor
    params: Tensor
    one: PackedWeight | E2M1Weight
    factors: Tensor | None = None

    def dequantize(self, e: int) -> Tensor:
        """Return the weight of an expert that the kernel multiplies with, float32 `[N, K]`."""
        one = replace(self.one, words=self.words[e], params=self.params[e])
        W = _kind(self.one).dequantize(one)
        return W if self.factors is None else W * self.factors[e, : self.one.N, None]


@dataclass(frozen=True)
class Routed:
    """The weights of experts and who reads them, in the place of one weight."""

    weight: StackedWeight
    plan: Plan

    @property
    def N(self) -> int:
        """Output features of an expert."""
        return self.weight.one.N

    @property
    def K(self) -> int:
        """Input features of an expert."""
        return self.weight.one.K

    @property
    def words(self) -> Tensor:
        """Codes of all experts."""
        return self.weight.words

    @property
    def shape(self) -> tuple[Any, ...]:
        """What is no tensor and bears on the choice of a configuration."""
        return *self.weight.one.shape, self.plan.experts, self.plan.top


@triton.jit(do_not_specialize=["E", "TOP", "M"])
def grouped_kernel(
    x_ptr,  # [M / TOP, K] fp16 or bf16
    w_ptr,  # [E, K * BITS / 16, NP] int16, as of one weight
    param_ptr,  # [E, K / GROUP, NP] int32, or floats
    bias_ptr,  # [E + 1, N], in x's dtype, if HAS_BIAS
    y_ptr,  # [M, N] in x's dtype or float32, or partials [SPLIT_K, M, N] float32
    order_ptr,  # [M] int32
    begin_ptr,  # [E + 2] int32
    factor_ptr,  # [E, NP] float32, or None
    param_stride,
    E,
    TOP,
    M,
    N,
    NP,
    K,
    EP: tl.constexpr,
    BITS: tl.constexpr,
    SUB: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    E2M1: tl.constexpr,
    E8M0: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of an expert's rows of y, or of one split's partial. K and NP are padded; N is not."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BK: tl.constexpr = SUB * fields_of(BITS)
    ROWS: tl.constexpr = BK * BITS // 16 + zeros_beside(HAS_ZERO, param_ptr.dtype.element_ty)
    # Slots run fastest: those of one expert are neighbours, and read the same words.
    count = M // BM + tl.minimum(E + 1, M)
    expert, first, last = tile_of(begin_ptr, tl.program_id(0) % count, E, EP, BM)
    if first >= last:
        return
    offs_n = tl.program_id(0) // count * BN + tl.arange(0, BN)
    offs_r = tl.arange(0, SUB)
    x_mask = (first + tl.arange(0, BM))[None, :] < last
    pair = tl.load(order_ptr + first + tl.arange(0, BM), mask=first + tl.arange(0, BM) < last, other=0)
    split = tl.program_id(1)
    tiles = K // BK
    per_split = tl.cdiv(tiles, SPLIT_K)
    begin = split * per_split
    end = tl.where(expert < E, tl.minimum(begin + per_split, tiles), begin)  # of no expert: zeros

    mine = tl.minimum(expert, E - 1).to(tl.int64)
    x_ptrs = x_ptr + (pair // TOP).to(tl.int64)[None, :] * K + (begin * BK + offs_r)[:, None]
    w_ptr += mine * (tiles * ROWS * NP)
    w_ptrs = w_ptr + (begin * ROWS + offs_r)[None, :] * NP + offs_n[:, None]
    params = param_ptr + mine * param_stride
    if E2M1:
        acc = e2m1_sums(
            x_ptrs, x_mask, w_ptrs, params, offs_n, NP, begin, end, dtype, SUB, E8M0, ASM, BM, BN, STAGES
        )  # fmt: skip
        acc *= tl.load(factor_ptr + mine * NP + offs_n)[:, None]
    else:
        acc = sums(
            x_ptrs, x_mask, w_ptrs, w_ptr + BK * BITS // 16 * NP, params, offs_n, NP, begin, end, dtype,
            BITS, SUB, GROUP, HAS_ZERO, ASM, BM, BN, STAGES,
        )  # fmt: skip
    if HAS_BIAS:
        here = offs_n < tl.where(split == 0, N, 0)
        acc += tl.load(bias_ptr + expert * N + offs_n, mask=here, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + pair)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=x_mask & (offs_n[:, None] < N))


def stack(weights: Sequence[Sequence[Any]]) -> tuple[StackedWeight, list[list[Any]]]:
    """Return the weights of a layer's experts as one, and each of them as a part of it, equal in every bit.

    weights: by expert, those that read its input, PackedWeights or E2M1Weights of any factors; they lie side by side as
    by `layout.join`.
    Raises KernelError for experts that are not alike, and for weights with an order of columns of their own.
    """
    kinds = {tuple((w.shape, w.params.dtype) for w in row) for row in weights}
    if len(kinds) > 1 or len({(w.shape[1:], w.params.dtype) for w in weights[0]}) > 1:
        raise KernelError("experts whose weights differ in shape, bits, groups, zeros or scales' dtype are not one")
    if any(getattr(w, "order", None) is not None for row in weights for w in row):
        raise KernelError("experts whose columns have orders of their own (g_idx) are not one weight")
    words, params = (_stacked([[getattr(w, n) for w in row] for row in weights]) for n in ("words", "params"))
    spans = spans_of([w.Np for w in weights[0]])
    parts = [
        [replace(w, words=words[e][:, at], params=params[e][:, at]) for w, at in zip(row, spans, strict=True)]
        for e, row in enumerate(weights)
    ]
    first, N = weights[0][0], spans[-1].start + weights[0][-1].N
    if isinstance(first, PackedWeight):
        return StackedWeight(words, params, replace(first, words=words[0], params=params[0], N=N, rest=None)), parts
    one = replace(first, words=words[0], params=params[0], N=N, factor=1.0)
    return StackedWeight(words, params, one, _factors(weights, words.device)), parts


def _factors(weights: Sequence[Sequence[E2M1Weight]], device: torch.device) -> Tensor:
    """Return `[E, Np]`, of every feature the factor of its linear."""
    each = torch.tensor([[w.factor for w in row] for row in weights], device=device)
    return each.repeat_interleave(torch.tensor([w.Np for w in weights[0]], device=device), 1)


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return `[E, rows, sum of columns]`, filled expert by expert: nothing else of that size is made."""
    like, columns = rows[0][0], sum(t.shape[1] for t in rows[0])
    found = torch.empty((len(rows), like.shape[0], columns), dtype=like.dtype, device=like.device)
    for e, row in enumerate(rows):
        torch.cat(list(row), 1, out=found[e])
    return found


def reference(x: Tensor, w: Routed, bias: Tensor | None = None) -> Tensor:
    """Return `[T, k, N]`, one expert after the other, computed in float32 and rounded once to the dtype of x."""
    plan, rows = w.plan, x.reshape(-1, w.K)
    y = x.new_zeros(len(plan.order), w.N)
    begin = plan.begin.tolist()
    for e in range(plan.experts):
        pairs = plan.order[begin[e] : begin[e + 1]].long()
        if len(pairs):
            own = None if bias is None else bias[e].float()
            y[pairs] = F.linear(rows[pairs // plan.top].float(), w.weight.dequantize(e), own).to(x.dtype)
    return y.view(-1, plan.top, w.N)


def linear(x: Tensor, w: StackedWeight, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[T, K]` (fp16, bf16 or float32) to `[T, k, N]` in its dtype, for each of a token's k experts.

    bias: `[E + 1, N]`, of which the last row, no expert's, is zeros.
    Raises KernelError for a shape, dtype or device that the kernel cannot take, and for a bias beside float32.
    """
    if direct(x):
        return compute(x, Routed(w, plan), bias)
    packed, pairs = (x, w.words, w.params), (plan.order, plan.begin, bias, *w.one.shape, plan.top)
    if w.factors is None:
        return torch.ops.llmq.grouped_weight_only(*packed, *pairs)
    return torch.ops.llmq.grouped_e2m1(*packed, w.factors, *pairs)


def compute(x: Tensor, w: Routed, bias: Tensor | None = None) -> Tensor:
    """See `linear`: what the operator does."""
    return multiplied(x[:, None], w, bias, _KERNELS[w.weight.factors is not None])


@operator("llmq::grouped_weight_only")
def _op(
    x: Tensor,
    words: Tensor,
    params: Tensor,
    order: Tensor,
    begin: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group: int,
    has_zero: bool,
    top: int,
) -> Tensor:
    one = PackedWeight(words[0], params[0], None, n, k, bits, group, has_zero)
    return compute(x, Routed(StackedWeight(words, params, one), Plan(order, begin, top)), bias)


@library.register_fake("llmq::grouped_weight_only")
def _(x, words, params, order, begin, bias, n, k, bits, group, has_zero, top):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], top, n)


@operator("llmq::grouped_e2m1")
def _e2m1_op(
    x: Tensor,
    words: Tensor,
    params: Tensor,
    factors: Tensor,
    order: Tensor,
    begin: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group: int,
    e8m0: bool,
    top: int,
) -> Tensor:
    one = E2M1Weight(words[0], params[0], n, k, group, e8m0)
    return compute(x, Routed(StackedWeight(words, params, one, factors), Plan(order, begin, top)), bias)


@library.register_fake("llmq::grouped_e2m1")
def _(x, words, params, factors, order, begin, bias, n, k, group, e8m0, top):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], top, n)


class _Kind(NamedTuple):
    """What integers and E2M1 differ in."""

    bits: Callable[[Any], int]
    columns: Callable[[Any], int]
    tiles: Callable[[Any], int]
    configs: Callable[..., list[tune.Config]]
    constants: Callable[..., dict[str, Any]]
    dequantize: Callable[[Any], Tensor]


_INTEGERS = _Kind(
    lambda w: w.bits,
    lambda w: w.Kp,
    weight_only.tiles_of,
    weight_only.configs,
    weight_only.constants,
    layout.dequantize,
)
_E2M1 = _Kind(
    lambda w: 4,
    lambda w: w.words.shape[0] * 4,
    lambda w: cdiv(w.K, 4 * w.group),
    e2m1.configs,
    e2m1.constants,
    e2m1.dequantize,
)


def _kind(one: PackedWeight | E2M1Weight) -> _Kind:
    return _E2M1 if isinstance(one, E2M1Weight) else _INTEGERS


def check(x: Tensor, w: Routed, bias: Tensor | None) -> None:
    """Raise KernelError for an activation, a plan or a bias that experts cannot be multiplied with."""
    check_activation(x, w, None)
    plan, pairs, E = w.plan, len(w.plan.order), len(w.words)
    if plan.experts != E or plan.top * len(x) != pairs:
        said = f"{plan.experts} experts and {pairs} pairs, {plan.top} of a row"
        raise KernelError(f"the plan is of {said}; there are {E} experts and {len(x)} rows")
    if bias is not None and bias.shape != (E + 1, w.N):
        raise KernelError(f"the experts' bias is {list(bias.shape)}, not [{E + 1}, {w.N}]")
    if bias is not None and x.dtype == torch.float32 and x.is_cuda:
        raise KernelError("float32 activations have no bias in the grouped kernel; add it to what comes out")


def configs(T: int, w: Routed, *, asm: bool | None = None) -> list[tune.Config]:
    """Return the configurations worth trying for T rows, the safest guess first; asm: as for `weight_only.configs`.

    They are those of one weight for as many tokens as an expert has of those that are needed. There are more programs
    than for one weight, so that K is cut into two parts at most. A tile's place takes registers: the bounds are wider,
    there is none for 3 bits (told one, ptxas spills), and what has none to spare on sm_80 (64 sums a thread) is last.
    Of E2M1 a tile has 16 rows at the most.
    """
    pairs, one = T * w.plan.top, w.weight.one
    kind, mean = _kind(one), cdiv(pairs, min(w.plan.experts, pairs))
    mean, tiles = mean if kind is _INTEGERS else min(mean, FEW), kind.tiles(one)
    found = [c for c in kind.configs(mean, one, asm=asm) if c != tune.LIBRARY]
    wider = [replace(c, registers=c.registers + 24 if c.registers and kind.bits(one) != 3 else 0) for c in found]
    wider.sort(key=lambda c: 1024 * c.warps < c.BM * c.BN)
    return list(dict.fromkeys(replace(c, split_k=s) for s in (1, 2) for c in wider if s <= tiles))


def launch(x: Tensor, w: Routed, bias: Tensor | None, config: tune.Config, dtype: torch.dtype | None = None) -> Tensor:
    """Run a given configuration on fp16 or bf16 `x` `[T, 1, K]`; returns `[T, k, N]` in `dtype`, else x's."""
    return planned(x, w, config, bias is not None, dtype)(x, w, bias)


def planned(x: Tensor, w: Routed, config: tune.Config, has_bias: bool, dtype: torch.dtype | None = None) -> Call:
    """Return what launches a configuration on activations and weights like `x` and `w`."""
    E, _, Np = w.words.shape
    pairs, stride = len(w.plan.order), w.weight.params.stride(0)
    fixed = constants(w, config, has_bias=has_bias) | config.options()
    shape, padded = (len(x), w.plan.top, w.N), (Np, _kind(w.weight.one).columns(w.weight.one))
    launches = Launches(x, shape, padded, config, fixed, dtype or x.dtype, tiles=slots(pairs, E, config.BM))

    def call(x: Tensor, w: Routed, bias: Tensor | None) -> Tensor:
        weight, plan = w.weight, w.plan
        more = plan.order, plan.begin, weight.factors, stride, E, plan.top
        return launches(grouped_kernel, x, weight.words, weight.params, bias, *more)

    return call


_KERNELS = [
    Kernel(name, reference, configs, launch, planned, check) for name in (f"grouped {REVISION}", "grouped_e2m1")
]


def constants(w: Routed, config: tune.Config, *, has_bias: bool = False, asm: bool | None = None) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for weights and a configuration."""
    integers = {"BITS": 4, "GROUP": 0, "HAS_ZERO": False, "E2M1": w.weight.factors is not None, "E8M0": False}
    found = _kind(w.weight.one).constants(w.weight.one, config, has_bias=has_bias, asm=asm)
    return integers | found | {"EP": 1 << w.plan.experts.bit_length()}
