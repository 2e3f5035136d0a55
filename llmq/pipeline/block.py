"""What happens inside one decoder block: transforms, then each site solved in turn, then the block tuned and packed.

    tensors, report, state = quantize_block(plan, i, state)

Transforms say by which scales the float weights are folded; what stays float is then rounded to what is stored, so that
what runs is what is written. A site's linears are corrected, solved and refined with the statistics of the activation
they read; their dequantized weights take their place, and the suspended batches run on to the next site with them.
Where a step wants the float model's activations too, a copy of the float block runs beside, suspended at the same
points. What follows the last block, the final norm and the output head, is one more block, with one site.
Not here: the suspended forwards (model/lanes.py), solving a site (solving.py, site.py), any method (algorithms/),
making a fold (model/folding.py), running a transform (transforming.py), measuring an error (records.py).
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from llmq import registry
from llmq.calibration.kv_scales import KvMaxima
from llmq.calibration.state import Calibration
from llmq.checkpoint.batches import Batches
from llmq.model.experts import Passing, in_experts
from llmq.model.lanes import Lanes, run
from llmq.model.skeleton import Read
from llmq.pipeline.experts import Layers, in_order, stages
from llmq.pipeline.loaded import Block, Report, block_sites
from llmq.pipeline.plan import Plan
from llmq.pipeline.site import gave
from llmq.pipeline.solving import Found, Runs, lined, place, solve_stage
from llmq.pipeline.transforming import transform
from llmq.pipeline.trouble import told
from llmq.progress import Work
from llmq.stats import Hessian
from llmq.steps import BlockView, Solved


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

    No codes outlive their stage but for a tuner.
    """
    plan, module, state, tuners = block.plan, block.module, block.state, block.tuners
    calls = maxima.into(block.calls) if maxima is not None else block.calls
    words: dict[str, Tensor] = {}
    for_tuners: list[Found] = []
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
        runs = Runs(lanes, reference, layers)
        for stage in stages(module, block.sites):
            found = list(solve_stage(block, stage, runs))
            if tuners:
                for_tuners += found
            else:
                words |= _packed(block, {f.name: f.solved for f in found})
        if lanes:
            block.report.record.experts |= layers.counts(block.full, plan.team)
        if tuners or (reference and block.moves_on):
            outputs = state.floats.moved(reference.finish() if reference else ())
        if lanes and block.moves_on and not tuners:
            hidden = state.hidden.moved(lanes.finish())
    if tuners:
        words = _packed(block, _tuned(block, for_tuners, outputs))
    if tuners and (block.moves_on or maxima is not None):
        hidden = state.hidden.moved(run(module, h, c) for h, c in zip(state.hidden, calls, strict=True))
    squares = {n: s for n, s in state.squares.items() if not n.startswith(block.full(""))}
    block.report.record.linears = in_order(block.report.record.linears)
    return in_order(words), dataclasses.replace(state, hidden=hidden, floats=outputs, squares=squares)


def _tuned(block: Block, found: Sequence[Found], outputs: Batches) -> dict[str, Solved]:
    """Tune all linears of the block together; return them with their lines, their weights in place."""
    solved = in_order({f.name: f.solved for f in found})
    for tuner in block.tuners:
        block.work.step(registry.dump(tuner))
        tuned = gave(tuner, tuner.tune(_view(block, solved, found, outputs)), dict)
        solved = in_order({f.name: _again(block, f, tuned[f.name]) for f in found})
    return solved


def _again(block: Block, found: Found, solved: Solved) -> Solved:
    """Put what a tuner made of a linear in place; return it with its line."""
    if found.W_NK is None:
        raise ValueError("a linear is tuned with its float weight at hand")
    return lined(block, solved, place(block, found.name, solved), found.W_NK, found.H_KK, block.plan.team)


def _view(block: Block, solved: Mapping[str, Solved], found: Sequence[Found], outputs: Batches) -> BlockView:
    """Return what a tuner sees: all batches, whichever process made them, so that all do the same."""
    plan, state = block.plan, block.state
    plan.team.meet()
    numbers = range(len(state.dealt.starts))
    calls = block.calls_of(state.calls, numbers)
    targets = {f.name: f.corrected for f in found if f.corrected is not None}
    return BlockView(
        block.module, solved, targets, state.hidden.of(numbers), outputs.of(numbers), calls, plan.method.recipe.seed
    )


def _settle(block: Block) -> dict[str, Tensor]:
    """Round what stays float (norms, biases, skipped linears, buffers) to what is stored; return that by full name."""
    floats: dict[str, Tensor] = {}
    for name, tensor in block.module.state_dict().items():
        full = block.full(name)
        if full.removesuffix(".weight") not in block.plan.linears:
            floats[full] = block.exact(name, tensor).to(block.plan.source.dtype_of(full))
            tensor.copy_(floats[full])
    return floats
