"""Bits where they matter: measure what each linear costs as each candidate, then spend a budget where it helps most.

A candidate is a number of bits of integers, a grid, a scheme with its inputs, a type of ggml, or float.

What rounding a linear W to Q costs is estimated, on the first batch of the calibration, as

    KL(float model, quantized model) per token  ~  1/(2T) sum_t s_t |(W - Q) x_t|^2

with s_t the squared gradient of the float model's loss at token t of the linear's output (token_gradients.py): the
second order of the divergence, its Fisher matrix cut down to one number for each token. Q is W rounded to nearest;
where inputs are rounded too, W x_t - Q q(x_t) takes the place of (W - Q) x_t.
Small costs add up; the least sum within the budget is approached by upgrading, time and again, the unit whose cost
falls most per byte. A unit is a site, whose linears share their bits as runtimes that fuse q, k, v and gate, up need,
or the experts of a layer; in GGUF it is a tensor, which llama.cpp reads apart from all others.
Not here: the quantization itself, which sees only the schemes of the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration
from llmq.calibration.token_gradients import seed_of, squared_gradients
from llmq.checkpoint import Journal
from llmq.format import packed_bytes
from llmq.histogram import Histogram
from llmq.model.lanes import Lanes
from llmq.pipeline.activations import static_input
from llmq.pipeline.experts import together
from llmq.pipeline.loaded import block_sites
from llmq.pipeline.plan import Plan
from llmq.progress import Progress
from llmq.schemes import FLOAT
from llmq.stats import Hessian, Stats
from llmq.types import LinearSpec, QTensor, Scheme


@dataclass(frozen=True)
class Choice:
    """What one linear or unit costs as one candidate: bytes on disk, and the divergence it adds, in nats per token.

    changes: what an override says to make it that, FLOAT where it stays float.
    """

    changes: str
    size: int
    error: float

    def __add__(self, other: Choice) -> Choice:
        """Return what two linears cost together as the same candidate."""
        return Choice(self.changes, self.size + other.size, self.error + other.error)


Cost = tuple[str, list[Choice]]
"""The first linear of the site that a linear is of, and what the linear costs as each candidate."""


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
    said = [(f"^({'|'.join(map(re.escape, names))})$", changes) for names, changes in _named(plan, chosen)]
    overrides = [f"{pattern}:{changes}" for pattern, changes in said if changes != FLOAT]
    skip = [pattern for pattern, changes in said if changes == FLOAT]
    settled = dataclasses.replace(
        recipe, override=(*recipe.override, *overrides), skip=(*recipe.skip, *skip), target_bpw=None, bit_choices=None,
        choices=None,
    )  # fmt: skip
    specs = {n: plan.candidates(plan.linears[n])[changes] for names, changes in chosen for n in names}
    schemes = {n: None if spec is None else spec.scheme for n, spec in specs.items()}
    return plan.settled(schemes, settled)


def _named(plan: Plan, chosen: list[tuple[tuple[str, ...], str]]) -> list[tuple[Iterable[str], str]]:
    """Return what was chosen by the names that overrides have; of tensors of OUT all that became one type together."""
    by_type: dict[str, dict[str, None]] = {}
    for names, changes in chosen:
        for tensor in filter(None, map(plan.assigned.tensor, names)):
            by_type.setdefault(changes, {})[tensor] = None
    return [(of, changes) for changes, of in by_type.items()] or list(chosen)


def _chosen(plan: Plan, state: Calibration, report: Progress) -> list[tuple[tuple[str, ...], str]]:
    """Return what each unit becomes, by the full names of its linears."""
    units = costs(plan, state, report)
    known = {n for names in units for n in names}
    others = sum(packed_bytes(plan.method.format, s) for n, s in plan.linears.items() if n not in known)
    return [(names, choice.changes) for names, choice in spend(units, plan.budget() - others).items()]


def costs(plan: Plan, state: Calibration, report: Progress) -> dict[tuple[str, ...], list[Choice]]:
    """Return what the units cost as each of the recipe's candidates, by the full names of their linears."""
    hidden, calls, squares = state.hidden[0], state.calls[:1], state.squares
    if not squares:
        squares = squared_gradients(
            plan.skeleton, [hidden], calls, plan.device, [seed_of(plan.method.recipe.seed, 0)], report
        )
    ids = state.ids[: len(hidden)]
    state = Calibration(calls=calls, squares=squares, ids=ids, probe=state.probe, dealt=Dealt.of([ids.numel()]))
    found: dict[str, Cost] = {}
    for i in range(len(plan.skeleton)):
        report(i, len(plan.skeleton), f"sensitivity of block {i}")
        of_block, hidden = _measure(plan, i, state, hidden)
        found |= of_block
    return _joined(found, plan)


