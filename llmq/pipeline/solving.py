"""The sites of a block that are ready together: statistics are collected, linears solved, their weights put in place.

An ordinary site is one at a time; several processes share its rows. Experts come in stages (model/experts.py): what
enters their gates, or their down projections, is known for some experts before any of these linears runs. Several
processes deal those by owner: of each expert the sums are added up where it is solved, its factors are made there and
nowhere else, and all are sent the codes. Either way what is computed is what one process computes, bit for bit.
Not here: which sites there are and what follows the last (block.py), the steps on matrices (site.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmq.calibration.collect import collect
from llmq.histogram import Histogram
from llmq.model.lanes import Lanes
from llmq.pipeline import channels
from llmq.pipeline.activations import no_static_scale, static_input, unusable
from llmq.pipeline.experts import Layer, Layers
from llmq.pipeline.loaded import Block
from llmq.pipeline.method import Method
from llmq.pipeline.records import Line
from llmq.pipeline.site import Answer, Kinds, Target, restored, round_unseen, solve, taken_apart
from llmq.pipeline.trouble import strain
from llmq.stats import Hessian, MeanSquare, Stat, Stats
from llmq.steps import Solved
from llmq.team import ALONE, Team, Tensors
from llmq.types import LinearSpec, Scheme, Site


class Runs(NamedTuple):
    """What runs through a block: the batches, the float model's beside them, and the experts that they meet."""

    lanes: Lanes | None
    reference: Lanes | None
    layers: Layers


@dataclass(frozen=True)
class Found:
    """What was found for one linear of the block, by its name there, with its line for the record.

    The rest is there for tuners and finishers alone, None or empty where the run has none that wants it.
    corrected: the corrected weight that it was solved for. W_NK: the float weight that errors are measured against.
    H_KK: the mean `X^T X` of its site, where it was accumulated.
    """

    name: str
    solved: Solved
    corrected: Tensor | None = None
    W_NK: Tensor | None = None
    H_KK: Tensor | None = None


class _Seen(NamedTuple):
    """A site, what of the method means something for it, what is recorded of the rest, and what was collected."""

    site: Site
    layer: Layer | None
    method: Method
    line: dict[str, Any]
    specs: dict[str, LinearSpec]
    stats: Stats


def solve_stage(block: Block, stage: Sequence[Site], runs: Runs) -> Iterator[Found]:
    """Solve sites whose inputs all arrive before any of their linears runs; their quantized weights are then in place.

    Several are those of experts.
    """
    for found in _solved_sites(block, stage, runs):
        if block.plan.method.finishers and found and found[0].H_KK is not None:
            block.report.hessians[tuple(block.full(f.name) for f in found)] = found[0].H_KK
        yield from found


def _solved_sites(block: Block, stage: Sequence[Site], runs: Runs) -> Iterator[list[Found]]:
    team = block.plan.team
    waiting = [n for site in stage for n in site.linears]
    if len(stage) == 1 or team.size == 1:
        yield from (_solved(block, _collected(block, site, runs, waiting), team) for site in stage)
        return
    for at in range(0, len(stage), team.size):
        seen = [_collected(block, s, runs, waiting, owner) for owner, s in enumerate(stage[at : at + team.size])]
        yield from _sent(block, [_solved(block, s, ALONE) for s in team.own(seen)])


def _collected(block: Block, site: Site, runs: Runs, waiting: Sequence[str], owner: int | None = None) -> _Seen:
    """Collect what the steps need of a site. waiting: the linears whose weights still matter.

    owner: the one process that has sums of products then; None for all of them.
    """
    plan, layer = block.plan, runs.layers.of(site)
    method, line = _method(plan.method, layer)
    specs = block.specs(site)
    static = any(s.scheme.static for s in specs.values())
    needs = {*method.needs([s.scheme.weight for s in specs.values()]), *((Histogram,) if static else ())}
    measured: set[type[Stat]] = {MeanSquare} if plan.method.recipe.imatrix_out else set()
    stats = Stats()
    if runs.lanes:
        kinds = (needs if specs else set()) | measured
        block.work.step("forward", site.linears)
        floats = runs.reference.advance() if runs.reference else None
        moments = layer.moments if layer is not None else None
        coming, roots = runs.lanes.advance(), _roots(block, site, method)
        stats = collect(kinds, coming, block.state.dealt, floats, roots, moments, owner)
        block.passing.only(waiting)  # all batches have left those before
    if measured:
        block.report.importance |= {block.full(n): stats[MeanSquare] for n in site.linears}
    return _Seen(site, layer, method, line, specs, stats)


def _solved(block: Block, seen: _Seen, team: Team) -> list[Found]:
    """Solve the linears of a site and put their weights in place."""
    site, layer, method, line, specs, stats = seen
    if not specs:
        return []
    plan, calibrated = block.plan, bool(block.state.dealt.parts)
    block.work.step("solve", list(specs))
    weights = {n: _float(block, n) for n in specs}
    targets = {n: Target(W, specs[n].scheme.weight, plan.importance(block.full(n))) for n, W in weights.items()}
    if layer is not None and calibrated:
        line = line | {"tokens": stats.tokens}
        stats.layer = layer.mean(site)
    static = any(s.scheme.static for s in specs.values())
    bad = unusable(stats) if calibrated else ""
    if bad and static:
        raise no_static_scale(block.full(site.linears[0]), layer, bad)
    answers = round_unseen(targets, {"fallback": f"rtn: {bad}"}) if bad else solve(method, targets, stats, team)
    answers = {n: a.noted(line | strain(a.W_NK, a.solved.q)) for n, a in answers.items()}
    if static:
        answers = {n: _with_input(a, specs[n].scheme, stats[Histogram]) for n, a in answers.items()}
    if calibrated and layer is None and not bad:
        block.report.record.activations += channels.solved(block.number, [block.full(n) for n in specs], stats)
    H_KK = stats[Hessian].mean() if Hessian in stats and not bad else None
    return [_placed(block, n, a, weights[n], H_KK, team) for n, a in answers.items()]


