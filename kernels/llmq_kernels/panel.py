"""A panel of columns of a weight in one launch: rounded in order (GPTQ), or each code made the best (descent).

Both go column by column, and what a column does changes what the later ones see. With torch that is a dozen launches
a column; here a program holds the panel, P columns of BN rows of the weight, in registers and goes through it alone:

    round_panel    t_j = T_j + sum_(i<j) e_i F_ij         target, fed with the errors of the columns before
                   q_j = nearest(t_j)                     the code
                   e_j = W_j - decode(q_j)                the error, fed on

    walk_panel     t_j = decode(q_j) + g_j / H_jj         where the row's loss is least, all other codes as they are
                   q_j = nearest(t_j)
                   g  -= step_j H_j,  step_j = decode(new q_j) - decode(old q_j)       g = (W - Q) H

The values of a group are evenly spaced, `w = scale * (code - zero) + offset`, and codes are clamped to [low, high]; or
they come from a table of up to 256, `w = scale * (value[rank] - zero) + offset`, whose ranks stand for codes: that of
`t` is the last whose `edge` lies below, found bit by bit. A group whose scale is 0 takes what is nearest to `zero`.
What a panel does to the columns outside is a matrix product, which the caller does.

Matrices lie with a row for each column of the weight, `[P, N]` and `[G, N]`, so that neighbouring threads read
neighbouring numbers. Every number is computed in float32 by the same operations in the same order as by a loop over the
columns that rounds after every product and every sum (`round_reference`): the kernels are compiled without fused
multiply-adds (`LAUNCH`), divide exactly, and take a row out of the panel by a sum with zeros, which is exact. So codes
and errors are equal to that loop's bit for bit. torch's `addr` may fuse: where it does, a tie can fall the other way.

Beside them: the references, which is also what the ops do with CPU tensors.
Not here: the order of the columns, the products between panels (llmq/algorithms).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.errors import KernelError
from llmq_kernels.launch import cdiv, on, operator, runs_on
from llmq_kernels.rounding import round_even

WIDTH = 64
"""The most columns of a panel."""
BN = 32
"""Rows of the weight for each program: a panel of them is 16 registers a thread, and small weights fill a GPU."""
LAUNCH = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


def constants(bits: int) -> dict[str, int]:
    """Return the constants of the kernels for a table of 2^bits values, 0 without one. At 3 stages a table spills."""
    return {"BITS": bits, "WIDTH": WIDTH, "BN": BN, "STAGES": 2 if bits else 3}


@triton.jit
def _row(tile, i, j):
    """Return row j of a tile whose rows are numbered `i`: all else of the sum is 0."""
    return tl.sum(tl.where(i[:, None] == j, tile, 0.0), 0)


@triton.jit
def _nearest(x, scale, zero, value_ptr, edge_ptr, low, high, BITS: tl.constexpr):
    """Return the code or rank nearest to `x`, which is less its offset, and its level. BITS: of a rank, or 0."""
    t = tl.div_rn(x, tl.where(scale == 0, float("inf"), scale))
    if BITS == 0:
        code = tl.minimum(tl.maximum(round_even(t) + zero, low), high)  # ties to even
        level = code
    else:
        code = tl.zeros_like(t).to(tl.int32)
        for k in tl.static_range(BITS):
            bit = 1 << (BITS - 1 - k)
            code += tl.where(t > tl.load(edge_ptr + code + bit), bit, 0)
        level = tl.load(value_ptr + code)
    return code, level


@triton.jit(do_not_specialize=["P"])
def round_kernel(
    w_ptr,  # [P, N] float32
    t_ptr,  # [P, N] float32
    f_ptr,  # [P, P] float32 by strides, read right of its diagonal
    group_ptr,  # [P] int64
    scale_ptr,  # [G, N] float32
    zero_ptr,  # [G, N] float32
    offset_ptr,  # [G, N] float32
    value_ptr,  # [2^BITS] float32
    edge_ptr,  # [2^BITS] float32
    error_ptr,  # [P, N] float32, written
    code_ptr,  # [P, N] uint8, written
    P,
    N,
    stride_fi,
    stride_fj,
    low,
    high,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Round P columns of BN rows of the weight."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    here = n < N
    i = tl.arange(0, WIDTH)
    t = tl.load(t_ptr + i[:, None] * N + n[None, :], mask=(i < P)[:, None] & here[None, :], other=0.0)
    for j in tl.range(0, P, num_stages=STAGES):
        at = tl.load(group_ptr + j) * N + n
        scale = tl.load(scale_ptr + at, mask=here, other=1.0)
        zero = tl.load(zero_ptr + at, mask=here, other=0.0)
        offset = tl.load(offset_ptr + at, mask=here, other=0.0)
        w = tl.load(w_ptr + j * N + n, mask=here, other=0.0)
        f = tl.load(f_ptr + j * stride_fi + i * stride_fj, mask=(i > j) & (i < P), other=0.0)
        code, level = _nearest(_row(t, i, j) - offset, scale, zero, value_ptr, edge_ptr, low, high, BITS)
        error = w - (scale * (level - zero) + offset)
        t += f[:, None] * error[None, :]
        tl.store(error_ptr + j * N + n, error, mask=here)
        tl.store(code_ptr + j * N + n, code.to(tl.uint8), mask=here)


@triton.jit(do_not_specialize=["P"])
def walk_kernel(
    h_ptr,  # [P, P] float32 by strides
    g_ptr,  # [P, N] float32, moved
    loss_ptr,  # [N] float32, lowered
    old_ptr,  # [P, N] uint8
    group_ptr,  # [P] int64
    scale_ptr,  # [G, N] float32
    zero_ptr,  # [G, N] float32
    value_ptr,  # [2^BITS] float32
    edge_ptr,  # [2^BITS] float32
    step_ptr,  # [P, N] float32, written
    new_ptr,  # [P, N] uint8, written
    P,
    N,
    stride_hi,
    stride_hj,
    low,
    high,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Make P codes of BN rows the best, one after the other.

    Codes are not moved in place: a warp could read what another one has written already.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    here = n < N
    i = tl.arange(0, WIDTH)
    tile = i[:, None] * N + n[None, :]
    inside = (i < P)[:, None] & here[None, :]
    g = tl.load(g_ptr + tile, mask=inside, other=0.0)
    loss = tl.load(loss_ptr + n, mask=here, other=0.0)
    for j in tl.range(0, P, num_stages=STAGES):
        at = tl.load(group_ptr + j) * N + n
        scale = tl.load(scale_ptr + at, mask=here, other=1.0)
        zero = tl.load(zero_ptr + at, mask=here, other=0.0)
        old = tl.load(old_ptr + j * N + n, mask=here, other=0)
        from_level = old.to(tl.float32) if BITS == 0 else tl.load(value_ptr + old)
        h = tl.load(h_ptr + j * stride_hi + i * stride_hj, mask=i < P, other=0.0)
        diagonal = tl.zeros((BN,), dtype=tl.float32) + tl.load(h_ptr + j * (stride_hi + stride_hj))
        own = _row(g, i, j)
        target = scale * (from_level - zero) + tl.div_rn(own, diagonal)
        code, level = _nearest(target, scale, zero, value_ptr, edge_ptr, low, high, BITS)
        step = scale * (level - from_level)
        new = tl.where(level == from_level, old, code.to(tl.uint8))  # of two zeros, the one that it was
        loss -= step * (2 * own - step * diagonal)
        g -= h[:, None] * step[None, :]
        tl.store(step_ptr + j * N + n, step, mask=here)
        tl.store(new_ptr + j * N + n, new, mask=here)
    tl.store(g_ptr + tile, g, mask=inside)
    tl.store(loss_ptr + n, loss, mask=here)


def round_reference(
    w: Tensor, t: Tensor, f: Tensor, group: Tensor, grid: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, float]
) -> tuple[Tensor, Tensor]:
    """Return the errors, float32 `[P, N]`, and the codes, uint8 `[P, N]`, that `round_panel` writes."""
    t, error, code = t.clone(), torch.empty_like(w), torch.empty_like(w, dtype=torch.uint8)
    scale, zero, offset, value, edge, low, high = grid
    for j, g in enumerate(group.tolist()):
        code[j], level = _nearest_reference(t[j] - offset[g], scale[g], zero[g], value, edge, low, high)
        error[j] = w[j] - (scale[g] * (level - zero[g]) + offset[g])
        t[j + 1 :] += f[j, j + 1 :, None] * error[j]
    return error, code


def walk_reference(
    h: Tensor,
    g: Tensor,
    loss: Tensor,
    old: Tensor,
    group: Tensor,
    grid: tuple[Tensor, Tensor, Tensor, Tensor, float, float],
) -> tuple[Tensor, Tensor]:
    """Move `g` and `loss` in place; return the steps, float32 `[P, N]`, and the codes, uint8 `[P, N]`."""
    steps, codes = torch.empty_like(g), torch.empty_like(old)
    scales, zeros, value, edge, low, high = grid
    for j, at in enumerate(group.tolist()):
        scale, zero, diagonal = scales[at], zeros[at], h[j, j]
        level = value[old[j].int()] if len(value) else old[j].float()
        target = scale * (level - zero) + g[j] / diagonal
        new, to = _nearest_reference(target, scale, zero, value, edge, low, high)
        steps[j] = scale * (to - level)
        loss -= steps[j] * (2 * g[j] - steps[j] * diagonal)
        g -= h[j][:, None] * steps[j]
        codes[j] = torch.where(to == level, old[j], new)
    return steps, codes


def _nearest_reference(
    x: Tensor, scale: Tensor, zero: Tensor, value: Tensor, edge: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return the codes or ranks, uint8, and their levels."""
    t = x.div(torch.where(scale == 0, torch.inf, scale))
    if not len(value):
        code = t.round_().add_(zero).clamp_(low, high)
        return code.to(torch.uint8), code
    rank = torch.bucketize(t, edge[1:])
    return rank.to(torch.uint8), value[rank]


