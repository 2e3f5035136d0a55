"""One site: the linears that read one activation, corrected, solved and refined as matrices, in pieces of their rows.

    W of all linears, a stack for each grid -> pieces of rows -> corrections -> solver -> refiners -> joined, split

The linears of a site share their statistics, so those on equal grids are one matrix to a solver: one factor of H. Steps
work row by row, so a stack is cut into pieces, which take less memory and can be dealt over processes. A product of
other shapes is rounded otherwise, so the cuts depend on the stack alone. A grid with one scale for all is one piece.
Not here: where the statistics come from (block.py), any method (algorithms/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from llmq import registry
from llmq.calibration.dealing import PARTS, cut
from llmq.errors import LlmqError
from llmq.granularity import PerTensor
from llmq.pipeline.method import Method
from llmq.stats import Hessian, Stats
from llmq.steps import Correction, Refiner, Solved, Step
from llmq.types import Grid, QTensor

Found = TypeVar("Found")
_LEAST_ROWS = 256  # of a piece: fewer make products slow


class Target(NamedTuple):
    """A linear to solve: its float32 weight, the grid to put it on, what its input channels' errors count, `[K]`."""

    W_NK: Tensor
    grid: Grid
    importance: Tensor | None = None


class Answer(NamedTuple):
    """What was found for a linear, and the corrected weight that it was solved for."""

    solved: Solved
    W_NK: Tensor

    def noted(self, line: Mapping[str, Any]) -> Self:
        """Return it with more in its report."""
        return self._replace(solved=Solved(self.solved.q, self.solved.report | dict(line)))


def round_unseen(targets: Mapping[str, Target], line: Mapping[str, Any]) -> dict[str, Answer]:
    """Return the linears of a site that no activation was seen of, rounded to nearest, with a line on why.

    A range that weighs errors by H counts those of all input channels alike.
    """
    found = {n: QTensor.rounded(t.W_NK, t.grid, _weight(t)) for n, t in targets.items()}
    return {n: Answer(Solved(q, dict(line)), targets[n].W_NK) for n, q in found.items()}


def _weight(target: Target) -> Tensor | None:
    if target.importance is None and target.grid.wants_hessian:
        return torch.eye(target.W_NK.shape[1], device=target.W_NK.device)
    return target.importance


class _Stack(NamedTuple):
    """The linears of a site that are one matrix: on equal grids, the errors of their inputs counted alike.

    rows: how many belong to each.
    """

    names: list[str]
    rows: list[int]
    W_NK: Tensor
    grid: Grid
    stats: Stats

    def pieces(self) -> list[_Piece]:
        """Return its rows in pieces."""
        whole = isinstance(self.grid.granularity, PerTensor)
        runs = cut(len(self.W_NK), 1 if whole else pieces(len(self.W_NK)))
        return [_Piece(self, self.W_NK[run.start : run.stop]) for run in runs]

    def linears(self, solved: Solved, W_NK: Tensor) -> Iterator[tuple[str, Answer]]:
        """Yield the linears of what was found for all rows."""
        q, split = solved.q, (W_NK.split(self.rows), solved.q.codes.split(self.rows), solved.q.params.split(self.rows))
        for name, W, codes, params in zip(self.names, *split, strict=True):
            yield name, Answer(Solved(QTensor(codes, params, q.grid, q.g_idx), solved.report), W)


class _Piece(NamedTuple):
    """Neighbouring rows of a stack: their weight, corrected so far, and what was found for it so far."""

    stack: _Stack
    W_NK: Tensor
    solved: Solved | None = None


