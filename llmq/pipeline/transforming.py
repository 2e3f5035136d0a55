"""A transform on a decoder block: what it asks for is collected, then its scales are folded into the float weights.

All batches run once through the float block; nothing is put in place between two sites, so none has to wait.
Not here: which scales (algorithms/), making a fold (model/folding.py), what is rounded afterwards (block.py).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from llmq import registry
from llmq.calibration.collect import close, see, started
from llmq.model.experts import in_experts
from llmq.model.folding import Fold, fold
from llmq.model.lanes import Call, run
from llmq.pipeline import channels
from llmq.pipeline.activations import NOT_FINITE, unusable
from llmq.pipeline.loaded import Block
from llmq.pipeline.site import gave
from llmq.stats import Stats
from llmq.steps import Scaling, SiteView, Transform
from llmq.team import Team
from llmq.types import Producer, Site


def transform(block: Block, step: Transform) -> None:
    """Collect at every site of the float block, search all sites, then fold all; note what was done."""
    plan, record = block.plan, block.report.record
    modules, experts = dict(block.module.named_modules()), in_experts(block.module)
    stats, calls = _observe(block, step)
    calls = _of_the_first(calls, plan.team)
    found: list[tuple[Site, Producer, Scaling]] = []
    for site, seen in zip(block.sites, stats, strict=True):
        specs = block.specs(site)
        schemes = [specs[n].scheme if n in specs else None for n in site.linears]
        view = SiteView(site, modules, seen, calls.get(site.parent, []), schemes, plan.team)
        bad = unusable(seen)
        if bad == NOT_FINITE:
            for full in (block.full(n) for n in specs):
                record.note(full, {"not_scaled": bad})
        scaling = _searched(step, view) if site.producer and seen and not bad else None  # seen: see `Transform.needs`
        if not bad and site.linears[0] not in experts:
            reading = [block.full(n) for n in site.linears]
            record.activations += channels.scaled(block.number, reading, registry.dump(step), seen, scaling)
        if scaling is not None and site.producer:
            found.append((site, site.producer, scaling))
    weights = {block.full(n): p.data for n, p in block.module.named_parameters()}
    for site, producer, (scale_K, report) in found:
        linears = tuple(block.full(n) for n in site.linears)
        named = dataclasses.replace(producer, module=block.full(producer.module))
        by = Fold(registry.dump(step), block.number, linears, named, scale_K.to(plan.device))
        fold(weights, by, plan.source.dtype_of)
        record.folds.append(by)
        for name in linears:
            if name in plan.linears:
                record.note(name, report)


def _searched(step: Transform, view: SiteView) -> Scaling | None:
    """Return what all processes found together, as the first one has it."""
    mine = step.search(view)
    found: Scaling | None = view.team.first(lambda: mine)
    return None if found is None else gave(step, found, Scaling)


def _of_the_first(calls: dict[str, list[Call]], team: Team) -> dict[str, list[Call]]:
    """Return the calls that the first process recorded, on every process; all have the same memory format."""
    leaves, spec = tree_flatten(calls)
    mine = {str(i): x.contiguous() for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    rest, spec = team.first(lambda: ([None if isinstance(x, Tensor) else x for x in leaves], spec))
    (sent,) = team.tensors([mine] if team.leads else [])
    found: dict[str, list[Call]] = tree_unflatten([sent.get(str(i), x) for i, x in enumerate(rest)], spec)
    return found


def _observe(block: Block, step: Transform) -> tuple[list[Stats], dict[str, list[Call]]]:
    """Run the float block; return what a transform needs of each site, and calls of their parents by name."""
    dealt = block.state.dealt
    stats = [started(step.needs(site), dealt) for site in block.sites]
    calls: dict[str, list[Call]] = {}
    parents = {s.parent for s in block.sites if step.call_tokens and s.producer and s.parent not in s.linears}
    batches = zip(block.state.hidden, block.calls, strict=True)
    with ExitStack() as hooks:
        for parent in sorted(parents):
            module = block.module.get_submodule(parent)
            hooks.callback(_record_calls(module, parent, calls, step.call_tokens).remove)
        for part in dealt.parts:
            for number in part:
                with _seen_by(stats, block, dealt.starts[number]):
                    run(block.module, *next(batches))
            close([stat for of_site in stats for stat in of_site.values()], dealt)
            hooks.close()  # calls are of the first part, which is the first process' own
    for of_site in stats:
        of_site.tokens = sum(dealt.team.gather(of_site.tokens))
    return stats, calls


@contextmanager
def _seen_by(stats: Sequence[Stats], block: Block, at: int) -> Iterator[None]:
    """Add to the statistics of each site what its linears read of a batch, whose first token has the number `at`."""

    def hook(of_site: Stats) -> Any:
        return lambda _module, args: see(of_site, at, args[0].reshape(-1, args[0].shape[-1]))

    with ExitStack() as hooks:
        for site, of_site in zip(block.sites, stats, strict=True):
            linear = block.module.get_submodule(site.linears[0])
            hooks.callback(linear.register_forward_pre_hook(hook(of_site)).remove)
        yield


def _record_calls(module: nn.Module, name: str, into: dict[str, list[Call]], tokens: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        kept = into.setdefault(name, [])
        if len(kept) * x.shape[:-1].numel() < tokens:
            kept.append((args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)
