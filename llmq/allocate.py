"""Bits where they matter: measure what each site costs at each number of bits, then spend a budget where it helps most.

For every block, on the first batch of the calibration and with all else float, each site is rounded to nearest at each
number of bits; its sensitivity is the squared error of the block's output relative to the output's energy, averaged
over the tokens. Errors relative to the residual stream compare across blocks, and small ones add up. The least sum
within the budget is approached by upgrading, time and again, the site whose error falls most per byte.
The linears of a site share their bits, as runtimes that fuse q, k, v and gate, up need.
Not here: the quantization itself, which sees only `--override REGEX:bits=...` lines.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.block import Streams, block_sites
from llmq.card import packed_bytes
from llmq.job import Job, prepare
from llmq.stats import Hessian
from llmq.stream import Call, Lanes, run
from llmq.types import LinearSpec, LlmqError


@dataclass(frozen=True)
class Choice:
    """What one site costs at one number of bits: bytes on disk, and the relative error of its block's output."""

    bits: int
    size: int
    error: float


def allocate(job: Job, streams: Streams, report: Callable[[int, int, str], None]) -> Job:
    """Return the job with overrides that spend its recipe's `target_bpw`; the streams stay where they are.

    Raises LlmqError where the budget does not even hold the fewest bits.
    """
    recipe = job.plan.recipe
    if recipe.target_bpw is None:
        return job
    units: dict[tuple[str, ...], list[Choice]] = {}
    hidden = streams.hidden[:1]
    for i in range(len(job.skeleton)):
        report(i, len(job.skeleton), f"sensitivity of block {i}")
        hidden, found = _measure(job, i, hidden, [c[i] for c in streams.calls])
        units |= found
    budget = recipe.target_bpw * sum(job.linears[n].N * job.linears[n].K for names in units for n in names) / 8
    chosen = spend(units, budget)
    overrides = tuple(
        f"^({'|'.join(re.escape(n) for n in names)})$:bits={choice.bits}" for names, choice in chosen.items()
    )
    settled = dataclasses.replace(recipe, override=(*recipe.override, *overrides), target_bpw=None)
    return prepare(str(job.source.path), settled, str(job.device))


def spend(units: dict[tuple[str, ...], list[Choice]], budget: float) -> dict[tuple[str, ...], Choice]:
    """Return a choice for each unit, its sizes within `budget` bytes, its errors' sum as low as upgrades make it.

    A unit's choices are taken along the lower convex hull of (size, error), the steepest step of all units first.
    Raises LlmqError where the smallest choices are too large.
    """
    hulls = {name: _hull(choices) for name, choices in units.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(c.size for c in chosen.values())
    if left < 0:
        raise LlmqError(
            f"--target-bpw is too low: the fewest of --bit-choices need {1 - left / budget:.3f} times as much"
        )
    steps = [
        ((a.error - b.error) / (b.size - a.size), order, name, b)
        for order, (name, hull) in enumerate(hulls.items())
        for a, b in itertools.pairwise(hull)
    ]
    for _, _, name, better in sorted(steps, key=lambda s: (-s[0], s[1])):
        cost = better.size - chosen[name].size
        if cost <= left:
            chosen[name] = better
            left -= cost
    return chosen


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of (size, error), smallest first."""
    hull: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.size, c.error)):
        if hull and c.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-1], c) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(c)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (a.error - b.error) / (b.size - a.size)


def _measure(
    job: Job, i: int, hidden: list[Tensor], at: list[Call]
) -> tuple[list[Tensor], dict[tuple[str, ...], list[Choice]]]:
    """Return what float block `i` makes of `hidden`, and the choices of each of its sites, by their linears' names."""
    prefix = f"{job.skeleton.prefix}.{i}."
    found: dict[tuple[str, ...], list[Choice]] = {}
    with job.skeleton.loaded(i, job.device) as block:
        sites = block_sites(job, block, hidden, at)
        hessians = [Hessian() for _ in sites]
        with Lanes(block, sites, hidden, at) as lanes:
            for hessian in hessians:
                for X_TK in lanes.advance():
                    hessian.update(X_TK)
            outputs = list(lanes.finish())
        for site, hessian in zip(sites, hessians, strict=True):
            linears = [job.linears[prefix + n] for n in site.linears if prefix + n in job.linears]
            if linears:
                choices = [
                    _try(job, block, prefix, linears, bits, hessian.mean(), (hidden, at, outputs))
                    for bits in job.plan.recipe.choices()
                ]
                found[tuple(s.name for s in linears)] = choices
    return outputs, found


def _try(
    job: Job,
    block: nn.Module,
    prefix: str,
    linears: Sequence[LinearSpec],
    bits: int,
    H_KK: Tensor,
    sample: tuple[list[Tensor], list[Call], list[Tensor]],
) -> Choice:
    """Return what these linears cost at so many bits; the block is left as it was."""
    size, kept = 0, []
    for s in linears:
        grid = dataclasses.replace(s.scheme.weight, bits=bits)
        size += packed_bytes(job.plan.format, dataclasses.replace(s, scheme=dataclasses.replace(s.scheme, weight=grid)))
        module: Any = block.get_submodule(s.name.removeprefix(prefix))
        kept.append((module, module.weight.data))
        W_NK = module.weight.data.float()
        params = grid.fit(W_NK, H_KK)
        columns = params.columns(W_NK.shape[1])
        module.weight.data = grid.decode(grid.nearest(W_NK, columns), columns).to(job.skeleton.dtype)
    errors = []
    for x, call, y in zip(*sample, strict=False):
        miss = (run(block, x, call) - y).float().square().sum(-1)
        errors.append((miss / y.float().square().sum(-1).clamp(min=1e-12)).mean())
    for module, weight in kept:
        module.weight.data = weight
    return Choice(bits, size, float(torch.stack(errors).mean()))
