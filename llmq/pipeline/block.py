"""What happens inside one decoder block: transforms, then each site solved in turn, then the block tuned and packed.

Transforms say by which scales the float weights are folded; what stays float is then rounded to what is stored, so that
what runs is what is written. A site's linears are corrected, solved and refined with the statistics of the activation
they read; their dequantized weights take their place, and the suspended batches run on to the next site with them.
Where a step wants the float model's activations too, a copy of the float block runs beside, suspended at the same
points.
Not here: the suspended forwards (skeleton.py), any method (algorithms/), making a fold (folding.py), measuring an error
(records.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq import registry
from llmq.calibration.kv_scales import Watch
from llmq.checkpoint import Scratch, Sink
from llmq.grids.int import Int
from llmq.model.folding import Fold, fold
from llmq.model.lanes import Call, Lanes, run
from llmq.model.sites import discover, family_sites, no_table
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line, Record
from llmq.stats import Hessian, Histogram, MeanSquare
from llmq.types import BlockView, LlmqError, Params, Scaling, Site, SiteView, Solved, Target


@dataclass
class Streams:
    """The calibration where it stands between two blocks, batch by batch; moved on in place by each block.

    hidden: what the quantized blocks so far made of it. floats: what the float blocks made of its first batches, as
    many as the steps that compare the two want. calls: the other arguments of a block's call, indexed `[batch][block]`.
    squares: of every linear by full name, the squared gradients at its output, `[T]` a batch, where tokens are weighed.
    tokens: the calibration itself, int64 `[samples, seq_len]`.
    measured: importance of every linear's input so far, where an importance matrix is to be written.
    hessians: H of every linear by full name, set aside where its error is measured again after the blocks.
    watch: sees the keys and values of the present quantized block, where their scales are wanted.
    """

    hidden: list[Tensor] = field(default_factory=list)
    floats: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    squares: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    measured: dict[str, MeanSquare] = field(default_factory=dict)
    hessians: Scratch | None = None
    watch: Watch | None = None


@dataclass(frozen=True)
class _Block:
    """A decoder block in memory, and what belongs to it.

    number: from 0. calls: the other arguments of its call, batch by batch.
    """

    plan: Plan
    number: int
    module: nn.Module
    sites: Sequence[Site]
    calls: Sequence[Call]
    streams: Streams

    def full(self, name: str) -> str:
        """Return the full name of what the block calls so."""
        return f"{self.plan.skeleton.prefix}.{self.number}.{name}"

    @property
    def moves_on(self) -> bool:
        """Whether anything behind the block wants its output."""
        last = self.number == len(self.plan.skeleton) - 1
        return bool(self.streams.hidden) and not (last and self.plan.head is None)

    def exact(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the block as the checkpoint has it: what is computed with may hold less."""
        source = self.plan.source
        whole = tensor.dtype in (torch.float32, source.dtype_of(self.full(name)))
        return tensor.detach() if whole else source.get(self.full(name)).to(tensor.device)


@dataclass(frozen=True)
class _Answer:
    """What was found for one linear, and what its errors are measured against.

    name: within the block. target: what the solver was asked. W_NK: the float weight that it was made of. H_KK: the
    mean `X^T X` of its site, where it was accumulated.
    """

    name: str
    target: Target
    solved: Solved
    W_NK: Tensor
    H_KK: Tensor | None


def quantize_block(plan: Plan, i: int, streams: Streams, sink: Sink) -> Record:
    """Quantize block `i`, write it, move the streams past it. Returns what is recorded of it."""
    calls = [c[i] for c in streams.calls]
    record = Record()
    with plan.skeleton.loaded(i, plan.device) as module:
        block = _Block(plan, i, module, block_sites(plan, module, streams.hidden, calls), calls, streams)
        for step in plan.method.transforms:
            _transform(block, step, record)
        packed = _settle(block)
        streams.watch = Watch() if plan.method.recipe.kv_bits else None
        solved = _solve(block)
        if streams.watch is not None:
            dtype = plan.method.format.scale_dtype(plan.skeleton.stored_dtype)
            packed |= {block.full(n): t for n, t in streams.watch.tensors(module, plan.method.recipe.kv, dtype).items()}
        for name, s in solved.items():
            full = block.full(name)
            packed |= {f"{full}.{k}": t for k, t in plan.method.format.pack(s.q, plan.linears[full]).items()}
            record.note(full, s.report)
        sink.add(packed)
    return record