def pieces(N: int) -> int:
    """Return in how many pieces N rows are solved."""
    return max(1, min(PARTS, N // _LEAST_ROWS))


def solve(method: Method, targets: Mapping[str, Target], stats: Stats) -> dict[str, Answer]:
    """Return what a method's corrections, solver and refiners make of the linears of a site, by name.

    stats: the caller's own; what its corrections alone read is dropped from it.
    """
    stacks = [_stack(targets, names, stats) for names in _stacks(targets)]
    found = [piece for stack in stacks for piece in stack.pieces()]
    lines: dict[str, dict[str, Any]] = {name: {} for name in targets}
    for correction in method.corrections:
        found, more = _corrected(correction, found, stats)
        lines = {name: line | more[name] for name, line in lines.items()}
    _drop_spent(method, [t.grid for t in targets.values()], [stats, *(s.stats for s in stacks)])
    solver = method.solver
    found = [p._replace(solved=gave(solver, solver.solve(p.W_NK, p.stack.grid, p.stack.stats), Solved)) for p in found]
    for refiner in method.refiners:
        stats.forget()  # what the step before made of them
        found = [p._replace(solved=_refined(refiner, p)) for p in found]
    stats.forget()
    answers: dict[str, Answer] = {}
    for stack in stacks:
        own = [p for p in found if p.stack is stack]
        solved = _joined([p.solved for p in own if p.solved])
        answers |= stack.linears(solved, _stacked([p.W_NK for p in own]) if method.corrections else stack.W_NK)
    return {name: answers[name].noted(lines[name]) for name in targets}


def _drop_spent(method: Method, grids: Sequence[Grid], held: Sequence[Stats]) -> None:
    """Drop what corrections alone read, K x K sums of it, before the solver makes factors of its own.

    The Hessian stays: errors are measured by it.
    """
    later = {Hessian} | {stat for step in (method.solver, *method.refiners) for stat in step.needs(grids)}
    for stat in {stat for step in method.corrections for stat in step.needs(grids)} - later:
        for stats in held:
            stats.pop(stat, None)


def _refined(refiner: Refiner, piece: _Piece) -> Solved:
    if piece.solved is None:
        raise ValueError("a piece is refined once it is solved")
    return gave(refiner, refiner.refine(piece.W_NK, piece.solved, piece.stack.stats), Solved)


def _joined(pieces: Sequence[Solved]) -> Solved:
    """Return what was solved in pieces as one."""
    first = pieces[0]
    codes, params = _stacked([s.q.codes for s in pieces]), type(first.q.params).cat([s.q.params for s in pieces])
    sums = {
        name: [sum(column) for column in zip(*(s.ratios[name] for s in pieces), strict=True)] for name in first.ratios
    }
    ratios = {name: round(above / below, 4) if below else 1.0 for name, (above, below) in sums.items()}
    return Solved(QTensor(codes, params, first.q.grid, first.q.g_idx), first.report | ratios)


def gave(step: Step, found: Found, kind: type) -> Found:
    """Return what a step gave back. Raises LlmqError, naming the step, where it is of another kind, as a user's may."""
    if not isinstance(found, kind):
        raise LlmqError(f"{registry.dump(step)} gave back a {type(found).__name__}, not a {kind.__name__}; mend it")
    return found


def _corrected(
    correction: Correction, found: Sequence[_Piece], stats: Stats
) -> tuple[list[_Piece], dict[str, dict[str, Any]]]:
    """Return the pieces with corrected weights, and what is recorded of each linear."""
    judged_Nm = torch.cat([correction.judge(p.W_NK, stats) for p in found])
    stacks = list({id(p.stack): p.stack for p in found}.values())
    rows = {name: n for stack in stacks for name, n in zip(stack.names, stack.rows, strict=True)}
    sums = {name: part.sum(0) for name, part in zip(rows, judged_Nm.split(list(rows.values())), strict=True)}
    each_Nm = torch.cat([sums[name].expand(n, -1) for name, n in rows.items()])
    parts = zip(found, each_Nm.split([len(p.W_NK) for p in found]), strict=True)
    moved = [p._replace(W_NK=correction.correct(p.W_NK, sums_Nm, stats)) for p, sums_Nm in parts]
    lines = {name: correction.line(sums_m, stats) for name, sums_m in sums.items()}
    stats.forget()
    return moved, lines


def _stack(targets: Mapping[str, Target], names: list[str], stats: Stats) -> _Stack:
    weights = [targets[n].W_NK for n in names]
    target = targets[names[0]]
    own = stats if target.importance is None else Stats(stats, target.importance)
    return _Stack(names, [len(W) for W in weights], _stacked(weights), target.grid, own)


def _stacks(targets: Mapping[str, Target]) -> list[list[str]]:
    """Return the names of the linears that are one matrix: on equal grids, the errors of their inputs counted alike."""
    stacks: list[list[str]] = []
    for name, target in targets.items():
        alike = next((s for s in stacks if _alike(targets[s[0]], target)), None)
        if alike is None:
            stacks.append([name])
        else:
            alike.append(name)
    return stacks


def _alike(a: Target, b: Target) -> bool:
    """Say whether two linears may be one matrix."""
    return a.grid.stacks_with(b.grid) and a.importance is None and b.importance is None


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
