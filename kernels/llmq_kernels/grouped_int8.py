"""Grouped W8A8 and FP8: y = (x_q @ w_e^T) * x_scale[m] * w_scale[e, n] (+ bias_e), for a layer's experts at once.

As grouped.py: a program makes a tile of one expert's rows of y, whose rows of x are fetched by the numbers of its
pairs. Every token is quantized once, for all of its experts (activation.py). The int32 sums of W8A8 are
`int8_sums`, of the same codes, so that an expert has the bits that it has alone. The sums of FP8, whose codes are
uint8, are float32: an expert alone has the library's, added in another order. NVIDIA multiplies E4M3 from compute
capability 8.9 on, AMD what files have from CDNA 4 on; other devices are not given such weights.
A pair that is sent to no expert has a row of zeros. K is not split, and there is no library.

Beside it: `reference`, one expert after the other; it is what the op does with CPU tensors.
Not here: the plan (routing.py), weights alone (grouped.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from llmq_kernels import activation, fp8, int8, tune
from llmq_kernels.activation import Quantizing
from llmq_kernels.errors import KernelError
from llmq_kernels.fp8 import PackedFp8
from llmq_kernels.int8 import N_MULTIPLE, TILE_K, PackedInt8, int8_sums
from llmq_kernels.launch import FLOATS, blank, cdiv, check_operands, direct, no_gradient, on, operator, runs_on
from llmq_kernels.layout import spans_of
from llmq_kernels.routing import Plan, slots, tile_of


@dataclass(frozen=True)
class StackedInt8:
    """The weights `[N, K]` of a layer's experts: q int8 `[E, Np, Kp]`, scale float32 `[E, Np]`. one: of expert 0.

    q of FP8 is uint8, the codes of E4M3.
    """

    q: Tensor
    scale: Tensor
    one: PackedInt8

    @property
    def e4m3(self) -> bool:
        """Whether the codes are those of floats."""
        return self.q.dtype == torch.uint8

    def of(self, e: int) -> PackedInt8:
        """Return the weight of an expert."""
        return replace(self.one, q=self.q[e], scale=self.scale[e])


class How(NamedTuple):
    """What bears on a launch beside shapes. one_scale: of all rows of x, as a static one is."""

    dtype: torch.dtype
    one_scale: bool
    has_bias: bool
    e4m3: bool = False


Weight = TypeVar("Weight", PackedInt8, PackedFp8)
Call = Callable[[Tensor, Tensor, StackedInt8, Plan, Tensor | None], Tensor]


@triton.jit
def fp8_sums(x_ptrs, x_mask, w_ptrs, tiles, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Return the float32 sums [BM, BN] over tiles of 128 columns of E4M3."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        x = tl.load(x_ptrs, mask=x_mask)  # a row beyond the mask has sums of its own, which are not stored
        # Hopper's tensor cores keep fewer bits of their sums than float32 has: those of 128 columns are added outside.
        acc = tl.dot(x, tl.load(w_ptrs), acc, max_num_imprecise_acc=128)
        x_ptrs += 128
        w_ptrs += 128
    return acc


@triton.jit(do_not_specialize=["E", "TOP", "M"])
def grouped_int8_kernel(
    x_ptr,  # [M / TOP, K] int8, or with E4M3 uint8
    w_ptr,  # [E, NP, K] likewise
    x_scale_ptr,  # [M / TOP] float32, or with STATIC [1]
    w_scale_ptr,  # [E, NP] float32
    bias_ptr,  # [E + 1, N], if HAS_BIAS
    y_ptr,  # [M, N] fp16, bf16 or float32
    order_ptr,  # [M] int32
    begin_ptr,  # [E + 2] int32
    E,
    TOP,
    M,
    N,
    NP,
    K,
    EP: tl.constexpr,
    STATIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E4M3: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of an expert's rows of y. K and NP are padded; N is not."""
    count = M // BM + tl.minimum(E + 1, M)
    expert, first, last = tile_of(begin_ptr, tl.program_id(0) % count, E, EP, BM)
    if first >= last:
        return
    offs_n = tl.program_id(0) // count * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, 128)
    mask_m = first + tl.arange(0, BM) < last
    pair = tl.load(order_ptr + first + tl.arange(0, BM), mask=mask_m, other=0)
    row = pair // TOP
    mine = tl.minimum(expert, E - 1).to(tl.int64)
    if E4M3:
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        w_ptr = w_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + (mine * NP + offs_n)[None, :] * K + offs_k[:, None]
    tiles = tl.where(expert < E, K // 128, 0)  # of no expert: zeros
    if E4M3:
        acc = fp8_sums(x_ptrs, mask_m[:, None], w_ptrs, tiles, BM, BN, STAGES)
    else:
        acc = int8_sums(x_ptrs, mask_m[:, None], w_ptrs, 0, tiles, BM, BN, STAGES)
    x_scale = tl.load(x_scale_ptr + (row * 0 if STATIC else row), mask=mask_m, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * tl.load(w_scale_ptr + mine * NP + offs_n)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + expert * N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + pair.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n[None, :] < N))


