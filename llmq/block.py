"""What happens inside one decoder block: transforms, then each site solved in turn, then the block tuned and packed.

A site's linears are corrected, solved and refined with the statistics of the activation they read; their dequantized
weights then take their place, and the suspended batches run on to the next site with them. Where a step wants the float
model's activations too, a copy of the float block runs beside, suspended at the same points.
Not here: the suspended forwards (stream.py), any method (algorithms/).
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

from llmq import spec
from llmq.checkpoint import Sink
from llmq.folding import Fold, fold
from llmq.grids.int import Int
from llmq.job import Job
from llmq.kv_scales import Watch
from llmq.stats import Hessian, Histogram, MeanSquare
from llmq.stream import Call, Lanes, discover, family_sites, no_table, run
from llmq.types import BlockView, LlmqError, Params, Scaling, Site, SiteView, Solved, Target


@dataclass
class Streams:
    """The calibration where it stands between two blocks, batch by batch; moved on in place by each block.

    hidden: what the quantized blocks so far made of it. floats: what the float blocks made of its first batches, as
    many as the steps that compare the two want. calls: the other arguments of a block's call, indexed `[batch][block]`.
    squares: of every linear by full name, the squared gradients at its output, `[T]` a batch, where tokens are weighed.
    tokens: the calibration itself, int64 `[samples, seq_len]`.
    measured: importance of every linear's input so far, where an importance matrix is to be written.
    watch: sees the keys and values of the present quantized block, where their scales are wanted.
    """

    hidden: list[Tensor] = field(default_factory=list)
    floats: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    squares: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    measured: dict[str, MeanSquare] = field(default_factory=dict)
    watch: Watch | None = None


def quantize_block(job: Job, i: int, streams: Streams, sink: Sink) -> dict[str, Any]:
    """Quantize block `i`, write it, move the streams past it. Returns a report line for each of its linears."""
    prefix = f"{job.skeleton.prefix}.{i}."
    at = [c[i] for c in streams.calls]
    with job.skeleton.loaded(i, job.device) as block:
        sites = block_sites(job, block, streams.hidden, at)
        record: dict[str, Any] = {}
        for step in job.plan.transforms:
            record |= _transform(job, step, block, sites, streams.hidden, at, prefix)
        streams.watch = Watch() if job.plan.recipe.kv_bits else None
        solved = _solve(job, block, sites, streams, at, prefix, last=i == len(job.skeleton) - 1)
        packed: dict[str, Tensor] = {}
        if streams.watch is not None:
            dtype = job.plan.format.scale_dtype(job.skeleton.stored_dtype)
            packed |= {prefix + n: t for n, t in streams.watch.tensors(block, job.plan.recipe.kv, dtype).items()}
        for name, s in solved.items():
            full = prefix + name
            packed |= {f"{full}.{k}": t for k, t in job.plan.format.pack(s.q, job.linears[full]).items()}
            record[full] = record.get(full, {}) | s.report
        sink.add(packed | _floats(job, block, prefix))
    return record


def _solve(
    job: Job, block: nn.Module, sites: Sequence[Site], streams: Streams, at: list[Call], prefix: str, *, last: bool
) -> dict[str, Solved]:
    """Solve every site in the order they run, then tune the block; move the streams on."""
    watched = streams.watch.into(at) if streams.watch is not None else at
    solved: dict[str, Solved] = {}
    targets: dict[str, Target] = {}
    moves_on = bool(streams.hidden) and not (last and job.head is None)
    with ExitStack() as stack:
        lanes = reference = None
        if streams.floats:
            original = copy.deepcopy(block)
            reference = stack.enter_context(Lanes(original, sites, streams.floats, at))
        if streams.hidden:
            lanes = stack.enter_context(Lanes(block, sites, streams.hidden, watched))
        for site in sites:
            for target, answer in _solve_site(job, block, site, streams, lanes, reference, prefix):
                targets[target.name], solved[target.name] = target, answer
        outputs = list(reference.finish()) if reference and (moves_on or job.plan.tuners) else []
        if lanes and moves_on and not job.plan.tuners:
            streams.hidden = list(lanes.finish())
    for tuner in job.plan.tuners:
        view = BlockView(block, solved, targets, streams.hidden, outputs, at, job.plan.recipe.seed)
        solved = tuner.tune(view)
        _place(job, block, solved)
    if job.plan.tuners and (moves_on or streams.watch is not None):
        streams.hidden = [run(block, h, c) for h, c in zip(streams.hidden, watched, strict=True)]
    streams.floats = outputs
    return solved


def _solve_site(
    job: Job,
    block: nn.Module,
    site: Site,
    streams: Streams,
    lanes: Lanes | None,
    reference: Lanes | None,
    prefix: str,
) -> list[tuple[Target, Solved]]:
    """Accumulate what the steps need, correct, solve, refine, and put the quantized weights in place."""
    specs = {n: job.linears[prefix + n] for n in site.linears if prefix + n in job.linears}
    static = any(s.scheme.activation and not s.scheme.activation.dynamic for s in specs.values())
    needs = {*job.plan.needs([s.scheme.weight for s in specs.values()]), *((Histogram,) if static else ())}
    measured: set[type] = {MeanSquare} if job.plan.recipe.imatrix_out else set()
    wanted = (needs if specs else set()) | measured
    stats: dict[type, Any] = {c: c() for c in sorted(wanted, key=lambda c: c.__name__)}
    if lanes:
        roots = _roots(job, [streams.squares.pop(prefix + n) for n in site.linears] if streams.squares else [])
        accumulate(stats, lanes.advance(), reference.advance() if reference else None, roots)
    if measured:
        streams.measured |= {prefix + n: stats[MeanSquare] for n in site.linears}
    if not specs:
        return []
    weights: dict[str, Any] = {n: block.get_submodule(n).weight for n in specs}
    given = job.gguf.importance if job.gguf else {}
    targets = [
        Target(n, weights[n].detach().float(), s.scheme.weight, importance=given.get(prefix + n))
        for n, s in specs.items()
    ]
    solved = solve(job, targets, stats)
    if static:
        inputs = _input_params(job, stats[Histogram])
        solved = [(t, Solved(dataclasses.replace(s.q, input=inputs), s.report)) for t, s in solved]
    _place(job, block, {t.name: s for t, s in solved})
    return solved


def _roots(job: Job, squares: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the square roots of the tokens' weights `[T, 1]`, batch by batch; nothing where no step weighs tokens."""
    for weighting in job.plan.weightings if squares else ():
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