@operator("llmq::round_panel", mutates=("error", "code"))
def round_panel(
    w: Tensor,
    t: Tensor,
    f: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor,
    offset: Tensor,
    value: Tensor,
    edge: Tensor,
    low: float,
    high: float,
    error: Tensor,
    code: Tensor,
) -> None:
    """Round the columns of a panel in order; write what each lost, and the codes.

    w, t: float32 `[P, N]`, P at most WIDTH: what decoded codes are compared with, and what is rounded, before any
    feedback inside the panel. f: float32 `[P, P]`, any strides. group: int64 `[P]`, the group of each column. scale,
    zero, offset: float32 `[G, N]`. value, edge: float32 `[M]`, the values of a table, ascending, and what each lies
    above, M a power of two; of evenly spaced values `[0]`. error: float32 `[P, N]`. code: uint8 `[P, N]`, codes, or
    ranks in the table. All contiguous but f.
    Raises KernelError for a panel that does not fit.
    """
    _check(w, group, value, edge)
    if not runs_on(w):
        found = round_reference(w, t, f, group, (scale, zero, offset, value, edge, low, high))
        error.copy_(found[0])
        code.copy_(found[1])
        return
    P, N = w.shape
    with on(w.device):
        round_kernel[(cdiv(N, BN),)](
            w, t, f, group, scale, zero, offset, value, edge, error, code, P, N, *f.stride(), low, high,
            **constants(_bits(value)), **LAUNCH,
        )  # fmt: skip


