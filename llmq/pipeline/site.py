"""One site: the linears that read one activation, corrected, solved and refined as matrices, in pieces of their rows.

    W of all linears, a stack for each grid -> pieces of rows -> corrections -> solver -> refiners -> joined, split

The linears of a site share their statistics, so those on equal grids are one matrix to a solver: one factor of H. Steps
work row by row, so a stack is cut into pieces, which take less memory and can be dealt over processes. A product of
other shapes is rounded otherwise, so the cuts depend on the stack alone, and lie between rows that share no scale.
Not here: where the statistics come from (solving.py), any method (algorithms/).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from llmq import registry
from llmq.calibration.dealing import PARTS, cut
from llmq.errors import LlmqError
from llmq.pipeline.method import Method
from llmq.stats import Hessian, Stats
from llmq.steps import Correction, Refiner, Solved, Step
from llmq.team import ALONE, Team
from llmq.types import Grid, Parameters, QTensor

Found = TypeVar("Found")
_LEAST_ROWS = 512  # of a piece: fewer make products slow


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
    found = {n: QTensor.rounded(t.W_NK, t.grid, _weight(t)) for n, t in _spanned(targets).items()}
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
        N, by = len(self.W_NK), self.grid.granularity
        height = by.height(N)
        return [_Piece(self, self.W_NK[r.start * height : r.stop * height]) for r in cut(by.rows(N), pieces(N))]

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


def solve(method: Method, targets: Mapping[str, Target], stats: Stats, team: Team = ALONE) -> dict[str, Answer]:
    """Return what a method's corrections, solver and refiners make of the linears of a site, by name.

    stats: the caller's own; what its corrections alone read is dropped from it. team: whose processes share the pieces.
    """
    stats.rows = sum(len(target.W_NK) for target in targets.values())
    stacks = [_stack(targets, names, stats) for names in _stacks(targets)]
    mine = team.own([piece for stack in stacks for piece in stack.pieces()])
    lines: dict[str, dict[str, Any]] = {name: {} for name in targets}
    for correction in method.corrections:
        sums = _judged(correction, stacks, mine, stats, team)
        mine = _corrected(correction, stacks, mine, sums, team)
        lines = {name: line | correction.line(sums[name], stats) for name, line in lines.items()}
        stats.forget()
    mine = _spanning(stacks, mine, team)
    _drop_spent(method, [t.grid for t in targets.values()], [stats, *(s.stats for s in stacks)])
    solver = method.solver
    mine = [p._replace(solved=gave(solver, solver.solve(p.W_NK, p.stack.grid, p.stack.stats), Solved)) for p in mine]
    for refiner in method.refiners:
        stats.forget()  # what the step before made of them
        mine = [p._replace(solved=_refined(refiner, p)) for p in mine]
    stats.forget()
    moved = bool(method.corrections and method.tuners)  # else nobody asks what a linear was solved for
    found = iter(_gathered(mine, team, moved=moved))
    answers: dict[str, Answer] = {}
    for stack in stacks:
        own = list(itertools.islice(found, len(stack.pieces())))
        weights = [W_NK for _, W_NK in own if W_NK is not None]
        answers |= stack.linears(_joined([solved for solved, _ in own]), _stacked(weights) if moved else stack.W_NK)
    return {name: answers[name].noted(lines[name]) for name in targets}


def _judged(
    correction: Correction, stacks: Sequence[_Stack], mine: Sequence[_Piece], stats: Stats, team: Team
) -> dict[str, Tensor]:
    """Return what is judged of the rows of each linear, summed, in the order of the stacks."""
    judged = team.tensors([{"judged": correction.judge(p.W_NK, stats)} for p in mine])
    rows = {name: n for stack in stacks for name, n in zip(stack.names, stack.rows, strict=True)}
    parts = torch.cat([each["judged"] for each in judged]).split(list(rows.values()))
    return {name: part.sum(0) for name, part in zip(rows, parts, strict=True)}


def _corrected(
    correction: Correction, stacks: Sequence[_Stack], mine: Sequence[_Piece], sums: Mapping[str, Tensor], team: Team
) -> list[_Piece]:
    """Return this process' pieces with corrected weights."""
    each_Nm = torch.cat([sums[n].expand(rows, -1) for s in stacks for n, rows in zip(s.names, s.rows, strict=True)])
    parts = team.own(each_Nm.split([len(piece.W_NK) for stack in stacks for piece in stack.pieces()]))
    return [
        p._replace(W_NK=correction.correct(p.W_NK, sums_Nm, p.stack.stats))
        for p, sums_Nm in zip(mine, parts, strict=True)
    ]


