"""What happens inside one decoder block: transforms, then each site solved in turn, then the block tuned and packed.

    tensors, report, state = quantize_block(plan, i, state)

Transforms say by which scales the float weights are folded; what stays float is then rounded to what is stored, so that
what runs is what is written. A site's linears are corrected, solved and refined with the statistics of the activation
they read; their dequantized weights take their place, and the suspended batches run on to the next site with them.
Where a step wants the float model's activations too, a copy of the float block runs beside, suspended at the same
points. What follows the last block, the final norm and the output head, is one more block, with one site.
Not here: the suspended forwards (model/lanes.py), solving a site (site.py), any method (algorithms/), making a fold
(model/folding.py), measuring an error (records.py).
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq import registry
from llmq.calibration.collect import collect
from llmq.calibration.kv_scales import KvMaxima
from llmq.calibration.state import Calibration
from llmq.checkpoint.batches import Batches
from llmq.histogram import Histogram
from llmq.model.experts import Passing, linears_of
from llmq.model.folding import Fold, fold
from llmq.model.lanes import Call, Lanes, run
from llmq.model.sites import discover, overridden
from llmq.model.skeleton import Read
from llmq.pipeline.activations import NOT_FINITE, no_static_scale, static_input, unusable
from llmq.pipeline.experts import Layer, Layers
from llmq.pipeline.method import Method
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line, Record
from llmq.pipeline.site import Answer, Target, gave, round_unseen, solve
from llmq.pipeline.trouble import strain, told
from llmq.progress import Work
from llmq.stats import Hessian, MeanSquare, Stat, Stats
from llmq.steps import BlockView, Scaling, SiteView, Solved, Transform, Tuner
from llmq.types import LinearSpec, Params, Producer, Site


@dataclass
class Report:
    """What is known of a block when it is done.

    record: what `quantization.json` says of it. importance: of every linear's input, where an importance matrix is
    wanted. hessians: H of each site by its linears, where their errors are measured again after the last block.
    """

    record: Record = field(default_factory=Record)
    importance: dict[str, MeanSquare] = field(default_factory=dict)
    hessians: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """A decoder block in memory, and what belongs to it.

    number: from 0; that of the head is the number of blocks. state: what enters it. passing: the experts whose weights
    are not in memory. report: grows with the work. work: is told what is done.
    """

    plan: Plan
    number: int
    module: nn.Module
    sites: Sequence[Site]
    state: Calibration
    passing: Passing
    work: Work
    report: Report = field(default_factory=Report)

    @property
    def calls(self) -> Sequence[Call]:
        """The other arguments of its call, batch by batch."""
        return self.calls_in(self.state.calls)

    def calls_in(self, batches: Sequence[Sequence[Call]]) -> Sequence[Call]:
        """Return the block's of the calls of all blocks, batch by batch; the head takes its input alone."""
        return [c[self.number] if self.number < len(c) else ((), {}) for c in batches]

    def full(self, name: str) -> str:
        """Return the full name of what the block calls so."""
        return self.plan.skeleton.full_name(self.number, name)

    def specs(self, site: Site) -> dict[str, LinearSpec]:
        """Return the linears of a site that are quantized, by their names in the block."""
        return {n: s for n in site.linears if (s := self.plan.linears.get(self.full(n)))}

    @property
    def tuners(self) -> Sequence[Tuner]:
        """The steps that tune the block; the head is no block of theirs."""
        return () if self.number == len(self.plan.skeleton) else self.plan.method.tuners

    @property
    def moves_on(self) -> bool:
        """Whether anything behind the block wants its output."""
        behind = len(self.plan.skeleton) - self.number - (self.plan.head is None)
        return self.state.tokens > 0 and behind > 0

    def exact(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the block as the checkpoint has it: what is computed with may hold less, or nothing."""
        source, full = self.plan.source, self.full(name)
        if tensor.is_meta:
            there = full if full in source else self.plan.weight_of(full.removesuffix(".weight"))
            return source.get(there).to(self.plan.device)
        whole = tensor.dtype in (torch.float32, source.dtype_of(full))
        return tensor.detach() if whole else source.get(full).to(tensor.device)


@dataclass(frozen=True)
class _Found:
    """What was found for one linear of the block, by its name there, and what its errors are measured against.

    W_NK: the float weight before any correction. H_KK: the mean `X^T X` of its site, where it was accumulated.
    """

    name: str
    answer: Answer
    W_NK: Tensor
    H_KK: Tensor | None


def reads(plan: Plan) -> Iterator[Read | None]:
    """Yield what is read of each block before it is quantized."""
    return plan.skeleton.reads(range(len(plan.skeleton)), plan.device, experts=_whole(plan))


def _whole(plan: Plan) -> bool:
    """Say whether some step wants the weights of all experts of a block at once."""
    return bool(plan.method.transforms or plan.method.tuners or plan.method.recipe.experts == "all")


def quantize_block(
    plan: Plan, i: int, state: Calibration, work: Work | None = None, read: Read | None = None
) -> tuple[dict[str, Tensor], Report, Calibration]:
    """Quantize block `i`; one behind the last is the head. work: is told what is done in it. read: as for `loaded`.

    Returns the block's tensors as they are written, by full name, what is known of it, and the state behind it.
    """
    work = work or Work()
    work.step("load")
    with ExitStack() as stack:
        module = stack.enter_context(plan.skeleton.loaded(i, plan.device, experts=_whole(plan), read=read))
        passing = stack.enter_context(Passing(module, partial(_read, plan, i)))
        block = _Block(plan, i, module, block_sites(plan, i, module, state), state, passing, work)
        packed, maxima = _opened(block) if i < len(plan.skeleton) else ({}, None)
        solved, state = _solve(block, maxima)
        if maxima is not None:
            dtype = plan.method.format.scale_dtype(plan.skeleton.stored_dtype)
            packed |= {block.full(n): t for n, t in maxima.tensors(module, plan.method.recipe.kv, dtype).items()}
        work.step("pack", list(solved))
        for name, s in solved.items():
            packed |= plan.packed(block.full(name), s.q)
            _note(block, block.full(name), s)
    return packed, block.report, state


def _note(block: _Block, linear: str, solved: Solved) -> None:
    """Record the line of a linear, and say what trouble it tells of."""
    record = block.report.record
    record.note(linear, solved.report)
    trouble = told(record.linears[linear], solved.q.codes.shape[1])
    if trouble:
        record.note(linear, {"trouble": trouble})
    for kind, words in trouble.items():
        block.work.say("trouble", f"{linear}: {kind}: {words}")


def _read(plan: Plan, i: int, name: str) -> Tensor:
    """Return a tensor of block `i` by its name there, as it is computed with."""
    return plan.source.get(plan.skeleton.full_name(i, name)).to(plan.device, plan.skeleton.dtype)


def _opened(block: _Block) -> tuple[dict[str, Tensor], KvMaxima | None]:
    """Transform the block; return what stays float as it is written, and what will see its keys and values."""
    for step in block.plan.method.transforms:
        block.work.step(registry.dump(step))
        _transform(block, step)
    return _settle(block), KvMaxima() if block.plan.method.recipe.kv_bits else None


def _solve(block: _Block, maxima: KvMaxima | None) -> tuple[dict[str, Solved], Calibration]:
    """Solve every site in the order they run, then tune the block; return the state behind it too."""
    plan, module, state, tuners = block.plan, block.module, block.state, block.tuners
    calls = maxima.into(block.calls) if maxima is not None else block.calls
    solved: dict[str, Solved] = {}
    for_tuners: list[_Found] = []
    hidden = outputs = Batches()
    with ExitStack() as stack:
        lanes = reference = None
        needs = plan.method.needs([s.scheme.weight for site in block.sites for s in block.specs(site).values()])
        original = copy.deepcopy(module) if state.floats else None
        layers = stack.enter_context(Layers(module, state.tokens, moments=Hessian in needs))
        block.passing.stay = True
        if original is not None:
            floats = block.calls_in(state.float_calls)
            layers.lead(original)
            reference = stack.enter_context(Lanes(original, block.sites, state.floats, floats))
        if state.hidden:
            lanes = stack.enter_context(Lanes(module, block.sites, state.hidden, calls))
        for site in block.sites:
            solved |= _solve_site(block, site, lanes, reference, layers.of(site), for_tuners)
        if lanes:
            block.report.record.experts |= layers.counts(block.full)
        if reference and (block.moves_on or tuners):
            outputs = state.floats.moved(reference.finish())
        if lanes and block.moves_on and not tuners:
            hidden = state.hidden.moved(lanes.finish())
    for tuner in tuners:
        block.work.step(registry.dump(tuner))
        targets = {f.name: f.answer.W_NK for f in for_tuners}
        view = BlockView(module, solved, targets, state.hidden, outputs, block.calls, plan.method.recipe.seed)
        tuned = gave(tuner, tuner.tune(view), dict)
        solved = {f.name: _placed(block, f, tuned[f.name]) for f in for_tuners}
    if tuners and (block.moves_on or maxima is not None):
        hidden = state.hidden.moved(run(module, h, c) for h, c in zip(state.hidden, calls, strict=True))
    squares = {n: s for n, s in state.squares.items() if not n.startswith(block.full(""))}
    return solved, dataclasses.replace(state, hidden=hidden, floats=outputs, squares=squares)


def _solve_site(
    block: _Block,
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
    static = next((s.scheme.activation for s in specs.values() if s.scheme.static), None)
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
    answers = round_unseen(targets, {"fallback": f"rtn: {bad}"}) if bad else solve(method, targets, stats)
    answers = {n: a.noted(line | strain(targets[n])) for n, a in answers.items()}
    if static:
        inputs, clipped = static_input(static, stats[Histogram])
        answers = {n: a._replace(solved=_with_input(a.solved, inputs)).noted(clipped) for n, a in answers.items()}
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


def _with_input(solved: Solved, inputs: Params) -> Solved:
    return Solved(dataclasses.replace(solved.q, input=inputs), solved.report)


def _placed(block: _Block, found: _Found, solved: Solved) -> Solved:
    """Put the weight that a runtime will multiply with into the block; return the linear with its line."""
    Q_NK = solved.q.dequantize()
    module: Any = block.module.get_submodule(found.name)
    weight = Q_NK.to(block.plan.skeleton.dtype)
    if not module.weight.is_meta:  # nothing runs through the head
        module.weight.data = weight
    elif block.state.tokens:
        block.passing.put(found.name, weight)
    line = {"method": block.plan.method.recipe.method, "bits": solved.q.grid.bits, **solved.report}
    return Solved(solved.q, line | Line().add(solved.q, Q_NK, found.W_NK, found.H_KK).to_json())


def _roots(block: _Block, site: Site, method: Method) -> Iterator[Tensor]:
    """Yield the square roots of the tokens' weights `[T, 1]`, batch by batch; nothing where no step weighs tokens."""
    squares = [s for n in site.linears if (s := block.state.squares.get(block.full(n)))]
    for weighting in method.weightings if squares else ():
        weight_T = weighting.weigh([torch.cat(list(s)) for s in squares])
        yield from weight_T.sqrt()[:, None].split([len(s) for s in squares[0]])


def block_sites(plan: Plan, i: int, block: nn.Module, state: Calibration) -> tuple[Site, ...]:
    """Return the sites of block `i`: as planned, or what one forward discovers; the head is a site itself."""
    if i == len(plan.skeleton):
        return (Site(("head",)),)
    if plan.sites:
        return plan.sites[i]
    if state.probe:
        found = discover(block, state.probe.hidden, state.probe.calls[i])
        return overridden(plan.skeleton.config.model_type, found)
    return tuple(Site((n,)) for n in linears_of(block))


def _transform(block: _Block, step: Transform) -> None:
    """Collect at every site of the float block, search all sites, then fold all; note what was done."""
    plan, record = block.plan, block.report.record
    modules = dict(block.module.named_modules())
    stats, calls = _observe(block, step)
    found: list[tuple[Site, Producer, Scaling]] = []
    for site, seen in zip(block.sites, stats, strict=True):
        specs = block.specs(site)
        schemes = [specs[n].scheme if n in specs else None for n in site.linears]
        view = SiteView(site, modules, seen, calls.get(site.parent, []), schemes)
        bad = unusable(seen)
        if bad == NOT_FINITE:
            for full in (block.full(n) for n in specs):
                record.note(full, {"not_scaled": bad})
        scaling = step.search(view) if site.producer and not bad else None
        if scaling is not None and site.producer:
            found.append((site, site.producer, gave(step, scaling, Scaling)))
    weights = {block.full(n): p.data for n, p in block.module.named_parameters()}
    for site, producer, (scale_K, report) in found:
        linears = tuple(block.full(n) for n in site.linears)
        named = dataclasses.replace(producer, module=block.full(producer.module))
        by = Fold(registry.dump(step), block.number, linears, named, scale_K)
        fold(weights, by, plan.source.dtype_of)
        record.folds.append(by)
        for name in linears:
            if name in plan.linears:
                record.note(name, report)


def _observe(block: _Block, step: Transform) -> tuple[list[Stats], dict[str, list[Call]]]:
    """Run the float block; return what a transform needs of each site, and calls of their parents by name."""
    stats: list[Stats] = []
    calls: dict[str, list[Call]] = {}
    parents = {s.parent for s in block.sites if step.call_tokens and s.producer and s.parent not in s.linears}
    hooks = [_record_calls(block.module.get_submodule(p), p, calls, step.call_tokens) for p in sorted(parents)]
    with Lanes(block.module, block.sites, block.state.hidden, block.calls) as lanes:
        for site in block.sites:
            stats.append(collect(step.needs(site), lanes.advance(), block.state.dealt))
    for hook in hooks:
        hook.remove()
    return stats, calls


def _record_calls(module: nn.Module, name: str, into: dict[str, list[Call]], tokens: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        kept = into.setdefault(name, [])
        if len(kept) * x.shape[:-1].numel() < tokens:
            kept.append((args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _settle(block: _Block) -> dict[str, Tensor]:
    """Round what stays float (norms, biases, skipped linears, buffers) to what is stored; return that by full name."""
    floats: dict[str, Tensor] = {}
    for name, tensor in block.module.state_dict().items():
        full = block.full(name)
        if full.removesuffix(".weight") not in block.plan.linears:
            floats[full] = block.exact(name, tensor).to(block.plan.source.dtype_of(full))
            tensor.copy_(floats[full])
    return floats
