"""What a run holds in memory in each of its phases, in bytes by what they are, from headers and shapes alone.

    for phase in Holdings(plan).phases(alive=4): phase.at, phase.host     "block 0, mlp.down_proj", {"sums": ...}

The terms, D bytes of the compute dtype, P weights of a block:

    libraries            the interpreter, torch, transformers, compiled loops, their buffers
    block                P D; of experts only the linears of the eight that are at work, unless a step wants all
    float block          its copy, where a step compares with the float model
    codes                what is solved so far and waits for a tuner, or for the experts that are at work with it: a
                         byte a weight, and the scales
    packing              words of one linear on the way from codes
    packed               the packed words of the block so far
    suspended            what the batches that stay suspended hold at a site (model/footprint.py), in each stream
    running batch        the most that the one forward holds, and the activations that statistics are given
    sums                 K x K float32 statistics of a site, and the copies and factors of them that its steps make
    rows                 N x K float32 copies of a site's weights that its steps make
    for the tuner        float weights and Hessians of all sites, kept until the block is tuned
    squared gradients    of all tokens, 4 bytes a token and linear
    shared keys          keys and values that blocks hand on to later ones, of all batches
    arguments            masks and rotary tables of a batch
    between blocks       hidden states of a pass with gradients; those of the calibration lie on the disk
    both models          what the steps need that tune the whole model (whole_model.py)
    next block           where a GPU computes, on the host: what is read ahead (aside.py), in buffers used again
    next batch           likewise of hidden states, and those that are being written
    decoded block        a block as it is verified, float32
    heap                 what allocators take from the system besides, a share of the rest

Not here: the peak, the cap (memory.py), whose numbers of copies the steps and statistics say themselves (`held`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import ceil

from torch import nn

from llmq import aside
from llmq.calibration.dealing import most
from llmq.calibration.state import BATCH_TOKENS
from llmq.calibration.token_gradients import POSITIONS, held_at_once
from llmq.calibration.writing import writing_bytes
from llmq.model.experts import in_experts, linears_of
from llmq.model.footprint import Entered, Footprint, footprints
from llmq.pipeline.experts import beside_experts
from llmq.pipeline.plan import Plan, packed_bytes
from llmq.pipeline.site import pieces
from llmq.pipeline.whole_model import finisher_bytes
from llmq.progress import Memory
from llmq.stats import Hessian, Stat
from llmq.steps import Held, SiteStep
from llmq.types import LinearSpec

LIBRARIES = 460 * 10**6
_LOOPS = 150 * 10**6  # the compiler of loops and what it made; rounding to nearest alone needs none
_F32 = 4
_HEAP = 0.05  # of what is asked for, which is taken from the system besides
_VERIFIED = 16  # tokens of the forward that verification runs
_PACKING = 8  # bytes a weight of the linear that is being packed: 32-bit words take the place of codes
_DECODING = 16  # bytes a weight of the linear that is being verified


@dataclass(frozen=True)
class Phase:
    """What is held at one point of a run. at: where in the phase. host, device: bytes by what they are.

    device is empty where the run computes on the CPU, whose memory then holds all.
    """

    name: str
    at: str = ""
    host: Mapping[str, int] = field(default_factory=dict)
    device: Mapping[str, int] = field(default_factory=dict)

    def total(self, *, device: bool = False) -> int:
        """Return the bytes of all terms."""
        return sum((self.device if device else self.host).values())

    def largest(self, *, device: bool = False) -> str:
        """Return the name of the largest term but the libraries."""
        terms = self.device if device else self.host
        return max((n for n in terms if n != "libraries"), key=terms.__getitem__, default="libraries")


class Holdings:
    """What a prepared run holds. Blocks that differ are run once each on tensors without values, if it calibrates.

    processes: how many share the calibration; what is told is what one of them holds.
    """

    def __init__(self, plan: Plan, processes: int = 1) -> None:
        recipe = plan.method.recipe
        self.plan, self.method = plan, plan.method
        self.size = plan.skeleton.dtype.itemsize
        on_cpu = plan.device.type == "cpu"
        base = LIBRARIES if on_cpu else max(LIBRARIES, Memory.held().now)  # a GPU's own come on top
        self.libraries = base + (0 if recipe.method == "rtn" and recipe.range in (None, "minmax") else _LOOPS)
        self.samples, self.length = (recipe.samples or 0, recipe.seq_len or 0) if plan.calibrates() else (0, 0)
        self.side_by_side = min(self.samples, max(1, BATCH_TOKENS // max(1, self.length)))
        self.every = ceil(self.samples / self.side_by_side) if self.samples else 0  # batches of all processes
        self.batches = most(self.every, processes)
        self.sequences = min(self.samples, self.batches * self.side_by_side)
        self.share = plan.paired() if self.sequences else 0.0

    @cached_property
    def traced(self) -> tuple[Entered, list[Footprint]]:
        """What a sequence takes before the blocks, and in each of them; nothing where none is calibrated."""
        if not self.sequences:
            return Entered(0, 0), [Footprint({}, 0, 0, 0) for _ in self.plan.skeleton.blocks]
        gradients = self.method.weightings or self.method.recipe.target_bpw or self.method.tuners
        return footprints(self.plan.skeleton, self.length, gradients=bool(gradients))

    def phases(self, alive: int) -> Iterator[Phase]:
        """Yield all points of a run at which much is held, in the order in which they come.

        alive: how many batches stay suspended; all of them do in blocks of experts.
        """
        plan = self.plan
        sizes = plan.source.sizes()
        largest = max(sizes, key=sizes.__getitem__, default="")
        yield self._phase("loading", largest, host={"a tensor": 2 * sizes.get(largest, 0)})
        if plan.writes():
            weights = sum(sizes.values()) * self.size // plan.skeleton.stored_dtype.itemsize
            yield self._phase("writing text", "", {"whole model": writing_bytes(weights)})
        if self.sequences:
            yield self._phase(
                "loading", "embeddings", {"embeddings": self._embeddings(), "running batch": self._read()}
            )
        if self.method.weightings:
            yield from self._gradients(self.batches, alive)
        if self.method.recipe.target_bpw is not None:
            yield from self._gradients(1, 1)
        for i in range(len(plan.skeleton)):
            yield from self._block(i, alive)
        if plan.head is not None:
            yield from self._head(plan.linears[plan.head], alive)
        if self.method.finishers:
            yield self._phase("finishing", "", {"both models": finisher_bytes(plan)})
        yield from self._verifying()

    def _phase(
        self, name: str, at: str, computed: Mapping[str, float] | None = None, host: Mapping[str, float] | None = None
    ) -> Phase:
        """Return a point. computed: bytes where is computed. host: those in the host's memory in any case."""
        ahead = self._ahead if name in ("gradients", "blocks") and aside.pays(self.plan.device) else {}
        ours = {**ahead, **(host or {})}
        there = dict(computed or {})
        if self.plan.device.type == "cpu":
            ours, there = ours | there, {}
        return Phase(name, at, {"libraries": self.libraries, **_whole_bytes(ours)}, _whole_bytes(there))

    @cached_property
    def _ahead(self) -> dict[str, int]:
        """What the host holds while a GPU works: two blocks, one that it is given and one that is read, and batches."""
        skeleton, entered = self.plan.skeleton, self.traced[0]
        weights = max(own + in_all * self.method.loads_all_experts for own, in_all in self._weights)
        batches = (1 + bool(self.share)) * self.side_by_side
        return {
            "next block": 2 * weights * skeleton.stored_dtype.itemsize,
            "next batch": 3 * batches * entered.hidden,
        }

    def _read(self) -> int:
        """Return what a batch takes as it is read from the disk, and the arguments of all its calls."""
        entered, _ = self.traced
        return self.side_by_side * (2 * entered.hidden + entered.calls)

    def _embeddings(self) -> int:
        return sum(self.plan.source.sizes().get(f"{n}.weight", 0) for n in self.plan.skeleton.embeddings())

    @cached_property
    def _weights(self) -> list[tuple[int, int]]:
        """How many parameters each block has beside its experts, and in them."""
        return [_parameters(block) for block in self.plan.skeleton.blocks]

    @cached_property
    def _linears(self) -> list[dict[str, LinearSpec | None]]:
        """What becomes of the linears of each block, by their names in it; None of those that stay float."""
        skeleton, linears = self.plan.skeleton, self.plan.linears
        return [
            {n: linears.get(skeleton.full_name(i, n)) for n in linears_of(b)} for i, b in enumerate(skeleton.blocks)
        ]

    @cached_property
    def _words(self) -> list[int]:
        """How many bytes the packed linears of each block take."""
        form = self.method.format
        return [sum(packed_bytes(form, s) for s in named.values() if s) for named in self._linears]

    @cached_property
    def _left(self) -> list[int]:
        """What a sequence's keys and values take that blocks up to each one have left for those behind them."""
        return list(accumulate((f.left for f in self.traced[1]), max))

    def _squares(self, batches: int) -> int:
        return _F32 * batches * self.side_by_side * self.length * len(self.plan.linears)

    def _gradients(self, batches: int, most: int) -> Iterator[Phase]:
        """Yield what gradients of the float model take: a block at a time, several batches together."""
        skeleton, (entered, found) = self.plan.skeleton, self.traced
        batch = self.side_by_side * entered.hidden
        together = min(batches, held_at_once(batch, len(skeleton), most))
        beside = {
            "between blocks": together * batch * (len(skeleton) + 2),
            "squared gradients": self._squares(batches),
            "arguments": self.side_by_side * entered.calls,
        }
        i = max(range(len(skeleton)), key=lambda i: self.size * sum(self._weights[i]) + found[i].backward)
        taken = {"block": self.size * sum(self._weights[i]), "running batch": self.side_by_side * found[i].backward}
        yield self._phase("gradients", f"block {i}", beside | taken)
        yield self._phase("gradients", "head", beside | self._outside(self.size, POSITIONS))

    def _outside(self, size: int, positions: int) -> dict[str, float]:
        """Return what embeddings and head take where so many positions' logits are computed, `size` bytes a weight."""
        name = self.plan.weight_of(self.plan.model.head)
        _, (rows, width) = self.plan.source.headers()[name]
        read = 0 if name != f"{self.plan.model.head}.weight" else self.plan.skeleton.stored_dtype.itemsize
        head = rows * width * (size + read)
        return {"embeddings and head": self._embeddings() + head, "logits": 6 * _F32 * positions * rows}

    def _block(self, i: int, alive: int) -> Iterator[Phase]:
        """Yield what block `i` takes at each of its sites, and while its words are packed."""
        skeleton, found = self.plan.skeleton, self.traced[1][i]
        experts = in_experts(skeleton.blocks[i])
        own, in_all = self._weights[i]
        own, in_all = (own + in_all, 0) if self.method.loads_all_experts else (own, in_all)
        named = self._linears[i]
        at = found.at or {(n,): 0 for n in named}
        stay = self.batches if experts else min(alive, self.batches)
        if self.method.transforms:
            yield self._folding(i, at, named)
        codes = kept = before = words = 0
        tuned = bool(self.method.tuners)
        beside = beside_experts(skeleton.blocks[i], at)
        for names, held in at.items():
            specs = [s for n in names if (s := named[n])]
            others, solved = beside.get(names, (0, []))
            weights = self.size * (own + (others if in_all else 0))
            fixed = self._beside(i) | {
                "block": weights,
                "float block": weights * bool(self.share),
                "codes": codes if tuned else sum(_codes(s) for n in solved if (s := named[n])),
                "packed": words,
                "for the tuner": kept,
                "suspended": (1 + self.share) * stay * self.side_by_side * max(before, held),
            }
            columns = specs[0].K if specs else 0
            running = self._running(found, held, columns, more=stay < self.batches)
            yield from self._site(f"block {i}, {names[0]}", specs, fixed, running)
            before = held
            codes += sum(map(_codes, specs)) * tuned
            words += sum(packed_bytes(self.method.format, s) for s in specs) * (not tuned)
            kept += self._kept(specs)
        yield self._closing(i, self.size * own, [s for s in named.values() if s])

    def _beside(self, i: int) -> dict[str, float]:
        """Return what is held all through block `i`, beside its weights."""
        entered, _ = self.traced
        return {
            "squared gradients": self._squares(self.batches) if self.method.weightings else 0,
            "shared keys": (1 + self.share) * self._left[i] * self.sequences,
            "arguments": self.side_by_side * entered.calls,
        }

    def _running(self, found: Footprint, held: int, columns: int, *, more: bool) -> float:
        """Return what the batch that runs takes, and what is made of its activations, beside what is suspended.

        more: whether it is none of those that stay suspended.
        """
        streams = 1 + bool(self.share)
        batch = self.side_by_side * self.length
        given = _F32 * batch * columns * (streams - 1 + streams * ((self.size != _F32) + bool(self.method.weightings)))
        at_work = self.side_by_side * (found.most + (streams - 1) * held)
        at_rest = self.side_by_side * streams * held
        return max(at_work, at_rest + given) - (0 if more else at_rest)

    def _site(
        self, at: str, specs: Sequence[LinearSpec], fixed: Mapping[str, float], running: float
    ) -> Iterator[Phase]:
        """Yield what a site takes while its statistics are summed, and while it is solved."""
        K = max((s.K for s in specs), default=0)
        N = sum(s.N for s in specs)
        steps: tuple[SiteStep, ...] = (self.method.solver, *self.method.refiners)
        grids = [s.scheme.weight for s in specs]
        lasting = {stat for step in steps for stat in step.needs(grids)} if specs else set()
        every = lasting | {stat for step in self.method.corrections for stat in step.needs(grids)} if specs else set()
        lasting |= every & {Hessian}
        square, rows = _F32 * K * K, _F32 * N * K
        growing = square * sum(stat.summing for stat in every)
        yield self._phase("blocks", at, {**fixed, "running batch": running, "sums": growing})
        stacked = (len(specs) > 1) + (self.size != _F32)
        groups: list[tuple[set[type[Stat]], SiteStep, int]] = [
            (every, step, stacked + 1) for step in self.method.corrections
        ]
        groups += [(lasting, step, stacked + bool(self.method.corrections)) for step in steps]
        for stats, step, copies in groups if specs else ():
            sums, weights = square * (_matrices(stats) + step.held.KK), rows * (copies + step.held.NK / pieces(N))
            weights += rows // _F32  # codes
            yield self._phase("blocks", at, {**fixed, "sums": sums, "rows": weights})

    def _kept(self, specs: Sequence[LinearSpec]) -> int:
        """Return what a site leaves for the steps that tune the block, or the whole model."""
        later = bool(self.method.tuners or self.method.finishers)
        weights = _F32 * sum(s.N * s.K for s in specs) if self.method.tuners else 0
        return weights + _F32 * max((s.K for s in specs), default=0) ** 2 * later

    def _folding(self, i: int, at: Mapping[tuple[str, ...], int], named: Mapping[str, LinearSpec | None]) -> Phase:
        """Return what transforms take: statistics of all sites, the calls of a parent, weights tried."""
        found = self.traced[1]
        held = Held(*(max(step.held[k] for step in self.method.transforms) for k in (0, 1)))
        shapes = [[s for n in names if (s := named[n])] for names in at]
        widest = max((sum(s.N * s.K for s in site) for site in shapes), default=0)
        square = max((s.K for site in shapes for s in site), default=0) ** 2
        terms = {
            "block": self.size * sum(self._weights[i]),
            "running batch": self.side_by_side * 2 * found[i].most,
            "sums": _F32 * square * held.KK,
            "rows": _F32 * widest * held.NK,
        }
        return self._phase("blocks", f"block {i}, folding", self._beside(i) | terms)

    def _closing(self, i: int, block: int, specs: Sequence[LinearSpec]) -> Phase:
        """Return what block `i` takes when all of it is solved: tuned, packed, and put out as a last forward.

        A GPU packs; the words lie in the host's memory too as they are written.
        """
        weights = sum(s.N * s.K for s in specs)
        words = self._words[i]
        terms: dict[str, float] = {
            "block": block,
            "float block": block * bool(self.share),
            "codes": sum(map(_codes, specs)) * bool(self.method.tuners),
            "packed": words + _PACKING * max((s.N * s.K for s in specs), default=0),
            "running batch": self.side_by_side * self.traced[1][i].most,
        }
        if self.method.tuners:
            terms["for the tuner"] = weights * _F32 * max(t.held.NK for t in self.method.tuners)
            terms["between blocks"] = 2 * self.sequences * self.traced[0].hidden
            terms["running batch"] += self.traced[1][i].backward
        return self._phase("blocks", f"block {i}, packing", self._beside(i) | terms, {"packed": words})

    def _head(self, spec: LinearSpec, alive: int) -> Iterator[Phase]:
        """Yield what the head takes, a block of one linear behind the final norm."""
        hidden = self.traced[0].hidden
        norm = Footprint({}, 4 * hidden, 0, 0)
        stay = min(alive, self.batches)
        fixed = {
            "a tensor": (_F32 + self.plan.skeleton.stored_dtype.itemsize) * spec.N * spec.K,
            "suspended": (1 + self.share) * stay * self.side_by_side * 2 * hidden,
        }
        running = self._running(norm, 2 * hidden, spec.K, more=stay < self.batches)
        yield from self._site("head", [spec], fixed, running)

    def _verifying(self) -> Iterator[Phase]:
        """Yield what verification takes, on the host: a block in float32, but for its experts; then the head."""
        skeleton = self.plan.skeleton
        i = max(range(len(skeleton)), key=lambda i: self._weights[i][0])
        linears = linears_of(skeleton.blocks[i]).values()
        decoding = _DECODING * max((m.in_features * m.out_features for m in linears), default=0)
        block = _F32 * self._weights[i][0]
        yield self._phase("verifying", f"block {i}", host={"decoded block": block, "decoding": decoding})
        yield self._phase("verifying", "head", host=self._outside(_F32, _VERIFIED))


def _parameters(block: nn.Module) -> tuple[int, int]:
    """Return how many parameters a block has beside its experts, and in them."""
    experts = sum(p.numel() for m in in_experts(block).values() for p in m.parameters())
    return sum(p.numel() for p in block.parameters()) - experts, experts


def _codes(spec: LinearSpec) -> int:
    """Return the bytes of a solved linear: its codes, and a scale and a zero for each group."""
    groups = spec.scheme.weight.granularity.groups(spec.K)
    return spec.N * (spec.K + 8 * groups)


def _whole_bytes(terms: Mapping[str, float]) -> dict[str, int]:
    """Return terms in whole bytes, but those of nothing, and what the heap takes besides."""
    found = {name: ceil(size) for name, size in terms.items() if size}
    return found | {"heap": ceil(_HEAP * sum(found.values()))} if found else found


def _matrices(stats: set[type[Stat]]) -> float:
    return sum(stat.matrices for stat in stats)