def stack(weights: Sequence[Sequence[Weight]]) -> tuple[StackedInt8, list[list[Weight]]]:
    """Return the weights of a layer's experts as one, and each of them as a part of it; see `grouped.stack`.

    Those of FP8, which are not padded, are padded with zeros as a whole.

    Raises KernelError for experts that are not alike.
    """
    if len({tuple((w.N, w.K) for w in row) for row in weights}) > 1 or len({w.K for w in weights[0]}) > 1:
        raise KernelError("experts whose weights differ in shape are not one weight")
    spans = spans_of([w.Np for w in weights[0]])
    like, columns = weights[0][0], weights[0][0].q.size(1)
    Np, Kp = cdiv(spans[-1].stop, N_MULTIPLE) * N_MULTIPLE, cdiv(columns, TILE_K) * TILE_K
    q, scale = like.q.new_zeros(len(weights), Np, Kp), like.scale.new_zeros(len(weights), Np)
    parts = [
        [replace(w, q=q[e, at, :columns], scale=scale[e, at]) for w, at in zip(row, spans, strict=True)]
        for e, row in enumerate(weights)
    ]
    for row, of_row in zip(weights, parts, strict=True):
        for w, part in zip(row, of_row, strict=True):
            part.q.copy_(w.q)
            part.scale.copy_(w.scale)
    N = spans[-1].start + weights[0][-1].N
    return StackedInt8(q, scale, PackedInt8(q[0], scale[0], N, like.K)), parts


