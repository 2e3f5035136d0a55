"""GPTQ: round column by column, pushing each error onto the columns not yet rounded.

min |(W - Q) X^T|^2;  H = X^T X / T + damp * mean(diag H) * I;  H = F D F^T with F unit upper triangular.
For each column j:  q_j = nearest(w_j + sum_(i<j) (w_i - q_i) F_ij).
Frantar et al. 2022, arXiv:2210.17323, Algorithm 1, in the form that Chee et al. 2023, arXiv:2307.13304, section 4 prove
equal to it: the errors are those against the original weights, so H is factored once and never inverted. Columns run in
descending diag H (act order). Grids are fitted and frozen before the loop, on the original column groups (static
groups: no g_idx on disk) or, with `desc_act`, on the groups of the permuted order (g_idx on disk).

The paper's lazy batches become a recursion: round the left half, apply its errors to the right half by one product,
round the right half. The linears of a site share H and F, so those on equal grids are stacked along their rows.
Not here: activations (stream), clipping (ranges/), bits on disk (formats/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq.stats import Hessian
from llmq.types import QTensor, Solved, Stats, Target

_RETRIES = 6  # each multiplies the damping by 10
_LEAF = 16  # columns rounded one by one; their rank-1 updates stay in the L2 cache


@dataclass(frozen=True)
class Gptq:
    """Second-order rounding with error feedback.

    damp: added to the diagonal of H, as a fraction of its mean; raised tenfold until H factors.
    act_order: round the columns with the largest activations first.
    desc_act: with act_order, groups follow that order (needs g_idx in the format); else groups stay as they lie.
    """

    damp: float = 0.01
    act_order: bool = True
    desc_act: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise ValueError(f"damp lies between 0 and 1, not {self.damp}")
        if self.desc_act and not self.act_order:
            raise ValueError("desc_act needs act_order")

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Hessian, always."""
        return (Hessian,)

    def solve(self, targets: Sequence[Target], stats: Stats) -> list[Solved]:
        """Round the linears of a site; those on equal grids in one column loop."""
        H_KK = stats[Hessian].mean()
        dead = H_KK.diagonal() == 0
        if dead.any():  # a column that no token excites has no feedback: with H_jj = 1 it is rounded to nearest
            H_KK = H_KK + torch.diag(dead.to(H_KK.dtype))
        order = torch.argsort(H_KK.diagonal(), descending=True, stable=True) if self.act_order else None
        F_KK, damping = factor(H_KK if order is None else H_KK[order][:, order], self.damp)
        report = {"damp": damping, "dead_columns": int(dead.sum()), "tokens": stats[Hessian].count}
        if F_KK is None:
            report["fallback"] = f"rtn: H does not factor with damping up to {damping:g}"
        solved: dict[str, Solved] = {}
        for stack in _stacks(targets):
            W_NK = torch.cat([t.W_NK for t in stack])
            q = self._solve_stack(W_NK, stack[0].grid, H_KK, F_KK, order)
            for t, part in zip(stack, _split(q, [t.W_NK.shape[0] for t in stack]), strict=True):
                solved[t.name] = Solved(part, dict(report))
        return [solved[t.name] for t in targets]

    def _solve_stack(self, W_NK: Tensor, grid: Any, H_KK: Tensor, F_KK: Tensor | None, order: Tensor | None) -> QTensor:
        K = W_NK.shape[1]
        group_K = torch.arange(K, device=W_NK.device) // (grid.group_size or K)
        if order is not None and self.desc_act:
            params = grid.fit(W_NK[:, order], H_KK[order][:, order])
            g_idx = torch.empty_like(group_K)
            g_idx[order] = group_K
        else:
            params, g_idx = grid.fit(W_NK, H_KK), group_K
        if F_KK is None:
            codes = grid.nearest(W_NK, params.columns(K, g_idx))
        else:
            W_KN, group = W_NK.T, g_idx
            if order is not None:
                W_KN, group = W_KN[order], g_idx[order]
            codes_KN = feedback(W_KN.contiguous(), F_KK, grid, params, group.tolist())
            if order is not None:
                codes_KN = codes_KN[torch.argsort(order)]
            codes = codes_KN.T.contiguous()
        real_g_idx = g_idx.to(torch.int32) if self.desc_act and order is not None else None
        return QTensor(codes.to(torch.uint8), params, grid, real_g_idx)


def factor(H_KK: Tensor, damp: float) -> tuple[Tensor | None, float]:
    """Return F, unit upper triangular with `H = F D F^T` for the damped H, and the damping used; None where H resists.

    The Cholesky factor of H with both axes reversed, reversed back, is upper triangular; its columns over their pivots
    are F.
    """
    mean = H_KK.diagonal().mean()
    for _ in range(_RETRIES):
        damped = H_KK.clone()
        damped.diagonal().add_(damp * mean)
        L, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0 and torch.isfinite(L.diagonal()).all():
            return L.flip(0, 1).div_(L.diagonal().flip(0)), damp
        damp *= 10
    return None, damp / 10


def feedback(W_KN: Tensor, F_KK: Tensor, grid: Any, params: Any, group: list[int]) -> Tensor:
    """Round the rows of `W_KN` in order, feeding errors forward; return the codes, uint8 `[K, N]`.

    W_KN: float32, contiguous, unchanged. params: `[N, G]`. group: the group of each row.
    """
    codes_KN = torch.empty(W_KN.shape, dtype=torch.uint8, device=W_KN.device)
    target_KN, error_KN = W_KN.clone(), torch.empty_like(W_KN)
    by_group = params.by_group()
    weight, target, error, codes = W_KN.unbind(), target_KN.unbind(), error_KN.unbind(), codes_KN.unbind()

    for lo, mid, hi in _halves(0, W_KN.shape[0]):
        if mid < hi:
            target_KN[mid:hi].addmm_(F_KK[lo:mid, mid:hi].T, error_KN[lo:mid])
            continue
        for j in range(lo, hi):
            p = by_group[group[j]]
            code = grid.nearest(target[j], p)
            codes[j].copy_(code)
            torch.sub(weight[j], grid.decode(code, p), out=error[j])
            if j + 1 < hi:
                target_KN[j + 1 : hi].addr_(F_KK[j, j + 1 : hi], error[j])
    return codes_KN


def _halves(lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """Yield what to do, in order: `(lo, hi, hi)` rounds these columns, `(lo, mid, hi)` feeds errors past mid.

    A generator, since a recursive closure is a cycle that would keep its tensors until the next garbage collection.
    """
    if hi - lo <= _LEAF:
        yield lo, hi, hi
        return
    mid = (lo + hi) // 2
    yield from _halves(lo, mid)
    yield lo, mid, hi
    yield from _halves(mid, hi)


def _stacks(targets: Sequence[Target]) -> list[list[Target]]:
    stacks: list[list[Target]] = []
    for t in targets:
        same = next((s for s in stacks if s[0].grid == t.grid and s[0].grid.range == t.grid.range), None)
        if same is None or t.grid.per_tensor:  # one scale per tensor: a stack would share it
            stacks.append([t])
        else:
            same.append(t)
    return stacks


def _split(q: QTensor, rows: list[int]) -> list[QTensor]:
    parts = zip(q.codes.split(rows), q.params.split(rows), strict=True)
    return [QTensor(codes, params, q.grid, q.g_idx) for codes, params in parts]
