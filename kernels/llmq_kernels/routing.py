"""Which rows of a grouped product are whose: what a layer's router chose, sorted by expert on the device.

A layer sends each of T tokens to k of its E experts: pairs, of which pair p is that of token p // k. A kernel sorts
them by counting, in one launch, and nothing waits for a device:

    begin int32 [E + 2]    how many pairs belong to experts before e: where those of e begin in `order`
    order int32 [T k]      the pairs by expert; within one as they were

A product cuts an expert's pairs into tiles of BM, of which only the last is not full. A tile has a slot in the grid.
Those of expert e begin at b // BM + min(e, b), with b = begin[e], since no expert before it needs that one: a closed
form, so that `begin` tells any program whose its slot is, and the host the size of the grid,

    T k // BM + min(E + 1, T k)

slots, of which those that no pair fills are left at once. The same plan serves products of any BM. Expert E is nobody:
pairs that are sent to it, or beyond, come last.

Not here: the products (grouped.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from llmq_kernels.launch import direct, on, operator, runs_on

BLOCK = 1024
"""The most pairs that a program of the plan looks at together."""


@dataclass(frozen=True)
class Plan:
    """Pairs sorted by expert, see the module. top: how many of them read one row of what is multiplied."""

    order: Tensor
    begin: Tensor
    top: int

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return self.begin.shape[0] - 2

    @property
    def of_pairs(self) -> Plan:
        """The plan of a product that reads a row for each pair, as the second of an expert does."""
        return replace(self, top=1)


@triton.jit(do_not_specialize=["S", "E"])
def plan_kernel(
    index_ptr,  # [S] int64
    order_ptr,  # [S] int32
    begin_ptr,  # [E + 2] int32
    S,
    E,
    BLOCK: tl.constexpr,
):
    """Place the pairs of one expert; those of the last program are nobody's."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, S, BLOCK):
        index = tl.load(index_ptr + first + lane, mask=first + lane < S, other=E)
        below += (index < expert).to(tl.int32)
    at = tl.sum(below, 0)
    tl.store(begin_ptr + expert, at)
    for first in range(0, S, BLOCK):
        inside = first + lane < S
        index = tl.load(index_ptr + first + lane, mask=inside, other=E)
        mine = (inside & (tl.minimum(index, E) == expert)).to(tl.int32)
        tl.store(order_ptr + at + tl.cumsum(mine, 0) - 1, first + lane, mask=mine != 0)
        at += tl.sum(mine, 0)
    if expert == E:
        tl.store(begin_ptr + E + 1, at)


@triton.jit
def tile_of(begin_ptr, slot, E, EP: tl.constexpr, BM: tl.constexpr):
    """Return the expert of a slot, the first of its pairs in `order`, and the end of that expert's.

    EP: a power of two beyond E.
    """
    at = tl.arange(0, EP)
    before = tl.load(begin_ptr + at, mask=at <= E, other=2**30)
    expert = tl.sum((before // BM + tl.minimum(at, before) <= slot).to(tl.int32), 0) - 1
    begin = tl.load(begin_ptr + expert)
    first = begin + (slot - begin // BM - tl.minimum(expert, begin)) * BM
    return expert, first, tl.load(begin_ptr + expert + 1)


def slots(pairs: int, experts: int, BM: int) -> int:
    """Return how many slots the tiles of so many pairs may need."""
    return pairs // BM + min(experts + 1, pairs)


def reference(index_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return `order` and `begin` by torch's own sort."""
    sorted_S, order = index_Tk.flatten().clamp(max=experts).sort(stable=True)
    edges = torch.arange(experts + 2, device=index_Tk.device)
    return order.int(), torch.searchsorted(sorted_S, edges).int()


def plan(index_Tk: Tensor, experts: int) -> Plan:
    """Return the plan of tokens' experts, int64 `[T, k]`; one that is `experts` or more is none."""
    order, begin = (_op if direct(index_Tk) else torch.ops.llmq.expert_plan)(index_Tk, experts)
    return Plan(order, begin, index_Tk.shape[1])


@operator("llmq::expert_plan")
def _op(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    if not runs_on(index) or not index.numel():
        return reference(index, experts)
    return launch(index, experts)


@library.register_fake("llmq::expert_plan")
def _(index, experts):  # type: ignore[no-untyped-def]
    empty = index.new_empty
    return empty(index.numel(), dtype=torch.int32), empty(experts + 2, dtype=torch.int32)


def launch(index_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return `order` and `begin` by the kernel."""
    with on(index_Tk.device):
        index, S = index_Tk.contiguous(), index_Tk.numel()
        order = torch.empty(S, dtype=torch.int32, device=index.device)
        begin = torch.empty(experts + 2, dtype=torch.int32, device=index.device)
        plan_kernel[(experts + 1,)](index, order, begin, S, experts, **constants(S))
    return order, begin


def constants(S: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernel for so many pairs."""
    return {"BLOCK": min(BLOCK, max(32, 1 << (S - 1).bit_length()))}
