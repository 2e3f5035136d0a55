"""What only the weights can say before a run: are they sound, does the format hold them, what do transforms find.

    plan = read(outline(src, recipe))

Every weight is read once: NaN is refused, what no scale can hold is said. Then a block of each kind runs a few tokens.
Not here: what the headers can say (plan.py, refusals.py).
"""

from __future__ import annotations

import dataclasses
from itertools import count
from typing import TYPE_CHECKING

from torch import Tensor

from llmq import registry
from llmq.errors import LlmqError
from llmq.model.producers import of_blocks
from llmq.model.rotated import Rotated, prove
from llmq.pipeline.experts import any_expert
from llmq.progress import Progress, Work

if TYPE_CHECKING:
    from llmq.pipeline.plan import Plan

_TOLD = 100  # times that is said how many are read


def read(plan: Plan, progress: Progress | None = None) -> Plan:
    """Return an outlined plan with what its weights say. Raises LlmqError for what is wrong with them.

    progress: called with weights read.
    """
    return tried(checked(plan, progress))


def checked(plan: Plan, progress: Progress | None = None) -> Plan:
    """Read every weight once; warn of those that no scale of the format can hold. Raises LlmqError for one of NaN."""
    beyond = plan.team.first(lambda: _beyond(plan, progress))
    if not beyond:
        return plan
    first, *more = beyond
    others = f" (and {len(more)} more)" if more else ""
    warning = (
        f"{first}{others}: the weights of {sum(beyond.values()):,} groups are too small or too large for the scales "
        "that the format stores and are lost or clipped; --skip what matters, or use --format compressed-tensors from "
        "a bfloat16 or float32 checkpoint, whose scales hold them"
    )
    return dataclasses.replace(plan, warnings=[*plan.warnings, warning])


def _beyond(plan: Plan, progress: Progress | None) -> dict[str, int]:
    """Return how many groups of each matrix have a scale that the format does not hold."""
    specs = {plan.weight_of(n): s for n, s in plan.matrices.items()}
    work, total, number = Work.of(progress), len(plan.float_source.names()), count()
    beyond: dict[str, int] = {}

    def see(name: str, W_NK: Tensor) -> None:
        if (done := next(number)) % max(1, total // _TOLD) == 0:
            work(done, total, "reading the weights")
        if name in specs:
            grid = specs[name].scheme.weight
            if groups := int(grid.held.beyond(grid.covering(W_NK)).sum()):
                beyond[specs[name].name] = groups

    plan.float_source.check(see)
    return beyond


def tried(plan: Plan) -> Plan:
    """Run blocks on a few tokens: prove what is rotated, find what transforms can fold into, warn of what they cannot.

    Raises LlmqError for a rotation that changes the function, and for a transform that finds nothing.
    """
    if isinstance(plan.source, Rotated):
        prove(plan.skeleton, plan.source, plan.device)
    steps = plan.method.transforms
    if not steps:
        return plan
    found = of_blocks(plan.skeleton, plan.device)
    left: dict[str, set[int]] = {}
    for i, f in enumerate(found):
        for s in (s for s in f.sites if s.producer is None):
            linears = any_expert(", ".join(s.linears))
            left.setdefault(f"{linears} ({f.reasons[s.linears[0]]})", set()).add(i)
    for step in steps:
        if not any(step.needs(site) for f in found for site in f.sites):
            tried = f", not into what comes before {'; '.join(left)}" if left else ""
            raise LlmqError(f"{registry.dump(step)} finds nothing to fold scales into{tried}; leave it out")
    names = ", ".join(registry.dump(step) for step in steps)
    warnings = [f"{names}: left alone in {len(n)} of {len(found)} blocks: {what}" for what, n in left.items()]
    return dataclasses.replace(plan, sites=[f.sites for f in found], warnings=[*plan.warnings, *warnings])
