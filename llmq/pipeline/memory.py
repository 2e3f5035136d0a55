"""The most memory that a run holds, told before it starts, and how many batches may stay suspended under a cap.

    peak = terms(plan)
    peak.host.total()                         bytes of the run as it comes, all batches suspended at once
    peak.host.at, peak.host.host              "block 0, mlp.down_proj", {"suspended": ..., "sums": ..., ...}
    alive = alive_under(plan, host=6 * 2**30) LlmqError where the run does not fit even with none suspended

Not here: what each phase holds, term by term (holdings.py), how a cap is kept (block.py, model/lanes.py).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from llmq import heap, launched, registry
from llmq.calibration import free_memory
from llmq.errors import LlmqError
from llmq.options import memory_size
from llmq.pipeline.holdings import Holdings, Phase
from llmq.pipeline.plan import Plan


class Peak(NamedTuple):
    """The largest point of every phase of a run: loading, gradients, blocks, finishing, verifying.

    alive: batches that stay suspended. batches: of the whole calibration.
    """

    phases: tuple[Phase, ...]
    alive: int
    batches: int

    @property
    def host(self) -> Phase:
        """The point at which the host's memory is fullest."""
        return max(self.phases, key=lambda p: p.total())

    @property
    def device(self) -> Phase:
        """The point at which the device's memory is fullest; it is empty where the run computes on the CPU."""
        return max(self.phases, key=lambda p: p.total(device=True))


def terms(plan: Plan, alive: int | None = None, holdings: Holdings | None = None) -> Peak:
    """Return what a run holds at most in each phase; alive: how many batches stay suspended, None for all.

    holdings: of the plan, where they are known.
    """
    return _peak(holdings or Holdings(plan), alive)


def alive_under(
    plan: Plan, host: int | None = None, device: int | None = None, holdings: Holdings | None = None
) -> int:
    """Return how many batches may stay suspended so that a run fits into these bytes of memory; None is no cap.

    Raises LlmqError where it does not fit with none, with the least that would do and what takes most of it.
    """
    holdings = holdings or Holdings(plan)
    least = _peak(holdings, 0)
    if host is not None and least.host.total() > host:
        raise LlmqError(_refusal(plan, host, least.host, device=False))
    if device is not None and least.device.total(device=True) > device:
        raise LlmqError(_refusal(plan, device, least.device, device=True))
    low, high = 0, holdings.batches + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(_peak(holdings, middle), host, device) else (low, middle)
    return low


def capped(plan: Plan, host: str | None = None, device: str | None = None) -> Plan:
    """Return the plan with as many batches suspended as fit; host, device: sizes such as `6GiB`.

    Without either, into what is free now; a run that may not fit even so is not refused, but told of.
    Raises LlmqError where the run does not fit under a cap, and for a cap on a device that the run does not use.
    """
    if host is None and device is None:
        return _fitting(plan)
    if device is not None and plan.device.type == "cpu":
        raise LlmqError("--device-memory means nothing here: the run computes on the CPU; say --max-memory")
    most = None if host is None else memory_size("--max-memory", host)
    alive = alive_under(plan, most, None if device is None else memory_size("--device-memory", device))
    heap.map_tensors()
    return dataclasses.replace(plan, alive=alive)


def _fitting(plan: Plan) -> Plan:
    """Return the plan with as many batches suspended as fit into what is free; processes of a machine share that.

    A plan on paper, for a GPU that is not here, stays as it is.
    """
    cuda = plan.device.type == "cuda"
    if cuda and not torch.cuda.is_available():
        return plan
    holdings = Holdings(plan)
    host = free_memory(torch.device("cpu")) // launched.beside()
    device = free_memory(plan.device) if cuda else None
    if _fits(_peak(holdings, None), host, device):
        return plan
    heap.map_tensors()
    least = _peak(holdings, 0)
    if _fits(least, host, device):
        return dataclasses.replace(plan, alive=alive_under(plan, host, device, holdings))
    takes = f"{least.host.total() / 1e9:.2f} GB of memory, of which {host / 1e9:.2f} GB are free"
    if device is not None:
        gpu = f"{least.device.total(device=True) / 1e9:.2f} GB of the GPU's, of which {device / 1e9:.2f} GB are free"
        takes = f"{takes}, and {gpu}"
    return dataclasses.replace(plan, alive=0, warnings=[*plan.warnings, f"this run takes {takes}; it may be killed"])


def _fits(peak: Peak, host: int | None, device: int | None) -> bool:
    within = host is None or peak.host.total() <= host
    return within and (device is None or peak.device.total(device=True) <= device)


def _peak(holdings: Holdings, alive: int | None) -> Peak:
    """Return the largest point of each phase, by the host's memory and by the device's."""
    number = holdings.batches if alive is None else min(alive, holdings.batches)
    found: dict[tuple[str, bool], Phase] = {}
    for phase in holdings.phases(number):
        for device in (False, True) if phase.device else (False,):
            known = found.get((phase.name, device))
            if known is None or phase.total(device=device) > known.total(device=device):
                found[phase.name, device] = phase
    distinct = {id(p): p for p in found.values()}
    return Peak(tuple(distinct.values()), number, holdings.batches)


def _refusal(plan: Plan, cap: int, worst: Phase, *, device: bool) -> str:
    """Return what to say of a cap that a run does not fit into."""
    name, terms = worst.largest(device=device), worst.device if device else worst.host
    where = f"{worst.name}, {worst.at}" if worst.at else worst.name
    if (base := terms.get("libraries", 0)) > cap:
        alone = f"Python and its libraries alone take {base / 1e9:.2f} GB"
        return f"--max-memory {cap / 1e9:.3f} GB is too little: {alone}; give more"
    return (
        f"{'--device-memory' if device else '--max-memory'} {cap / 1e9:.2f} GB is too little: the run takes "
        f"{sum(terms.values()) / 1e9:.2f} GB at least ({where}: {name} {terms[name] / 1e9:.2f} GB); "
        f"{_remedy(plan, name, worst, device=device)}"
    )


def _remedy(plan: Plan, name: str, worst: Phase, *, device: bool) -> str:
    """Return what would make the largest term smaller."""
    method = plan.method
    if worst.name == "gradients":
        return "leave out what weighs tokens (fisher) or bits (--target-bpw)"
    if worst.name == "finishing":
        return "leave the last step, which tunes the whole model, out"
    if name == "suspended":
        return "blocks of experts keep all batches; give fewer --samples or a shorter --seq-len"
    if worst.name == "blocks" and (method.corrections or method.refiners):
        alone = dataclasses.replace(plan, method=dataclasses.replace(method, corrections=(), refiners=()))
        peak = _peak(Holdings(alone), 0)
        least = (peak.device if device else peak.host).total(device=device)
        return f"without corrections and refiners ({registry.dump(method.solver)} alone) it takes {least / 1e9:.2f} GB"
    if name in ("block", "float block") and plan.skeleton.dtype.itemsize > 2:
        return "--dtype bfloat16 halves it, where the method allows that"
    return "give more"