def reference(
    q: Tensor, x_scale: Tensor, w: StackedInt8, plan: Plan, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return `[T, k, N]` of codes `[T, K]` and their scales, one expert after the other."""
    y = torch.zeros(len(plan.order), w.one.N, dtype=dtype, device=q.device)
    begin = plan.begin.tolist()
    for e in range(plan.experts):
        pairs = plan.order[begin[e] : begin[e + 1]].long()
        rows, own = pairs // plan.top, None if bias is None else bias[e]
        scales = x_scale if len(x_scale) == 1 else x_scale[rows]
        y[pairs] = int8.product_reference(q[rows], scales, w.of(e), own, dtype)
    return y.view(-1, plan.top, w.one.N)


def quantize_reference(x: Tensor, w: StackedInt8, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return codes of `x` `[T, K]` for weights like `w`, and float32 scales, by torch's operators."""
    if not w.e4m3:
        return activation.quantize_reference(x, static)
    q, x_scale = fp8.quantize_reference(x, static)
    return q.view(torch.uint8), x_scale


def linear(x: Tensor, w: StackedInt8, plan: Plan, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[T, K]` (fp16, bf16 or float32) to `[T, k, N]` in its dtype, for each of a token's k experts.

    static: `[1]`, the scale of the activation, or None for one per token. bias: `[E + 1, N]`, of which the last row, no
    expert's, is zeros.
    Raises KernelError for a shape, dtype or device that the kernel cannot take.
    """
    if direct(x):
        return compute(x, w, plan, static, bias)
    padding = w.q.size(2) - w.one.K
    q, x_scale = quantize_reference(F.pad(x, (0, padding)) if padding else x, w, static)
    given = q, x_scale, w.q, w.scale, plan.order, plan.begin, bias, w.one.N, plan.top, x.dtype
    return torch.ops.llmq.grouped_int8(*given)


def compute(x: Tensor, w: StackedInt8, plan: Plan, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `linear`: what is launched, without an operator."""
    like = w.q.dtype, w.q.shape, w.one.N, plan.top
    key = "grouped_int8", x.shape, x.dtype, x.device, *like, static is None, bias is None
    call = tune.settled.get(key)
    if call is None:
        check(x, w.one.K, w, plan, bias)
        if not runs_on(x) or not x.numel():
            return reference(*quantize_reference(x, w, static), w, plan, bias, x.dtype)
        if x.dtype not in FLOATS:
            raise KernelError(
                f"the kernel of W8A8 and FP8 takes fp16, bf16 or float32 activations, not {x.dtype}; convert x"
            )
        quantizing = Quantizing(x, w.q.size(2), is_static=static is not None, e4m3=w.e4m3)
        how = How(x.dtype, static is not None or len(x) == 1, bias is not None, w.e4m3)
        asked, product = _chosen(len(x), w, plan, bias, how, lambda: quantizing(x, static))

        def call(x: Tensor, w: StackedInt8, plan: Plan, static: Tensor | None, bias: Tensor | None) -> Tensor:
            with on(x.device):
                return no_gradient(x, product(*quantizing(x, static), w, plan, bias))

        tune.settle(key, *asked, call)
    return call(x, w, plan, static, bias)


def check(x: Tensor, K: int, w: StackedInt8, plan: Plan, bias: Tensor | None) -> None:
    """Raise KernelError for an activation or its codes `[T, K]`, a plan or a bias that experts cannot be given."""
    check_operands(x, w.q, w.one.N, K, None)
    E, pairs = len(w.q), len(plan.order)
    if plan.experts != E or plan.top * len(x) != pairs:
        said = f"{plan.experts} experts and {pairs} pairs, {plan.top} of a row"
        raise KernelError(f"the plan is of {said}; there are {E} experts and {len(x)} rows")
    if bias is not None and bias.shape != (E + 1, w.one.N):
        raise KernelError(f"the experts' bias is {list(bias.shape)}, not [{E + 1}, {w.one.N}]")


def _chosen(
    T: int, w: StackedInt8, plan: Plan, bias: Tensor | None, how: How, codes: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[tuple[str, torch.device, tuple[Any, ...]], Call]:
    """Return what launches the fastest configuration for T rows, behind what the tuner was asked for it."""
    device, quantized = w.q.device, functools.cache(codes)  # once, if anything is to be timed
    asked = (
        "grouped_fp8" if how.e4m3 else "grouped_int8",
        device,
        (tune.bucket(T), w.one.N, w.one.K, plan.experts, plan.top, how.dtype),
    )

    def run(config: tune.Config) -> Tensor:
        return planned(T, w, plan, config, how)(*quantized(), w, plan, bias)

    with on(device):
        config = tune.choose(*asked, lambda: configs(T, w, plan), run)
    return asked, planned(T, w, plan, config, how)


def configs(T: int, w: StackedInt8, plan: Plan) -> list[tune.Config]:
    """Return the configurations worth trying for T rows, the safest guess first.

    They are those of one weight for as many tokens as an expert has of those that are needed. A tile's place takes
    registers: what has none to spare on sm_80 (64 sums a thread) is last.
    """
    pairs = T * plan.top
    found = int8.configs(cdiv(pairs, min(plan.experts, pairs)), w.one.K)
    whole = dict.fromkeys(replace(c, split_k=1) for c in found if c != tune.LIBRARY)
    return sorted(whole, key=lambda c: 1024 * c.warps < c.BM * c.BN)


def planned(T: int, w: StackedInt8, plan: Plan, config: tune.Config, how: How) -> Call:
    """Return what launches a configuration on the codes of T rows, weights and plans like these: `[T, k, N]`."""
    (E, Np, Kp), pairs, N = w.q.shape, len(plan.order), w.one.N
    fixed = constants(E, config, how) | config.options()
    outputs = blank((T, plan.top, N), how.dtype, w.q.device)
    grid, sizes = (slots(pairs, E, config.BM) * cdiv(N, config.BN),), (E, plan.top, pairs, N, Np, Kp)

    def call(q: Tensor, x_scale: Tensor, w: StackedInt8, plan: Plan, bias: Tensor | None) -> Tensor:
        y = outputs()
        given = q, w.q, x_scale, w.scale, y if bias is None else bias, y, plan.order, plan.begin
        grouped_int8_kernel[grid](*given, *sizes, **fixed)
        return y

    return call


def constants(E: int, config: tune.Config, how: How) -> dict[str, Any]:
    """Return the compile-time arguments of the kernel for E experts and a configuration."""
    tiles = {"BM": config.BM, "BN": config.BN, "STAGES": config.stages}
    kind = {"STATIC": how.one_scale, "HAS_BIAS": how.has_bias, "E4M3": how.e4m3}
    return {"EP": 1 << E.bit_length()} | kind | tiles


@operator("llmq::grouped_int8")
def _op(
    q: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    order: Tensor,
    begin: Tensor,
    bias: Tensor | None,
    n: int,
    top: int,
    dtype: torch.dtype,
) -> Tensor:
    stacked, plan = StackedInt8(w, w_scale, PackedInt8(w[0], w_scale[0], n, w.size(2))), Plan(order, begin, top)
    check(q, w.size(2), stacked, plan, bias)
    if not runs_on(q) or not q.numel():
        return reference(q, x_scale, stacked, plan, bias, dtype)
    with on(q.device):
        how = How(dtype, len(x_scale) == 1, bias is not None, stacked.e4m3)
        _, product = _chosen(len(q), stacked, plan, bias, how, lambda: (q, x_scale))
        return no_gradient(x_scale, product(q.contiguous(), x_scale, stacked, plan, bias))


@library.register_fake("llmq::grouped_int8")
def _(q, x_scale, w, w_scale, order, begin, bias, n, top, dtype):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], top, n, dtype=dtype)