def solve(job: Job, targets: list[Target], stats: Mapping[type, Any]) -> list[tuple[Target, Solved]]:
    """Correct, solve and refine linears that read one activation; return what was asked and what was found."""
    for correction in job.plan.corrections:
        targets = correction.correct(targets, stats)
    answers = job.plan.solver.solve(targets, stats)
    for refiner in job.plan.refiners:
        answers = refiner.refine(targets, answers, stats)
    hessian = stats.get(Hessian)
    return [(t, Solved(a.q, _report_line(job, t, a, hessian))) for t, a in zip(targets, answers, strict=True)]


def _place(job: Job, block: nn.Module, solved: dict[str, Solved]) -> None:
    """Put the weights that a runtime will multiply with into the block."""
    for name, s in solved.items():
        module: Any = block.get_submodule(name)
        module.weight.data = s.q.dequantize().to(job.skeleton.dtype)


def _report_line(job: Job, target: Target, solved: Solved, hessian: Hessian | None) -> dict[str, Any]:
    """Return a linear's line in quantization.json, with its squared error relative to the energy.

    The error is that of the output over the calibration where there is a Hessian, else that of the weight.
    """
    W_NK = target.W_NK
    E_NK = solved.q.dequantize() - W_NK
    line: dict[str, Any] = {"method": job.plan.recipe.method, "bits": target.grid.bits}
    if not hessian:
        line["weight_error"] = (E_NK.square().sum() / W_NK.square().sum().clamp(min=1e-30)).item()
    else:
        H_KK = hessian.mean()
        energy = ((W_NK @ H_KK) * W_NK).sum().clamp(min=1e-30)
        line["output_error"] = (((E_NK @ H_KK) * E_NK).sum() / energy).item()
    return line | dict(target.report) | dict(solved.report)


