"""What can be refused of a run by the headers and the recipe alone, in one line each, with the remedy.

    refusals.linears(method, specs)   # LlmqError: signround tunes integers and small floats only; for GGUF leave it out

Not here: what a format cannot hold (`Format.check`), what only the weights can say (weights.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from llmq import registry
from llmq.calibration.kv_scales import owner_of_cache
from llmq.format import packed_bytes
from llmq.model.experts import Experts
from llmq.model.skeleton import Skeleton
from llmq.pipeline.inputs import unpaired
from llmq.pipeline.method import Method
from llmq.recipe import Recipe
from llmq.steps import Transform
from llmq.types import AffineGrid, LinearSpec, LlmqError, RangedGrid

if TYPE_CHECKING:
    from llmq.pipeline.plan import Plan


def head(skeleton: Skeleton) -> None:
    """Refuse to quantize a head that is no linear behind a final norm, where calibration finds its input."""
    if not isinstance(skeleton.model.get_output_embeddings(), nn.Linear):
        raise LlmqError(
            f"--lm-head: the head of model_type {skeleton.config.model_type!r} is no linear; leave it float"
        )
    _ = skeleton.final_norm  # raises where there is none


def experts(recipe: Recipe, skeleton: Skeleton) -> None:
    """Refuse an option of experts where there are none, or where it means nothing."""
    found = [m for m in skeleton.model.modules() if isinstance(m, Experts)]
    if recipe.experts and not found:
        raise LlmqError(f"--experts means nothing here: {skeleton.source.path} has no experts")
    if recipe.experts == "all" and all(m.batched for m in found):
        raise LlmqError("--experts all means nothing here: the router makes zeros of an expert's other tokens")


def learns_positions(skeleton: Skeleton, longest: int) -> bool:
    """Say whether the model has a learned embedding of each of so many positions, or of a few more, as OPT has."""
    tokens = skeleton.model.get_input_embeddings()
    tables = [m for m in skeleton.model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return any(longest <= m.num_embeddings < longest + 8 for m in tables)


def steps(method: Method, skeleton: Skeleton) -> None:
    """Refuse steps that the model does not admit."""
    if method.recipe.kv_bits:
        for i, block in enumerate(skeleton.blocks):
            owner_of_cache(block, f"{skeleton.prefix}.{i}")
    if method.finishers and method.recipe.quantizes_inputs:
        raise LlmqError(f"{registry.dump(method.finishers[0])} tunes models with float activations only; leave it out")


def linears(method: Method, specs: Sequence[LinearSpec]) -> None:
    """Refuse what quantized activations and steps that move codes and scales ask of the linears, and these are not."""
    for s in specs:
        if why := unpaired(s.scheme):
            raise LlmqError(f"{s.name}: {why}, or --skip it")
    for step in method.transforms:
        _transform(step, specs)
    for tuner in (*method.tuners, *method.finishers):
        _tuner(registry.dump(tuner), method.recipe, specs)


def _transform(step: Transform, specs: Sequence[LinearSpec]) -> None:
    """Refuse a transform that reckons with evenly spaced values where there are others."""
    grids = [grid for s in specs for grid in (s.scheme.weight, s.scheme.activation) if grid is not None]
    if step.of_integers and (other := next((g for g in grids if not isinstance(g, AffineGrid)), None)):
        raise LlmqError(
            f"{registry.dump(step)} reckons with integers, not with {registry.dump(other)}: the error of a float is "
            "relative to it, and no scale of a channel changes that; leave it out"
        )


def _tuner(step: str, recipe: Recipe, specs: Sequence[LinearSpec]) -> None:
    """Refuse what a step that moves codes and scales by gradients cannot tune."""
    if not specs or any(not isinstance(s.scheme.weight, RangedGrid) for s in specs):
        raise LlmqError(f"{step} tunes integers and small floats only; for GGUF leave it out")
    shared = next((s for s in specs if s.scheme.weight.granularity.height(2) > 1), None)
    if shared:
        by = shared.scheme.weight.granularity
        raise LlmqError(
            f"{shared.name}: {step} moves the scale of every row, which rows share {by}; take one per channel"
        )
    if recipe.samples is not None and recipe.samples < 2:
        raise LlmqError(f"{step} judges by sequences that it does not train on; give at least 2 --samples")


def budget(plan: Plan) -> None:
    """Refuse a budget of bits that does not even hold the fewest."""
    recipe, form = plan.method.recipe, plan.method.format
    if recipe.target_bpw is None:
        return
    sizes = [plan.sizes(s).values() if n != plan.head else [packed_bytes(form, s)] for n, s in plan.linears.items()]
    least = sum(map(min, sizes))
    if least > plan.budget():
        bits = recipe.target_bpw * least / plan.budget()
        said = "--choices" if recipe.choices else "--bit-choices"
        raise LlmqError(
            f"--target-bpw {recipe.target_bpw:g} is too low: at the fewest of {said} a weight takes {bits:.3f} "
            "bits, scales and zeros counted; say more, or allow fewer bits"
        )
