"""What happens inside one decoder block: transforms, then each site solved in turn, then the block tuned and packed.

    tensors, report, state = quantize_block(plan, i, state)

Transforms say by which scales the float weights are folded; what stays float is then rounded to what is stored, so that
what runs is what is written. A site's linears are corrected, solved and refined with the statistics of the activation
they read; their dequantized weights take their place, and the suspended batches run on to the next site with them.
Where a step wants the float model's activations too, a copy of the float block runs beside, suspended at the same
points. What follows the last block, the final norm and the output head, is one more block, with one site.
Not here: the suspended forwards (model/lanes.py), solving a site (site.py), any method (algorithms/), making a fold
(model/folding.py), running a transform (transforming.py), measuring an error (records.py).
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmq import registry
from llmq.calibration.collect import collect
from llmq.calibration.kv_scales import KvMaxima
from llmq.calibration.state import Calibration
from llmq.checkpoint.batches import Batches
from llmq.histogram import Histogram
from llmq.model.experts import Passing, in_experts
from llmq.model.lanes import Lanes, run
from llmq.model.skeleton import Read
from llmq.pipeline.activations import no_static_scale, static_input, unusable
from llmq.pipeline.experts import Layer, Layers
from llmq.pipeline.loaded import Block, Report, block_sites
from llmq.pipeline.method import Method
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line
from llmq.pipeline.site import Answer, Target, gave, round_unseen, solve
from llmq.pipeline.transforming import transform
from llmq.pipeline.trouble import strain, told
from llmq.progress import Work
from llmq.stats import Hessian, MeanSquare, Stat, Stats
from llmq.steps import BlockView, Solved
from llmq.types import Scheme, Site


@dataclass(frozen=True)
class _Found:
    """What was found for one linear of the block, by its name there, and what its errors are measured against.

    W_NK: the float weight before any correction. H_KK: the mean `X^T X` of its site, where it was accumulated.
    """

    name: str
    answer: Answer
    W_NK: Tensor
    H_KK: Tensor | None


def reads(plan: Plan, first: int = 0) -> Iterator[Read | None]:
    """Yield what is read of each block before it is quantized, from the `first` on."""
    return plan.skeleton.reads(range(first, len(plan.skeleton)), plan.device, experts=plan.method.loads_all_experts)


def quantize_block(
    plan: Plan, i: int, state: Calibration, work: Work | None = None, read: Read | None = None
) -> tuple[dict[str, Tensor], Report, Calibration]:
    """Quantize block `i`; one behind the last is the head. work: is told what is done in it. read: as for `loaded`.

    Returns the block's tensors as the first process writes them, by full name, what is known of it, and the state
    behind it.
    """
    work = work or Work()
    work.step("load")
    with ExitStack() as stack:
        experts = plan.method.loads_all_experts
        module = stack.enter_context(plan.skeleton.loaded(i, plan.device, experts=experts, read=read))
        passing = stack.enter_context(Passing(module, partial(plan.skeleton.tensor, i, device=plan.device)))
        block = Block(plan, i, module, block_sites(plan, i, module, state), state, passing, work)
        packed, maxima = _opened(block) if i < len(plan.skeleton) else ({}, None)
        words, state = _solve(block, maxima)
        if maxima is not None:
            maxima.meet(plan.team)
            dtype = plan.method.format.scale_dtype(plan.skeleton.stored_dtype)
            recipe = plan.method.recipe
            scales = maxima.tensors(module, recipe.kv, recipe.kv_dtype, dtype)
            packed |= {block.full(n): t for n, t in scales.items()}
    return packed | words, block.report, state


def _packed(block: Block, solved: Mapping[str, Solved]) -> dict[str, Tensor]:
    """Note the lines of linears; return their tensors as the first process writes them, by full name."""
    block.work.step("pack", list(solved))
    words: dict[str, Tensor] = {}
    for name, s in solved.items():
        words |= block.plan.packed(block.full(name), s.q) if block.plan.team.leads else {}
        _note(block, block.full(name), s)
    return words


def _note(block: Block, linear: str, solved: Solved) -> None:
    """Record the line of a linear, and say what trouble it tells of."""
    record = block.report.record
    record.note(linear, solved.report)
    trouble = told(record.linears[linear], solved.q.codes.shape[1])
    if trouble:
        record.note(linear, {"trouble": trouble})
    for kind, words in trouble.items():
        block.work.say("trouble", f"{linear}: {kind}: {words}")


def _opened(block: Block) -> tuple[dict[str, Tensor], KvMaxima | None]:
    """Transform the block; return what stays float as it is written, and what will see its keys and values."""
    for step in block.plan.method.transforms:
        block.work.step(registry.dump(step))
        transform(block, step)
    return _settle(block), KvMaxima() if block.plan.method.recipe.kv_bits else None


def _solve(block: Block, maxima: KvMaxima | None) -> tuple[dict[str, Tensor], Calibration]:
    """Solve every site in the order they run, then tune the block; return what is packed, and the state behind it.

    No codes outlive their site but for a tuner.
    """
    plan, module, state, tuners = block.plan, block.module, block.state, block.tuners
    calls = maxima.into(block.calls) if maxima is not None else block.calls
    words: dict[str, Tensor] = {}
    solved: dict[str, Solved] = {}
    for_tuners: list[_Found] = []
    hidden = outputs = Batches()
    with ExitStack() as stack:
        lanes = reference = None
        needs = plan.method.needs([s.scheme.weight for site in block.sites for s in block.specs(site).values()])
        original = copy.deepcopy(module) if state.floats else None
        layers = stack.enter_context(Layers(module, state.tokens, moments=Hessian in needs))
        block.passing.stay = True
        alive = None if in_experts(module) else plan.alive  # of experts, no weight is there to run anew through
        if original is not None:
            floats = block.calls_of(state.float_calls, state.floats.numbers)
            layers.lead(original)
            reference = stack.enter_context(Lanes(original, block.sites, state.floats, floats, alive))
        if state.dealt.parts:  # though no batch of them may be this process' own
            lanes = stack.enter_context(Lanes(module, block.sites, state.hidden, calls, alive))
        for site in block.sites:
            solved |= _solve_site(block, site, lanes, reference, layers.of(site), for_tuners)
            if solved and not tuners:
                words |= _packed(block, solved)
                solved.clear()
        if lanes:
            block.report.record.experts |= layers.counts(block.full, plan.team)
        if tuners or (reference and block.moves_on):
            outputs = state.floats.moved(reference.finish() if reference else ())
        if lanes and block.moves_on and not tuners:
            hidden = state.hidden.moved(lanes.finish())
    for tuner in tuners:
        block.work.step(registry.dump(tuner))
        tuned = gave(tuner, tuner.tune(_view(block, solved, for_tuners, outputs)), dict)
        solved = {f.name: _placed(block, f, tuned[f.name]) for f in for_tuners}
    if tuners:
        words = _packed(block, solved)
    if tuners and (block.moves_on or maxima is not None):
        hidden = state.hidden.moved(run(module, h, c) for h, c in zip(state.hidden, calls, strict=True))
    squares = {n: s for n, s in state.squares.items() if not n.startswith(block.full(""))}
    return words, dataclasses.replace(state, hidden=hidden, floats=outputs, squares=squares)


def _view(block: Block, solved: Mapping[str, Solved], found: Sequence[_Found], outputs: Batches) -> BlockView:
    """Return what a tuner sees: all batches, whichever process made them, so that all do the same."""
    plan, state = block.plan, block.state
    plan.team.meet()
    numbers = range(len(state.dealt.starts))
    calls, targets = block.calls_of(state.calls, numbers), {f.name: f.answer.W_NK for f in found}
    return BlockView(
        block.module, solved, targets, state.hidden.of(numbers), outputs.of(numbers), calls, plan.method.recipe.seed
    )


def _solve_site(
    block: Block,
    site: Site,
    lanes: Lanes | None,
    reference: Lanes | None,
    layer: Layer | None,
    for_tuners: list[_Found],
) -> dict[str, Solved]:
    """Collect what the steps need, solve, and put the quantized weights in place.

    layer: the experts that the linears belong to. for_tuners: gets what was found, where the block is tuned afterwards;
    else no weight and no H outlives its site.
    """
    plan, report = block.plan, block.report
    method, line = _method(plan.method, layer)
    specs = block.specs(site)
    static = any(s.scheme.static for s in specs.values())
    needs = {*method.needs([s.scheme.weight for s in specs.values()]), *((Histogram,) if static else ())}
    measured: set[type[Stat]] = {MeanSquare} if plan.method.recipe.imatrix_out else set()
    stats = Stats()
    if lanes:
        kinds = (needs if specs else set()) | measured
        block.work.step("forward", site.linears)
        floats = reference.advance() if reference else None
        moments = layer.moments if layer is not None else None
        stats = collect(kinds, lanes.advance(), block.state.dealt, floats, _roots(block, site, method), moments)
        block.passing.only(site.linears)  # all batches have left those before
    if measured:
        report.importance |= {block.full(n): stats[MeanSquare] for n in site.linears}
    if not specs:
        return {}
    block.work.step("solve", list(specs))
    weights = {n: block.exact(f"{n}.weight", block.module.get_parameter(f"{n}.weight")).float() for n in specs}
    targets = {n: Target(W, specs[n].scheme.weight, plan.importance(block.full(n))) for n, W in weights.items()}
    if layer is not None and lanes:
        line = line | {"tokens": stats.tokens}
        stats.layer = layer.mean(site)
    bad = unusable(stats) if lanes else ""
    if bad and static:
        raise no_static_scale(block.full(site.linears[0]), layer, bad)
    answers = round_unseen(targets, {"fallback": f"rtn: {bad}"}) if bad else solve(method, targets, stats, plan.team)
    answers = {n: a.noted(line | strain(a.W_NK, a.solved.q)) for n, a in answers.items()}
    if static:
        answers = {n: _with_input(a, specs[n].scheme, stats[Histogram]) for n, a in answers.items()}
    H_KK = stats[Hessian].mean() if Hessian in stats and not bad else None
    if plan.method.finishers and H_KK is not None:
        report.hessians[tuple(block.full(n) for n in specs)] = H_KK
    found = [_Found(n, a, weights[n], H_KK) for n, a in answers.items()]
    for_tuners += found if block.tuners else []
    return {f.name: _placed(block, f, f.answer.solved) for f in found}


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


def _placed(block: Block, found: _Found, solved: Solved) -> Solved:
    """Put the weight that a runtime will multiply with into the block; return the linear with its line."""
    Q_NK = solved.q.dequantize()
    module: Any = block.module.get_submodule(found.name)
    weight = Q_NK.to(block.plan.skeleton.dtype)
    if not module.weight.is_meta:  # nothing runs through the head
        module.weight.data = weight
    elif block.state.tokens:
        block.passing.put(found.name, weight)
    line = {"method": block.plan.method.recipe.method, "bits": solved.q.grid.bits, **solved.report}
    return Solved(solved.q, line | Line().add(solved.q, Q_NK, found.W_NK, found.H_KK, block.plan.team).to_json())


def _roots(block: Block, site: Site, method: Method) -> Iterator[Tensor]:
    """Yield the square roots of the tokens' weights `[T, 1]` of own batches; nothing where no step weighs tokens."""
    squares = [s for n in site.linears if (s := block.state.squares.get(block.full(n)))]
    for weighting in method.weightings if squares else ():
        weight_T = weighting.weigh([torch.cat(list(s)) for s in squares])
        roots = weight_T.sqrt()[:, None].split([len(s) for s in squares[0]])
        yield from (roots[number] for number in block.state.hidden.numbers)


def _settle(block: Block) -> dict[str, Tensor]:
    """Round what stays float (norms, biases, skipped linears, buffers) to what is stored; return that by full name."""
    floats: dict[str, Tensor] = {}
    for name, tensor in block.module.state_dict().items():
        full = block.full(name)
        if full.removesuffix(".weight") not in block.plan.linears:
            floats[full] = block.exact(name, tensor).to(block.plan.source.dtype_of(full))
            tensor.copy_(floats[full])
    return floats