def _placed(block: Block, name: str, answer: Answer, W_NK: Tensor, H_KK: Tensor | None, team: Team) -> Found:
    """Put the weight of a linear in place and measure its errors; keep what later steps want of it, nothing else."""
    solved = lined(block, answer.solved, place(block, name, answer.solved), W_NK, H_KK, team)
    if block.tuners:
        return Found(name, solved, answer.W_NK, W_NK, H_KK)
    return Found(name, solved, H_KK=H_KK if block.plan.method.finishers else None)


def place(block: Block, name: str, solved: Solved) -> Tensor:
    """Put the weight that a runtime will multiply with into the block; return it as decoded, float32."""
    Q_NK = solved.q.dequantize()
    module: Any = block.module.get_submodule(name)
    weight = Q_NK.to(block.plan.skeleton.dtype)
    if not module.weight.is_meta:  # nothing runs through the head
        module.weight.data = weight
    elif block.state.tokens:
        block.passing.put(name, weight)
    return Q_NK


def lined(block: Block, solved: Solved, Q_NK: Tensor, W_NK: Tensor, H_KK: Tensor | None, team: Team) -> Solved:
    """Return what was solved with its whole line: errors and checksums too. team: whose processes share the rows."""
    line = {"method": block.plan.method.recipe.method, "bits": solved.q.grid.bits, **solved.report}
    return Solved(solved.q, line | Line().add(solved.q, Q_NK, W_NK, H_KK, team).to_json())


def _sent(block: Block, mine: Sequence[list[Found]]) -> Iterator[list[Found]]:
    """Yield what every process found for its site of several; put the weights of the others in place."""
    team = block.plan.team
    about = team.dealt([[(f.name, f.solved.report, taken_apart(f.solved.q)[0]) for f in found] for found in mine])
    tensors = team.tensors([_tensors(found) for found in mine])
    for i, (linears, each) in enumerate(zip(about, tensors, strict=True)):
        own = i % team.size == team.rank
        yield mine[0] if own else [_received(block, *linear, each) for linear in linears]


def _tensors(found: Sequence[Found]) -> Tensors:
    """Return all tensors of a site that other processes are sent: of its linears, by the name of each, and its H."""
    every: Tensors = {}
    for f in found:
        own = taken_apart(f.solved.q)[1] | ({} if f.corrected is None else {"corrected": f.corrected})
        every |= {f"{f.name} {leaf}": t for leaf, t in own.items()}
        every |= {} if f.H_KK is None else {"H_KK": f.H_KK}
    return every


def _received(block: Block, name: str, report: dict[str, Any], kinds: Kinds, tensors: Tensors) -> Found:
    """Return what another process found for a linear, whose weight is put in place."""
    own = {leaf: t for key, t in tensors.items() for of, _, leaf in (key.partition(" "),) if of == name}
    corrected = own.pop("corrected", None)
    solved, W_NK = Solved(restored(kinds, own), report), _float(block, name) if block.tuners else None
    place(block, name, solved)
    return Found(name, solved, corrected, W_NK, tensors.get("H_KK"))


def _float(block: Block, name: str) -> Tensor:
    """Return the float weight of a linear as the checkpoint has it, folds included."""
    return block.exact(f"{name}.weight", block.module.get_parameter(f"{name}.weight")).float()


def _method(method: Method, layer: Layer | None) -> tuple[Method, dict[str, Any]]:
    """Return what of a method means something for experts, and what is recorded of the rest.

    Weights of tokens are the float model's, which routes other tokens to an expert; of experts that are called with
    weighted inputs of all tokens at once, the float model's do not pair with those either.
    """
    line: dict[str, Any] = {}
    if layer is not None and method.weightings:
        method, line = dataclasses.replace(method, weightings=()), {"weighting": "none: the model routes other tokens"}
    if layer is not None and layer.experts.batched and method.corrections:
        method = dataclasses.replace(method, corrections=())
        line["correction"] = "none: the float model routes other tokens"
    return method, line


def _with_input(answer: Answer, scheme: Scheme, histogram: Histogram) -> Answer:
    """Return what was found for a linear with what calibration fixes of its input's grid, where that is anything."""
    if scheme.activation is None or not scheme.static:
        return answer
    inputs, clipped = static_input(scheme.activation, histogram)
    solved = answer.solved
    q = dataclasses.replace(solved.q, input=inputs)
    return answer._replace(solved=Solved(q, solved.report)).noted(clipped)


def _roots(block: Block, site: Site, method: Method) -> Iterator[Tensor]:
    """Yield the square roots of the tokens' weights `[T, 1]` of own batches; nothing where no step weighs tokens."""
    squares = [s for n in site.linears if (s := block.state.squares.get(block.full(n)))]
    for weighting in method.weightings if squares else ():
        weight_T = weighting.weigh([torch.cat(list(s)) for s in squares])
        roots = weight_T.sqrt()[:, None].split([len(s) for s in squares[0]])
        yield from (roots[number] for number in block.state.hidden.numbers)
