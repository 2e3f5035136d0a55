"""A recipe with its objects made: the steps, a format, and the scheme of every linear by name.

Not here: what a user may write (recipe.py), the model that it is for (plan.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from llmq import registry
from llmq.format import Format, Wanted
from llmq.guard.patterns import Pattern
from llmq.overrides import Override, parse
from llmq.pipeline.inputs import input_grid, unpaired
from llmq.recipe import UNCLIPPED, Recipe
from llmq.schemes import FLOAT
from llmq.stats import Stat
from llmq.steps import (
    RUNNING_ORDER,
    Correction,
    Finisher,
    Refiner,
    Rotation,
    SiteStep,
    Solver,
    Step,
    Transform,
    Tuner,
    Weighting,
)
from llmq.types import Grid, LinearSpec, LlmqError, Range, RangedGrid, Scheme

_HELD = {
    "desc_act": "g_idx; drop desc_act (static groups) or use --format gptq",
    "kv": "scales of a key-value cache; use --format compressed-tensors",
}
STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
"""What a recipe calls a strategy of key-value scales, and what compressed-tensors does."""


@dataclass(frozen=True)
class Differing:
    """How the linears of an override differ from the rest.

    weight, inputs: grids that take the place of the rest's, None where those stay; floats: their inputs are not
    quantized. options: of the weight's grid, that change. said, as `REGEX:weights=fp8,inputs=fp8`.
    """

    said: Override
    weight: Grid | None
    inputs: RangedGrid | None
    floats: bool
    options: Mapping[str, str]

    def of(self, scheme: Scheme) -> Scheme:
        """Return what a scheme becomes. Raises LlmqError for an option that its grid does not have."""
        grid = registry.changed(self.weight or scheme.weight, self.options, f"--override {self.said.text!r}")
        return Scheme(grid, None if self.floats else self.inputs or scheme.activation)


@dataclass(frozen=True)
class Method:
    """A resolved recipe with its objects made."""

    recipe: Recipe
    solver: Solver
    format: Format
    base: Scheme | None  # None where the format's own types take its place (GGUF)
    embedding: Scheme | None  # None where it stays as the format has it
    overrides: tuple[Differing, ...]
    candidates: Mapping[str, Differing | None]  # what a budget of bits chooses from, None where a linear stays float
    skip: tuple[Pattern, ...]
    rotations: tuple[Rotation, ...]
    weightings: tuple[Weighting, ...]
    transforms: tuple[Transform, ...]
    corrections: tuple[Correction, ...]
    refiners: tuple[Refiner, ...]
    tuners: tuple[Tuner, ...]
    finishers: tuple[Finisher, ...]

    @property
    def loads_all_experts(self) -> bool:
        """Whether the weights of all experts of a block are in memory at once: some step wants them."""
        return bool(self.transforms or self.tuners or self.recipe.experts == "all")

    def needs(self, grids: Sequence[Grid]) -> tuple[type[Stat], ...]:
        """Return the Stat classes that the steps of a site want for linears on these grids."""
        steps: tuple[SiteStep, ...] = (*self.corrections, self.solver, *self.refiners)
        return tuple(dict.fromkeys(stat for step in steps for stat in step.needs(grids)))

    def possible(self, spec: LinearSpec) -> dict[str, LinearSpec | None]:
        """Return what a linear may become under a budget of bits, None where it stays float."""
        return {
            name: None if c is None else dataclasses.replace(spec, scheme=c.of(spec.scheme))
            for name, c in self.candidates.items()
        }

    def wanted(self) -> Wanted:
        """Return what formats look at."""
        recipe = self.recipe
        leaves, weighs = recipe.on_misfit == "skip", bool(self.needs([]))
        return Wanted(self.schemes, recipe.override, self.skip, bool(recipe.lm_head), weighs, leaves, self.embedding)

    def schemes(self, linears: Sequence[str]) -> dict[str, Scheme]:
        """Return what linears become, those that stay float left out.

        Raises LlmqError for an override or a skip that matches none.
        """
        overrides = [(o.said.text, o.said.pattern) for o in self.overrides if o.said.text != UNCLIPPED]
        asked = [*((p.pattern, p) for p in self.skip), *overrides]
        for text, pattern in asked:
            if not any(pattern.search(n) for n in linears):
                raise LlmqError(f"{text!r} matches no linear; names look like {linears[0]}")
        return {n: s for n in linears if (s := self.scheme(n))}

    def scheme(self, name: str) -> Scheme | None:
        """Return what the linear of that full name becomes, None where it stays float."""
        if self.base is None or any(p.search(name) for p in self.skip):
            return None
        scheme = self.base
        for override in self.overrides:
            if override.said.pattern.search(name):
                scheme = override.of(scheme)
        return scheme


def method_of(recipe: Recipe, model_dtype: torch.dtype) -> Method:
    """Make a recipe's objects. Raises LlmqError for anything in it that names nothing or does not go together."""
    recipe = recipe.resolved()
    steps = _steps(recipe)
    (solver,) = steps[Solver]
    fmt = _format(recipe, solver)
    base, overrides = _schemes(recipe, recipe.grid, fmt.scale_dtype(model_dtype)) if recipe.grid else (None, ())
    skip = tuple(Pattern(s, f"--skip {s!r}") for s in recipe.skip)
    dtype, names = fmt.scale_dtype(model_dtype), recipe.candidates() if base else ()
    table = Scheme(_grid(recipe.embedding_grid, dtype)) if recipe.embedding_grid else None
    candidates = {c: None if c == FLOAT else _candidate(c, base, dtype) for c in names if base}
    several: dict[str, Any] = {f"{kind.kind}s": tuple(found) for kind, found in steps.items() if kind is not Solver}
    return Method(recipe, solver, fmt, base, table, overrides, candidates, skip, **several)