def block_sites(job: Job, block: nn.Module, hidden: Sequence[Tensor], at: Sequence[Call]) -> tuple[Site, ...]:
    """Return the sites of a block: its family's table, or what one forward discovers."""
    known = family_sites(job.skeleton.config.model_type, block)
    if known:
        return known
    if job.plan.transforms:
        raise LlmqError(no_table(job.skeleton.config.model_type, spec.dump(job.plan.transforms[0])))
    if hidden:
        return discover(block, hidden[0][:1], at[0])
    return tuple(Site((n,)) for n, m in block.named_modules() if isinstance(m, nn.Linear))


def _transform(
    job: Job, step: Any, block: nn.Module, sites: Sequence[Site], hidden: list[Tensor], at: list[Call], prefix: str
) -> dict[str, Any]:
    """Collect at every site of the float block, search all sites, then fold all."""
    modules = dict(block.named_modules())
    stats: list[dict[type, Any]] = []
    recorded: dict[str, list[Call]] = {}
    parents = {s.parent for s in sites if step.call_tokens and s.parent not in s.linears}
    hooks = [_record_calls(modules[p], p, recorded, step.call_tokens) for p in sorted(parents)]
    with Lanes(block, sites, hidden, at) as lanes:
        for site in sites:
            accumulators = {c: c() for c in step.needs(site)}
            for X_TK in lanes.advance():
                for a in accumulators.values():
                    a.update(X_TK)
            stats.append(accumulators)
    for hook in hooks:
        hook.remove()
    chosen: list[tuple[Site, Scaling]] = []
    for site, found in zip(sites, stats, strict=True):
        if found:
            schemes = [s.scheme if (s := job.linears.get(prefix + n)) else None for n in site.linears]
            view = SiteView(site, modules, found, recorded.get(site.parent, []), schemes, job.skeleton.head_dim)
            scaling = step.search(view)
            chosen += [(site, scaling)] if scaling else []
    weights = {prefix + n: p.data for n, p in block.named_parameters()}
    number = int(prefix.split(".")[-2])
    for site, scaling in chosen:
        linears, producer = tuple(prefix + n for n in site.linears), f"{prefix}{site.producer}"
        by = Fold(spec.dump(step), number, linears, producer, job.skeleton.head_dim, scaling.scale)
        fold(weights, by, job.source.dtype_of)
    return {prefix + n: scaling.report for site, scaling in chosen for n in site.linears}


def _record_calls(module: nn.Module, name: str, into: dict[str, list[Call]], tokens: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        kept = into.setdefault(name, [])
        if len(kept) * x.shape[:-1].numel() < tokens:
            kept.append((args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _input_params(job: Job, histogram: Histogram) -> Params:
    """Return the static int8 grid of a site's input, `[1]` each, scale in the format's dtype."""
    range_: Any = job.plan.act_range
    scale_dtype = job.plan.format.scale_dtype(job.skeleton.stored_dtype)
    grid = Int(8, True, None, scale_dtype=scale_dtype, range=range_)
    values, counts = histogram.values()
    lo, hi = range_.interval(values[None], grid, counts[None])
    return grid.params(lo, hi)


def _floats(job: Job, block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the block's tensors that stay float, in the stored dtype: norms, biases, skipped linears."""
    quantized = {n.removeprefix(prefix) + ".weight" for n in job.linears if n.startswith(prefix)}
    return {prefix + n: t.to(job.skeleton.stored_dtype) for n, t in block.state_dict().items() if n not in quantized}