def _solve(block: _Block) -> dict[str, Solved]:
    """Solve every site in the order they run, then tune the block; move the streams on."""
    plan, module, streams = block.plan, block.module, block.streams
    watched = streams.watch.into(block.calls) if streams.watch is not None else block.calls
    solved: dict[str, Solved] = {}
    for_tuners: list[_Answer] = []
    with ExitStack() as stack:
        lanes = reference = None
        if streams.floats:
            original = copy.deepcopy(module)
            reference = stack.enter_context(Lanes(original, block.sites, streams.floats, block.calls))
        if streams.hidden:
            lanes = stack.enter_context(Lanes(module, block.sites, streams.hidden, watched))
        for site in block.sites:
            solved |= _solve_site(block, site, lanes, reference, for_tuners)
        outputs = list(reference.finish()) if reference and (block.moves_on or plan.method.tuners) else []
        if lanes and block.moves_on and not plan.method.tuners:
            streams.hidden = list(lanes.finish())
    for tuner in plan.method.tuners:
        targets = {a.name: a.target for a in for_tuners}
        view = BlockView(module, solved, targets, streams.hidden, outputs, block.calls, plan.method.recipe.seed)
        tuned = tuner.tune(view)
        solved = {a.name: _placed(block, dataclasses.replace(a, solved=tuned[a.name])) for a in for_tuners}
    if plan.method.tuners and (block.moves_on or streams.watch is not None):
        streams.hidden = [run(module, h, c) for h, c in zip(streams.hidden, watched, strict=True)]
    streams.floats = outputs
    return solved


def _solve_site(
    block: _Block, site: Site, lanes: Lanes | None, reference: Lanes | None, for_tuners: list[_Answer]
) -> dict[str, Solved]:
    """Accumulate what the steps need, correct, solve, refine, and put the quantized weights in place.

    for_tuners: gets what was found, where the block is tuned afterwards; else no weight and no H outlives its site.
    """
    plan, streams = block.plan, block.streams
    specs = {n: plan.linears[block.full(n)] for n in site.linears if block.full(n) in plan.linears}
    static = any(s.scheme.activation and not s.scheme.activation.dynamic for s in specs.values())
    needs = {*plan.method.needs([s.scheme.weight for s in specs.values()]), *((Histogram,) if static else ())}
    measured: set[type] = {MeanSquare} if plan.method.recipe.imatrix_out else set()
    wanted = (needs if specs else set()) | measured
    stats: dict[type, Any] = {c: c() for c in sorted(wanted, key=lambda c: c.__name__)}
    if lanes:
        roots = _roots(plan, [streams.squares.pop(block.full(n)) for n in site.linears] if streams.squares else [])
        accumulate(stats, lanes.advance(), reference.advance() if reference else None, roots)
    if measured:
        streams.measured |= {block.full(n): stats[MeanSquare] for n in site.linears}
    if not specs:
        return {}
    weights = {n: block.exact(f"{n}.weight", block.module.get_parameter(f"{n}.weight")).float() for n in specs}
    given = plan.gguf.importance if plan.gguf else {}
    targets = [
        Target(n, W_NK, specs[n].scheme.weight, importance=given.get(block.full(n))) for n, W_NK in weights.items()
    ]
    found = solve(plan, targets, stats)
    if static:
        inputs = _input_params(plan, stats[Histogram])
        found = [(t, Solved(dataclasses.replace(s.q, input=inputs), s.report)) for t, s in found]
    H_KK = mean_of(stats)
    if streams.hessians is not None and H_KK is not None:
        streams.hessians.keep([block.full(n) for n in specs], H_KK)
    answers = [_Answer(t.name, t, s, weights[t.name], H_KK) for t, s in found]
    for_tuners += answers if plan.method.tuners else []
    return {a.name: _placed(block, a) for a in answers}


def mean_of(stats: Mapping[type, Any]) -> Tensor | None:
    """Return H of a site, None where it was not accumulated."""
    hessian = stats.get(Hessian)
    return hessian.mean() if hessian else None


def _placed(block: _Block, answer: _Answer) -> Solved:
    """Put the weight that a runtime will multiply with into the block; return the linear with its line."""
    Q_NK = answer.solved.q.dequantize()
    module: Any = block.module.get_submodule(answer.name)
    module.weight.data = Q_NK.to(block.plan.skeleton.dtype)
    return recorded(block.plan, answer.solved, Q_NK, answer.W_NK, answer.H_KK)


def recorded(plan: Plan, solved: Solved, Q_NK: Tensor, W_NK: Tensor, H_KK: Tensor | None) -> Solved:
    """Return a solved linear with its line of quantization.json; see records.py for what is measured."""
    line = {"method": plan.method.recipe.method, "bits": solved.q.grid.bits, **solved.report}
    return Solved(solved.q, line | Line().add(solved.q, Q_NK, W_NK, H_KK).to_json())