def _joined(found: Mapping[str, Cost], plan: Plan) -> dict[tuple[str, ...], list[Choice]]:
    """Return the units: the linears of a site, those of one layer's experts, or those of one tensor of OUT."""
    layer = {n: holder for holder, names in together(plan.linears, plan.skeleton.model).items() for n in names}
    units: dict[str, tuple[tuple[str, ...], list[Choice]]] = {}
    for name, (site, choices) in found.items():
        key = plan.assigned.tensor(name) or layer.get(site, site)
        before, costs_so_far = units.get(key, ((), [Choice(c.changes, 0, 0.0) for c in choices]))
        units[key] = (*before, name), [a + b for a, b in zip(costs_so_far, choices, strict=True)]
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


def _measure(plan: Plan, i: int, state: Calibration, hidden: Tensor) -> tuple[dict[str, Cost], Tensor]:
    """Return what the linears of float block `i` cost, by name, and the hidden states behind it.

    hidden: of the first batch, which the state is of.
    """
    found: dict[str, Cost] = {}
    with plan.skeleton.loaded(i, plan.device) as block:
        sites = block_sites(plan, i, block, state)
        with Lanes(block, sites, [hidden], [state.calls[0][i]]) as lanes:
            for site in sites:
                (X_TK,) = lanes.advance()
                names = {full: n for n in site.linears if (full := plan.skeleton.full_name(i, n)) in plan.linears}
                if not names:
                    continue
                stats = collect((Hessian, Histogram), [X_TK], state.dealt) if len(X_TK) else None
                first = next(iter(names))
                for full, n in names.items():
                    sample = (X_TK, stats, state.squares[full][0])
                    found[full] = first, _choices(plan, plan.linears[full], block.get_submodule(n), sample)
            (out,) = lanes.finish()
            return found, out


def _choices(
    plan: Plan, spec: LinearSpec, linear: nn.Module, sample: tuple[Tensor, Stats | None, Tensor]
) -> list[Choice]:
    """Return what one linear costs as each candidate; sample: its input `[T, K]`, what was collected of it, and `s_T`.

    An expert that no token reaches costs nothing.
    """
    W_NK = linear.get_parameter("weight").float()
    sizes = plan.sizes(spec)
    schemes = {name: None if one is None else one.scheme for name, one in plan.candidates(spec).items()}
    return [Choice(name, sizes[name], _divergence(W_NK, scheme, *sample)) for name, scheme in schemes.items()]


def _divergence(W_NK: Tensor, scheme: Scheme | None, X_TK: Tensor, stats: Stats | None, s_T: Tensor) -> float:
    """Return what rounding a weight, and its input, adds to the divergence, in nats per token."""
    if stats is None or scheme is None:
        return 0.0
    Q_NK = QTensor.rounded(W_NK, scheme.weight, stats[Hessian].mean()).dequantize()
    error_TN = X_TK.float() @ (Q_NK - W_NK).T
    if scheme.activation is not None:
        fixed = static_input(scheme.activation, stats[Histogram])[0] if scheme.static else None
        error_TN += (scheme.activation.fake_quantize(X_TK, fixed) - X_TK).float() @ Q_NK.T
    return (s_T @ error_TN.square().sum(-1) / (2 * len(s_T))).item()