def _schemes(recipe: Recipe, text: str, scale_dtype: torch.dtype) -> tuple[Scheme, tuple[Differing, ...]]:
    """Return the scheme of most linears, whose grid a text names, and how some differ from it."""
    grid = _grid(text, scale_dtype)
    scheme = Scheme(grid, _activation(recipe, scale_dtype))
    if why := unpaired(scheme):
        raise LlmqError(why)
    return scheme, tuple(_override(o, scheme, scale_dtype) for o in recipe.override)


def _activation(recipe: Recipe, scale_dtype: torch.dtype) -> RangedGrid | None:
    """Return the grid of the linears' inputs, None where they stay float."""
    if not recipe.input_grid:
        return None
    range_ = registry.load("ranges", recipe.act_range, code=True) if recipe.act_range else None
    if getattr(range_, "wants_hessian", False):
        raise LlmqError(f"--act-range {recipe.act_range} weighs errors of weights; choose another for activations")
    return input_grid(_grid(recipe.input_grid, scale_dtype), f"--inputs {recipe.inputs}")


def _grid(text: str, scale_dtype: torch.dtype) -> Grid:
    """Return the grid that a text names, for a format that stores scales in a dtype."""
    grid: Grid = registry.load("grids", text, code=True)
    return grid.stored_in(scale_dtype)


def _steps(recipe: Recipe) -> dict[type[Step], list[Any]]:
    """Return the steps of a method by their kind. Raises LlmqError where they are out of order."""
    steps: dict[type[Step], list[Any]] = {kind: [] for kind in RUNNING_ORDER}
    method, last = recipe.method, RUNNING_ORDER[0]
    for text in recipe.steps:
        step = registry.load("algorithms", text, code=True)
        kind = next((k for k in RUNNING_ORDER if isinstance(step, k)), None)
        if kind is None:
            bases = ", ".join(k.__name__ for k in RUNNING_ORDER)
            raise LlmqError(f"method {method!r}: {text} is no step; the class of a step derives from one of {bases}")
        if RUNNING_ORDER.index(kind) < RUNNING_ORDER.index(last) or (kind.alone and steps[kind]):
            raise LlmqError(
                f"method {method!r}: {registry.dump(step)} is a {kind.kind} and cannot follow a {last.kind}; the order "
                "is one rotation, one weighting, transforms, corrections, one solver, refiners, tuners, finishers"
            )
        steps[kind].append(step)
        last = kind
    if not steps[Solver]:
        raise LlmqError(f"method {method!r} has no solver; add one, e.g. {method},gptq (`llmq list` shows all steps)")
    return steps


def _format(recipe: Recipe, solver: Solver) -> Format:
    """Return the format with what the recipe asks of it: its options, declared as fields."""
    fmt: Any = registry.load("formats", recipe.format, code=True)
    asked: dict[str, Any] = {"desc_act": solver.desc_act, "kv": STRATEGIES[recipe.kv] if recipe.kv_bits else None}
    asked |= {"kv_dtype": recipe.kv_dtype if recipe.kv_bits else None}
    asked |= {"mix": recipe.type, "imatrix": recipe.imatrix, "split_max_size": recipe.split_max_size}
    asked |= {"choices": recipe.candidates() if recipe.gguf and recipe.target_bpw else None}
    asked |= {"embeddings": str(recipe.embeddings) if recipe.gguf and recipe.embeddings is not None else None}
    for name in [n for n, value in asked.items() if value]:
        if name not in {f.name for f in dataclasses.fields(fmt)}:
            raise LlmqError(f"format {recipe.format} holds no {_HELD[name]}")
        setattr(fmt, name, asked[name])
    return cast(Format, fmt)


def _override(text: str, base: Scheme, scale_dtype: torch.dtype) -> Differing:
    """Return an override, by whole grids or by a grid's own keys.

    Raises LlmqError for what does not read, or does not change the rest's scheme.
    """
    said = parse(text)
    if said is None:
        raise LlmqError(
            f"--override {text!r} does not read; write REGEX:bits=8,group_size=32 (also sym=, range=) or "
            "REGEX:weights=fp8,inputs=fp8"
        )
    options = {"group" if key == "group_size" else key: value for key, value in said.changes.items()}
    weights, inputs = options.pop("weights", None), options.pop("inputs", None)
    if weights and options:
        raise LlmqError(f"--override {text!r}: weights= says all of the grid; say {', '.join(options)} there")
    weight = _grid(weights, scale_dtype) if weights else None
    if weight is not None and registry.lacks("grids", weights or "", "range"):
        weight = _ranged(weight, getattr(base.weight, "range", None), f"--override {text!r}")
    floats = inputs == "none"
    grid = None
    if inputs and not floats:
        grid = input_grid(_grid(inputs, scale_dtype), f"--override {text!r}")
    differing = Differing(said, weight, grid, floats, options)
    differing.of(base)
    return differing


def _candidate(changes: str, base: Scheme, scale_dtype: torch.dtype) -> Differing:
    """Return one of what a budget of bits chooses from. Raises LlmqError for a pair that no runtime multiplies."""
    key, _, value = changes.partition("=")
    if key == "bits":
        base.weight.with_bits(int(value))  # which says what it is that has no others
    made = _override(f".:{changes}", base, scale_dtype)
    if why := unpaired(made.of(base)):
        raise LlmqError(f"{changes}: {why}")
    return made


def _ranged(grid: Any, range_: Range | None, said: str) -> Grid:
    """Return a grid whose class takes a range with the one that the rest has."""
    try:
        return cast(Grid, dataclasses.replace(grid, range=range_))
    except ValueError as e:
        raise LlmqError(f"{said}: {e}; say range= there") from e