def _gathered(mine: Sequence[_Piece], team: Team, *, moved: bool) -> Iterator[tuple[Solved, Tensor | None]]:
    """Yield what all processes found for their pieces, in order, and the rows that each was solved for, if `moved`."""
    own = [(p.solved, p.W_NK) for p in mine if p.solved]
    about = team.dealt([(taken_apart(s.q)[0], s.report, s.ratios) for s, _ in own])
    tensors = team.tensors([taken_apart(s.q)[1] | ({"W_NK": W_NK} if moved else {}) for s, W_NK in own])
    for (kinds, report, ratios), each in zip(about, tensors, strict=True):
        W_NK = each.pop("W_NK", None)
        yield Solved(restored(kinds, each), report, ratios), W_NK


class Kinds(NamedTuple):
    """What a quantized weight is beside its tensors: the classes of its parameters, its input's, and its grid."""

    params: type[Parameters]
    input: type[Parameters] | None
    grid: Grid


def taken_apart(q: QTensor) -> tuple[Kinds, dict[str, Tensor]]:
    """Return what a quantized weight is, and its tensors by name, as one process sends it to others."""
    tensors = {"codes": q.codes, **q.params.tensors(), **({} if q.g_idx is None else {"g_idx": q.g_idx})}
    kinds = Kinds(type(q.params), None if q.input is None else type(q.input), q.grid)
    return kinds, tensors if q.input is None else tensors | {f"input {n}": t for n, t in q.input.tensors().items()}


def restored(kinds: Kinds, tensors: Mapping[str, Tensor]) -> QTensor:
    """Invert `taken_apart`."""
    leaves = dict(tensors)
    codes, g_idx = leaves.pop("codes"), leaves.pop("g_idx", None)
    inputs = {n.removeprefix("input "): leaves.pop(n) for n in list(leaves) if n.startswith("input ")}
    params = kinds.params(**leaves)
    return QTensor(codes, params, kinds.grid, g_idx, kinds.input(**inputs) if kinds.input else None)


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
    line = dict(first.report)
    for name in first.ratios:
        above, below = (sum(s.ratios[name][i] for s in pieces) for i in range(2))
        line[name] = round(above / below, 4) if below else 1.0
    return Solved(QTensor(codes, params, first.q.grid, first.q.g_idx), line)


def gave(step: Step, found: Found, kind: type) -> Found:
    """Return what a step gave back. Raises LlmqError, naming the step, where it is of another kind, as a user's may."""
    if not isinstance(found, kind):
        raise LlmqError(f"{registry.dump(step)} gave back a {type(found).__name__}, not a {kind.__name__}; mend it")
    return found


def _spanned(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Return the linears of a site, any of which a runtime may fuse, on grids that share what is stored once."""
    spanning = _shared([(t.grid, t.W_NK) for t in targets.values()])
    return {name: t._replace(grid=spanning(t.grid)) for name, t in targets.items()}


def _shared(weights: Sequence[tuple[Grid, Tensor]]) -> Callable[[Grid], Grid]:
    """Return what makes of a grid the one that spans all weights on grids equal to it."""
    kinds: dict[Grid, list[tuple[Tensor, Grid]]] = {}
    for grid, W_NK in weights:
        kinds.setdefault(grid, []).append((W_NK, grid))
    return lambda grid: grid.spanning(*zip(*kinds[grid], strict=True))


def _spanning(stacks: Sequence[_Stack], mine: Sequence[_Piece], team: Team) -> list[_Piece]:
    """Return this process' pieces on grids that span all of the site, as large as its weights are by now."""
    found = team.tensors([{"largest": torch.stack(p.W_NK.aminmax()).abs().amax().reshape(1, 1)} for p in mine])
    grids = [stack.grid for stack in stacks for _ in stack.pieces()]
    spanning = _shared(list(zip(grids, (each["largest"] for each in found), strict=True)))
    return [p._replace(stack=p.stack._replace(grid=spanning(p.stack.grid))) for p in mine]


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