@operator("llmq::walk_panel", mutates=("g", "loss", "step", "new"))
def walk_panel(
    h: Tensor,
    g: Tensor,
    loss: Tensor,
    old: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor,
    value: Tensor,
    edge: Tensor,
    low: float,
    high: float,
    step: Tensor,
    new: Tensor,
) -> None:
    """Make the codes of a panel the best one after the other; move gradient and loss, write steps and new codes.

    h: float32 `[P, P]`, any strides, P at most WIDTH. g: float32 `[P, N]`, the gradient (W - Q) H of these columns.
    loss: float32 `[N]`. old, new: uint8 `[P, N]`, not the same memory, codes or ranks. group: int64 `[P]`, the group of
    each column. scale, zero: float32 `[G, N]`. value, edge: as `round_panel` takes them. step: float32 `[P, N]`, by
    what each value moved. All contiguous but h.
    Raises KernelError for a panel that does not fit.
    """
    _check(g, group, value, edge)
    if not runs_on(g):
        found = walk_reference(h, g, loss, old, group, (scale, zero, value, edge, low, high))
        step.copy_(found[0])
        new.copy_(found[1])
        return
    P, N = g.shape
    with on(g.device):
        walk_kernel[(cdiv(N, BN),)](
            h, g, loss, old, group, scale, zero, value, edge, step, new, P, N, *h.stride(), low, high,
            **constants(_bits(value)), **LAUNCH,
        )  # fmt: skip


@torch.library.register_fake("llmq::round_panel")
def _(*args):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("llmq::walk_panel")
def _(*args):  # type: ignore[no-untyped-def]
    return None


def _bits(value: Tensor) -> int:
    """Return the bits of a rank; 0 where there is no table."""
    return len(value).bit_length() - 1 if len(value) else 0


def _check(x: Tensor, group: Tensor, value: Tensor, edge: Tensor) -> None:
    if len(value) != len(edge) or len(value) > 256 or len(value) & (len(value) - 1):
        raise KernelError(f"a table has a power of two of values, up to 256, not {len(value)} with {len(edge)} edges")
    if len(x) > WIDTH:
        raise KernelError(f"a panel has at most {WIDTH} columns, not {len(x)}; cut it")
    if len(x) != len(group):
        raise KernelError(f"a panel of {len(x)} columns has the groups of {len(group)}; give one for each")