def _roots(plan: Plan, squares: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the square roots of the tokens' weights `[T, 1]`, batch by batch; nothing where no step weighs tokens."""
    for weighting in plan.method.weightings if squares else ():
        weight_T = weighting.weigh([torch.cat(list(s)) for s in squares])
        yield from weight_T.sqrt()[:, None].split([len(s) for s in squares[0]])


def accumulate(
    stats: Mapping[type, Any],
    hidden: Iterable[Tensor],
    floats: Iterator[Tensor] | None,
    roots: Iterator[Tensor] | None = None,
) -> None:
    """Add activations `[T, K]` batch by batch; `floats` are the float model's of the first of these batches.

    roots: what the activations of a token are multiplied by in sums of products, `[T, 1]` a batch.
    """
    for X_TK in hidden:
        F_TK = next(floats, None) if floats else None
        root = next(roots, None) if roots else None
        for a in stats.values():
            by = root if a.weighed else None
            if not a.paired:
                a.update(_times(X_TK, by))
            elif F_TK is not None:
                a.update(_times(X_TK, by), _times(F_TK, by))


def _times(x: Tensor, by: Tensor | None) -> Tensor:
    return x if by is None else x * by


def solve(plan: Plan, targets: list[Target], stats: Mapping[type, Any]) -> list[tuple[Target, Solved]]:
    """Correct, solve and refine linears that read one activation; return what was asked and what was found."""
    for correction in plan.method.corrections:
        targets = correction.correct(targets, stats)
    answers = plan.method.solver.solve(targets, stats)
    for refiner in plan.method.refiners:
        answers = refiner.refine(targets, answers, stats)
    return [(t, Solved(a.q, {**t.report, **a.report})) for t, a in zip(targets, answers, strict=True)]


def block_sites(plan: Plan, block: nn.Module, hidden: Sequence[Tensor], at: Sequence[Call]) -> tuple[Site, ...]:
    """Return the sites of a block: its family's table, or what one forward discovers."""
    known = family_sites(plan.skeleton.config.model_type, block)
    if known:
        return known
    if plan.method.transforms:
        raise LlmqError(no_table(plan.skeleton.config.model_type, registry.dump(plan.method.transforms[0])))
    if hidden:
        return discover(block, hidden[0][:1], at[0])
    return tuple(Site((n,)) for n, m in block.named_modules() if isinstance(m, nn.Linear))


def _transform(block: _Block, step: Any, record: Record) -> None:
    """Collect at every site of the float block, search all sites, then fold all; note what was done."""
    plan, head_dim = block.plan, block.plan.skeleton.head_dim
    modules = dict(block.module.named_modules())
    stats, calls = _observe(block, step)
    found: list[tuple[Site, Scaling]] = []
    for site, seen in zip(block.sites, stats, strict=True):
        schemes = [s.scheme if (s := plan.linears.get(block.full(n))) else None for n in site.linears]
        view = SiteView(site, modules, seen, calls.get(site.parent, []), schemes, head_dim)
        scaling = step.search(view) if seen else None
        found += [(site, scaling)] if scaling else []
    weights = {block.full(n): p.data for n, p in block.module.named_parameters()}
    for site, (scale_K, report) in found:
        linears = tuple(block.full(n) for n in site.linears)
        by = Fold(registry.dump(step), block.number, linears, block.full(site.producer or ""), head_dim, scale_K)
        fold(weights, by, plan.source.dtype_of)
        record.folds.append(by)
        for name in linears:
            if name in plan.linears:
                record.note(name, report)


def _observe(block: _Block, step: Any) -> tuple[list[dict[type, Any]], dict[str, list[Call]]]:
    """Run the float block; return what a transform needs of each site, and calls of their parents by name."""
    stats: list[dict[type, Any]] = []
    calls: dict[str, list[Call]] = {}
    parents = {s.parent for s in block.sites if step.call_tokens and s.parent not in s.linears}
    hooks = [_record_calls(block.module.get_submodule(p), p, calls, step.call_tokens) for p in sorted(parents)]
    with Lanes(block.module, block.sites, block.streams.hidden, block.calls) as lanes:
        for site in block.sites:
            stats.append({c: c() for c in step.needs(site)})
            accumulate(stats[-1], lanes.advance(), None)
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


def _input_params(plan: Plan, histogram: Histogram) -> Params:
    """Return the static int8 grid of a site's input, `[1]` each, scale in the format's dtype."""
    range_: Any = plan.method.act_range
    scale_dtype = plan.method.format.scale_dtype(plan.skeleton.stored_dtype)
    grid = Int(8, True, None, scale_dtype=scale_dtype, range=range_)
    values, counts = histogram.values()
    lo, hi = range_.interval(values[None], grid, counts[None])
    return grid.params(torch.minimum(lo, hi), torch.maximum(lo, hi))  # never falling: runtimes want positive scales


def _settle(block: _Block) -> dict[str, Tensor]:
    """Round what stays float (norms, biases, skipped linears, buffers) to what is stored; return that by full name."""
    floats: dict[str, Tensor] = {}
    for name, tensor in block.module.state_dict().items():
        full = block.full(name)
        if full.removesuffix(".weight") not in block.plan.linears:
            floats[full] = block.exact(name, tensor).to(block.plan.source.dtype_of(full))
            tensor.copy_(floats[full])
    return floats
