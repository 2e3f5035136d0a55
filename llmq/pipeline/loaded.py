"""A decoder block in memory, and what belongs to it while it is quantized.

Not here: what is done with it (block.py, transforming.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.calibration.state import Calibration
from llmq.model.experts import Passing, linears_of
from llmq.model.lanes import Call
from llmq.model.sites import discover, overridden
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Record
from llmq.progress import Work
from llmq.stats import MeanSquare
from llmq.steps import Tuner
from llmq.types import LinearSpec, Site


@dataclass
class Report:
    """What is known of a block when it is done.

    record: what `quantization.json` says of it. importance: of every linear's input, where an importance matrix is
    wanted. hessians: H of each site by its linears, where their errors are measured again after the last block.
    """

    record: Record = field(default_factory=Record)
    importance: dict[str, MeanSquare] = field(default_factory=dict)
    hessians: dict[tuple[str, ...], Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A decoder block in memory, and what belongs to it.

    number: from 0; that of the head is the number of blocks. state: what enters it. passing: the experts whose weights
    are not in memory. report: grows with the work. work: is told what is done.
    """

    plan: Plan
    number: int
    module: nn.Module
    sites: Sequence[Site]
    state: Calibration
    passing: Passing
    work: Work
    report: Report = field(default_factory=Report)

    @property
    def calls(self) -> Sequence[Call]:
        """The other arguments of its call, batch by batch, of this process' own."""
        return self.calls_of(self.state.calls, self.state.hidden.numbers)

    def calls_of(self, calls: Sequence[Sequence[Call]], numbers: Iterable[int]) -> Sequence[Call]:
        """Return the block's of the calls of all blocks, for the batches of these numbers; the head takes none."""
        return [calls[n][self.number] if self.number < len(calls[n]) else ((), {}) for n in numbers]

    def full(self, name: str) -> str:
        """Return the full name of what the block calls so."""
        return self.plan.skeleton.full_name(self.number, name)

    def specs(self, site: Site) -> dict[str, LinearSpec]:
        """Return the linears of a site that are quantized, by their names in the block."""
        return {n: s for n in site.linears if (s := self.plan.linears.get(self.full(n)))}

    @property
    def tuners(self) -> Sequence[Tuner]:
        """The steps that tune the block; the head is no block of theirs."""
        return () if self.number == len(self.plan.skeleton) else self.plan.method.tuners

    @property
    def moves_on(self) -> bool:
        """Whether anything behind the block wants its output."""
        behind = len(self.plan.skeleton) - self.number - (self.plan.head is None)
        return self.state.tokens > 0 and behind > 0

    def exact(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the block as the checkpoint has it: what is computed with may hold less, or nothing."""
        source, full = self.plan.source, self.full(name)
        if tensor.is_meta:
            there = full if full in source else self.plan.weight_of(full.removesuffix(".weight"))
            return source.get(there).to(self.plan.device)
        whole = tensor.dtype in (torch.float32, source.dtype_of(full))
        return tensor.detach() if whole else source.get(full).to(tensor.device)


def block_sites(plan: Plan, i: int, block: nn.Module, state: Calibration) -> tuple[Site, ...]:
    """Return the sites of block `i`: as planned, or what one forward discovers; the head is a site itself."""
    if i == len(plan.skeleton):
        return (Site(("head",)),)
    if plan.sites:
        return plan.sites[i]
    if state.probe:
        found = discover(block, state.probe.hidden, state.probe.calls[i])
        return overridden(plan.skeleton.config.model_type, found)
    return tuple(Site((n,)) for n in linears_of(block))
