"""What a run will write, hold, take and be read by, as one value: what `llmq plan` prints, and `quantize` a line of.

    found = estimate(plan, probe(plan, Path(".")))
    found.bytes, found.bits_per_weight, found.memory["host"]["bytes"], found.total
    found.to_json()

Several processes share the batches of the calibration, in eight parts at most, and the rows of a site, in its pieces,
or the experts of a round. What each does alone, or the first for all, does not shrink.
Not here: what is counted (operations.py, memory.py), rates (rates.py, machines.py), who reads it (readers.py).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Self

from llmq import registry
from llmq.calibration.dealing import PARTS, most
from llmq.model.footprint import footprints
from llmq.pipeline.holdings import Holdings, Phase
from llmq.pipeline.machines import HOST, NETWORK, Machine
from llmq.pipeline.memory import alive_under, terms
from llmq.pipeline.operations import Amounts, operations, sites
from llmq.pipeline.plan import Plan
from llmq.pipeline.rates import Rates
from llmq.readers import Reader
from llmq.show import span
from llmq.types import LlmqError

_TOKENS = 8  # of a sequence that tells the sites of a model that is not calibrated


@dataclass(frozen=True)
class Row:
    """A linear: its full name, shape `[N, K]`, site (the first linear that reads its input), grid and bytes in OUT.

    Under a budget of bits the grid says what that chooses from, the bytes are the linear's share of it.
    """

    name: str
    shape: tuple[int, int]
    site: str
    grid: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What is known of a run before it starts.

    source, method, format: of the plan. linears: those that are quantized. floats: how many tensors stay float, and
    their bytes. bytes, float_bytes: of all tensors, as written and as the source has them. bits_per_weight: of
    quantized weights, scales and zeros counted.
    memory: of "host" and "device", the bytes at the fullest point, where that is, and what they are; the device has
    none where the run computes on the CPU. alive: batches that stay suspended, of so many.
    disk: bytes on OUT's disk while the run lasts, by what they are.
    amounts, rates: how much of each kind of work the process does that does most, and how much in a second. how: where
    the rates come from, "probe" or "arithmetic: h100". devices: processes that share the work.
    readers: which runtimes take the result. warnings: what a user should know. goes_on: where an unfinished run of this
    very command is beside OUT, from where the next one goes on; all else is of a whole run.
    """

    source: str
    method: str
    format: str
    linears: list[Row]
    floats: dict[str, int]
    bytes: int
    float_bytes: int
    bits_per_weight: float | None
    memory: dict[str, dict[str, Any]]
    alive: int
    batches: int
    disk: dict[str, int]
    amounts: dict[str, float]
    rates: Rates
    how: str
    devices: int
    readers: list[Reader]
    warnings: list[str]
    goes_on: str | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """How long each kind of work takes."""
        return self.rates.seconds(self.amounts)

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    def at(self, rates: Rates) -> Self:
        """Return the same at other rates."""
        return replace(self, rates=rates)

    def line(self) -> str:
        """Return it in one line."""
        bits = "" if self.bits_per_weight is None else f", {self.bits_per_weight:.2f} bits a weight"
        device = self.memory["device"]["bytes"]
        beside = f" and {device / 1e9:.1f} GB of the device's" if device else ""
        memory = f"{self.memory['host']['bytes'] / 1e9:.1f} GB{beside}"
        disk = sum(self.disk.values()) / 1e9
        return (
            f"{self.float_bytes / 1e6:,.1f} MB become {self.bytes / 1e6:,.1f} MB{bits}; at most {memory} of memory, "
            f"{disk:.1f} GB of disk meanwhile; about {span(self.total)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all of it, with the seconds and their sum."""
        return asdict(self) | {"seconds": self.seconds, "total_seconds": round(self.total, 1)}


def estimate(plan: Plan, rates: Rates, *, like: tuple[str, Machine] | None = None, devices: int = 1) -> Estimate:
    """Return what a run will be. like: the machine that the rates are of, where it is not this one.

    Raises LlmqError where that machine's memory does not hold the run.
    """
    if devices < 1:
        raise LlmqError(f"--devices is at least 1, not {devices}")
    holdings = Holdings(plan, devices)
    peak = terms(plan, plan.alive, holdings)
    if like and peak.device.total(device=True) > like[1].memory * 1e9:
        peak = terms(plan, alive_under(plan, None, int(like[1].memory * 1e9), holdings), holdings)
    work = dealt(operations(plan, holdings, peak.alive), devices, holdings.every)
    link = like[1].link if like else 1.0  # GB/s; this machine's, with others like it: 10 Gb/s
    network = link if devices <= HOST else min(link, NETWORK)
    return Estimate(
        source=plan.source.origin.name,
        method=plan.method.recipe.method,
        format=registry.dump(plan.method.format),
        linears=_rows(plan, holdings),
        floats={"tensors": len(plan.float_bytes), "bytes": sum(plan.float_bytes.values())},
        bytes=plan.bytes(),
        float_bytes=plan.source.bytes(),
        bits_per_weight=_bits(plan),
        memory={"host": _point(peak.host), "device": _point(peak.device, device=True)},
        alive=peak.alive,
        batches=peak.batches,
        disk=plan.disk(),
        amounts=work,
        rates=Rates(rates | {"link": network * 1e9}),
        how=f"arithmetic: {like[0]}" if like else "probe",
        devices=devices,
        readers=plan.readers(),
        warnings=list(plan.warnings),
    )


def dealt(work: Amounts, devices: int, batches: int) -> dict[str, float]:
    """Return the amounts, by kind, of the process that does most, of so many that share the work."""
    others, rounds = (devices - 1) / devices, ceil(min(PARTS, batches) / devices)
    shares = {
        "batches": most(batches, devices) / max(1, batches),
        "each": 1.0,
        "first": 1.0,
        "sums": 2 * rounds * others,  # in each round a slice of all parts, then all slices
        "owner": rounds * others,  # in each round all parts of the experts that are its own
        "sent": others,
    }
    found: dict[str, float] = defaultdict(float)
    for (kind, how), amount in work.items():
        found[kind] += amount * (ceil(how / devices) / how if isinstance(how, int) else shares[how])
    return dict(found)


def _rows(plan: Plan, holdings: Holdings) -> list[Row]:
    found = holdings.traced[1] if holdings.sequences else footprints(plan.skeleton, _TOKENS)[1]
    known = sites(plan, [f.at for f in found])
    grids = {g: registry.dump(g) for g in {s.scheme.weight for s in plan.matrices.values()}}
    chosen, sizes = _chosen(plan), plan.packed_sizes
    return [
        Row(n, (s.N, s.K), known.get(n, n), chosen.get(n, grids[s.scheme.weight]), sizes[n])
        for n, s in plan.matrices.items()
    ]


def _chosen(plan: Plan) -> dict[str, str]:
    """Return what a budget of bits chooses from, in words, for each linear that it chooses for."""
    recipe = plan.method.recipe
    if recipe.target_bpw is None:
        return {}
    of = recipe.choices or f"{recipe.bit_choices} bits"
    return {n: f"within the budget, one of {of}" for n in plan.linears if n != plan.head}


def _bits(plan: Plan) -> float | None:
    weights = sum(s.N * s.K for s in plan.matrices.values())
    return 8 * sum(plan.packed_sizes.values()) / weights if weights else None


def _point(phase: Phase, *, device: bool = False) -> dict[str, Any]:
    held: Mapping[str, int] = phase.device if device else phase.host
    return {"bytes": sum(held.values()), "at": ", ".join(p for p in (phase.name, phase.at) if p), "terms": dict(held)}
