"""Bits where they matter: measure what each site costs at each number of bits, then spend a budget where it helps most.

What rounding a linear W to Q costs is estimated, on the first batch of the calibration, as

    KL(float model, quantized model) per token  ~  1/(2T) sum_t s_t |(W - Q) x_t|^2

with s_t the squared gradient of the float model's loss at token t of the linear's output (token_gradients.py): the
second order of the divergence, its Fisher matrix cut down to one number for each token. Q is W rounded to nearest.
Small costs add up; the least sum within the budget is approached by upgrading, time and again, the site whose cost
falls most per byte. The linears of a site share their bits, as runtimes that fuse q, k, v and gate, up need.
Not here: the quantization itself, which sees only the schemes of the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration
from llmq.calibration.token_gradients import seed_of, squared_gradients
from llmq.checkpoint import Journal
from llmq.format import packed_bytes
from llmq.model.lanes import Lanes
from llmq.pipeline.experts import together
from llmq.pipeline.loaded import block_sites
from llmq.pipeline.plan import Plan
from llmq.progress import Progress
from llmq.stats import Hessian
from llmq.types import Grid, LinearSpec, QTensor


@dataclass(frozen=True)
class Choice:
    """What one site costs at one number of bits: bytes on disk, and the divergence it adds, in nats per token."""

    bits: int
    size: int
    error: float

    def __add__(self, other: Choice) -> Choice:
        """Return what two linears cost together at the same number of bits."""
        return Choice(self.bits, self.size + other.size, self.error + other.error)


def allocate(plan: Plan, state: Calibration, journal: Journal, report: Progress) -> Plan:
    """Return the plan with schemes that spend its recipe's `target_bpw`; the state stays as it is.

    Its recipe then says as overrides what was chosen, so that what is recorded repeats the run. A head that is solved
    too counts, at the bits that it has. What was chosen is kept: a run that goes on keeps to it.
    """
    recipe = plan.method.recipe
    if recipe.target_bpw is None:
        return plan
    chosen = plan.team.first(  # which has the first batch
        lambda: journal.once("bits", lambda: ({}, {"chosen": _chosen(plan, state, report)})).facts["chosen"]
    )
    overrides = tuple(f"^({'|'.join(re.escape(n) for n in names)})$:bits={bits}" for names, bits in chosen)
    settled = dataclasses.replace(recipe, override=(*recipe.override, *overrides), target_bpw=None, bit_choices=None)
    schemes = {n: plan.linears[n].at_bits(bits).scheme for names, bits in chosen for n in names}
    return plan.settled(schemes, settled)


def _chosen(plan: Plan, state: Calibration, report: Progress) -> list[tuple[tuple[str, ...], int]]:
    """Return the bits of each unit, by the full names of its linears."""
    units = costs(plan, state, report)
    known = {n for names in units for n in names}
    others = sum(packed_bytes(plan.method.format, s) for n, s in plan.linears.items() if n not in known)
    return [(names, choice.bits) for names, choice in spend(units, plan.budget() - others).items()]


def costs(plan: Plan, state: Calibration, report: Progress) -> dict[tuple[str, ...], list[Choice]]:
    """Return what the sites cost at each of the recipe's choices of bits, by the full names of their linears."""
    hidden, calls, squares = state.hidden[0], state.calls[:1], state.squares
    if not squares:
        squares = squared_gradients(
            plan.skeleton, [hidden], calls, plan.device, [seed_of(plan.method.recipe.seed, 0)], report
        )
    ids = state.ids[: len(hidden)]
    state = Calibration(calls=calls, squares=squares, ids=ids, probe=state.probe, dealt=Dealt.of([ids.numel()]))
    found: dict[tuple[str, ...], list[Choice]] = {}
    for i in range(len(plan.skeleton)):
        report(i, len(plan.skeleton), f"sensitivity of block {i}")
        of_block, hidden = _measure(plan, i, state, hidden)
        found |= of_block
    return _joined(found, plan)


def _joined(found: dict[tuple[str, ...], list[Choice]], plan: Plan) -> dict[tuple[str, ...], list[Choice]]:
    """Return the units with the sites of one layer's experts as one: runtimes run them as one."""
    layer = {n: holder for holder, names in together(plan.linears, plan.skeleton.model).items() for n in names}
    units: dict[str, tuple[tuple[str, ...], list[Choice]]] = {}
    for names, choices in found.items():
        key = layer.get(names[0], names[0])
        before, costs_so_far = units.get(key, ((), [Choice(c.bits, 0, 0.0) for c in choices]))
        units[key] = (*before, *names), [a + b for a, b in zip(costs_so_far, choices, strict=True)]
    return dict(units.values())


def spend(units: dict[tuple[str, ...], list[Choice]], budget: float) -> dict[tuple[str, ...], Choice]:
    """Return a choice for each unit, its sizes within `budget` bytes, its errors' sum as low as upgrades make it.

    A unit's choices are taken along the lower convex hull of (size, error), the steepest step of all units first. The
    smallest choices fit in: the plan has seen to that.
    """
    hulls = {name: _hull(choices) for name, choices in units.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(c.size for c in chosen.values())
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
    plan: Plan, i: int, state: Calibration, hidden: Tensor
) -> tuple[dict[tuple[str, ...], list[Choice]], Tensor]:
    """Return what the sites of float block `i` cost, by their linears' names, and the hidden states behind it.

    hidden: of the first batch, which the state is of.
    """
    found: dict[tuple[str, ...], list[Choice]] = {}
    with plan.skeleton.loaded(i, plan.device) as block:
        sites = block_sites(plan, i, block, state)
        with Lanes(block, sites, [hidden], [state.calls[0][i]]) as lanes:
            for site in sites:
                (X_TK,) = lanes.advance()
                names = {full: n for n in site.linears if (full := plan.skeleton.full_name(i, n)) in plan.linears}
                if not names:
                    continue
                H_KK = collect((Hessian,), [X_TK], state.dealt)[Hessian].mean() if len(X_TK) else None
                each = [
                    _choices(plan, plan.linears[full], block.get_submodule(n), (X_TK, H_KK, state.squares[full][0]))
                    for full, n in names.items()
                ]
                found[tuple(names)] = [sum(alike[1:], alike[0]) for alike in zip(*each, strict=True)]
            (out,) = lanes.finish()
            return found, out


def _choices(
    plan: Plan, spec: LinearSpec, linear: nn.Module, sample: tuple[Tensor, Tensor | None, Tensor]
) -> list[Choice]:
    """Return what one linear costs at each number of bits; sample: its input `[T, K]`, `X^T X / T`, and `s_T`.

    An expert that no token reaches costs nothing.
    """
    W_NK = linear.get_parameter("weight").float()
    each = [(bits, spec.at_bits(bits)) for bits in plan.method.recipe.choices()]
    form = plan.method.format
    return [Choice(bits, packed_bytes(form, s), _divergence(W_NK, s.scheme.weight, *sample)) for bits, s in each]


def _divergence(W_NK: Tensor, grid: Grid, X_TK: Tensor, H_KK: Tensor | None, s_T: Tensor) -> float:
    """Return what rounding a weight adds to the divergence, in nats per token."""
    if H_KK is None:
        return 0.0
    E_NK = QTensor.rounded(W_NK, grid, H_KK).dequantize() - W_NK
    return (s_T @ (X_TK.float() @ E_NK.T).square().sum(-1) / (2 * len(s_T))).item()
