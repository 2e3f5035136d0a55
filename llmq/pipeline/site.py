"""One site: the linears that read one activation, corrected, solved and refined as matrices.

    W of all linears, one below the other -> corrections -> a stack for each grid -> solver -> refiners -> split again

The linears of a site share their statistics, so those on equal grids are one matrix to a solver: one column loop, one
factor of H.
Not here: where the statistics come from (block.py), any method (algorithms/).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from llmq import registry
from llmq.errors import LlmqError
from llmq.pipeline.method import Method
from llmq.stats import Stats
from llmq.steps import Solved, Step
from llmq.types import Grid, QTensor

Found = TypeVar("Found")


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


def solve(method: Method, targets: Mapping[str, Target], stats: Stats) -> dict[str, Answer]:
    """Return what a method's corrections, solver and refiners make of the linears of a site, by name.

    stats: the caller's own; what its corrections alone read is dropped from it.
    """
    corrected, reports = _corrected(method, targets, stats)
    _drop_spent(method, [t.grid for t in targets.values()], stats)
    stacks = [(names, _stacked(corrected, names), _own(stats, targets[names[0]])) for names in _stacks(targets)]
    solver = method.solver
    found = [gave(solver, solver.solve(W_NK, targets[names[0]].grid, own), Solved) for names, W_NK, own in stacks]
    for refiner in method.refiners:
        stats.forget()  # what the step before made of them
        found = [
            gave(refiner, refiner.refine(W_NK, s, own), Solved) for (_, W_NK, own), s in zip(stacks, found, strict=True)
        ]
    stats.forget()
    answers: dict[str, Answer] = {}
    for (names, _, _), solved in zip(stacks, found, strict=True):
        parts = _split(solved.q, [len(corrected[n]) for n in names])
        for name, q in zip(names, parts, strict=True):
            answers[name] = Answer(Solved(q, reports[name] | solved.report), corrected[name])
    return {name: answers[name] for name in targets}


def _drop_spent(method: Method, grids: Sequence[Grid], stats: Stats) -> None:
    """Drop what corrections alone read, K x K sums of it, before the solver makes factors of its own."""
    later = {stat for step in (method.solver, *method.refiners) for stat in step.needs(grids)}
    for stat in {stat for step in method.corrections for stat in step.needs(grids)} - later:
        stats.pop(stat, None)


def gave(step: Step, found: Found, kind: type) -> Found:
    """Return what a step gave back. Raises LlmqError, naming the step, where it is of another kind, as a user's may."""
    if not isinstance(found, kind):
        raise LlmqError(f"{registry.dump(step)} gave back a {type(found).__name__}, not a {kind.__name__}; mend it")
    return found


def _corrected(
    method: Method, targets: Mapping[str, Target], stats: Stats
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the corrected weights of a site, and what is recorded of each."""
    weights = {name: t.W_NK for name, t in targets.items()}
    reports: dict[str, dict[str, Any]] = {name: {} for name in targets}
    rows = [len(W_NK) for W_NK in weights.values()]
    for correction in method.corrections:
        W_NK, lines = correction.correct(_stacked(weights, list(weights)), rows, stats)
        weights = dict(zip(weights, W_NK.split(rows), strict=True))
        reports = {name: reports[name] | line for name, line in zip(reports, lines, strict=True)}
    return weights, reports


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


def _own(stats: Stats, target: Target) -> Stats:
    return stats if target.importance is None else Stats(stats, target.importance)


def _stacked(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return weights[names[0]] if len(names) == 1 else torch.cat([weights[n] for n in names])


def _split(q: QTensor, rows: list[int]) -> Iterator[QTensor]:
    """Yield the linears of a stack, of so many rows each."""
    for codes, params in zip(q.codes.split(rows), q.params.split(rows), strict=True):
        yield QTensor(codes, params, q.grid, q.g_idx)
