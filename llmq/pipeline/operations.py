"""How much a run computes, reads and writes, by kind and by how it is dealt, from headers and shapes alone.

    work = operations(plan, alive=64)
    work["forward", "batches"]          flops of forwards, which processes share by batches

T tokens of calibration, a linear [N, K], t tokens that reach it (of an expert T k / E):

    forward      2 N K t flops for each linear and stream, and attention's 2 S T heads d; a batch that is not suspended
                 runs anew to each site, 2.3 forwards for one
    statistics   1.1 K^2 t flops for a Hessian, of which the upper blocks are computed; 2.25 K^2 t more for a drift
    factor, products, columns, looks, fits, passes    what the steps say (`Step.operations`), and 2.5 N K^2 of products
                 for the errors in the record
    packing, decoding    weights packed, and decoded again to verify them
    digest       bytes whose checksums are taken: codes, tensors and files, when written and when verified
    read, write  bytes; the checkpoint is read for NaN and for the run, OUT written in parts, then in shards
    writing      flops of products of few rows: a model that writes its own text passes all weights for every token
    link         bytes of sums that several processes add up, 4 an entry; of codes that they send each other, 1 a weight
    text, linears, starts    tokens of text that are cut; linears, for what each costs whatever its size; the model
                 without weights, and a process that reads text

Not here: how fast any of it is (rates.py, machines.py), how long it takes (estimate.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil

from torch import nn

from llmq import blend
from llmq.calibration.text import READ_FACTOR
from llmq.calibration.writing import TRIED_STEPS
from llmq.model.experts import Experts, in_experts, linears_of
from llmq.pipeline.experts import stages
from llmq.pipeline.holdings import Holdings
from llmq.pipeline.plan import Plan
from llmq.pipeline.site import pieces
from llmq.stats import TRIANGLE, Drift, Hessian
from llmq.steps import Step, Transform
from llmq.types import LinearSpec, Site

Amounts = dict[tuple[str, str | int], float]
"""Amounts by kind, and by how processes share them: by "batches", or in so many pieces of rows, or experts, a number;
"each" does all, or the "first"; of bytes on the link, they are of "sums" that all get, of those that the "owner" of an
expert gets, or "sent" by one to all.
"""
AGAIN = 2.3
"""Forwards that a batch takes which stays suspended nowhere, in place of one: measured 2.15 to 2.5."""
_GRADIENTS = 4  # forwards that a gradient at every linear is worth: one, and for the backward pass one again and two
_DRAWN = 10  # passes over the logits of a token that is drawn
_CALLED = 0.06  # of what it costs to solve a linear of no size: to call it once, with what lies between it and the next
_VERIFIED = 16  # tokens of the forward that verification runs


def operations(plan: Plan, holdings: Holdings, alive: int) -> Amounts:
    """Return what a run computes with so many batches suspended."""
    return _Counting(plan, holdings, alive).work


class _Counting:
    def __init__(self, plan: Plan, holdings: Holdings, alive: int) -> None:
        self.plan, self.holdings, self.method = plan, holdings, plan.method
        self.tokens = holdings.samples * holdings.length
        self.alive = alive
        self.work: Amounts = defaultdict(float)
        self.matmuls = 0.0  # flops of a forward of all blocks over one token
        self.squares = 0.0  # K^2 of all sites, times the share of tokens that reaches them
        for i, block in enumerate(plan.skeleton.blocks):
            self._block(i, block)
        for spec in plan.rows.values():
            self.work["fits", "first"] += spec.N * spec.K
        if plan.head is not None:
            self._site([plan.linears[plan.head]], self.tokens)
        self._gradients()
        for step in self.method.finishers:
            forwards = step.forwards(holdings.samples, holdings.length) + 1  # the float model's
            self.work["forward", "first"] += forwards * self.tokens * (self.matmuls + 3 * self._logits())
        self._text()
        self._files()

    def _block(self, i: int, block: nn.Module) -> None:
        """Count a block: its forwards, statistics and solves."""
        experts, full = in_experts(block), self.plan.skeleton.full_name
        share = _share(block)
        linears = linears_of(block)
        found = self.holdings.traced[1][i].at or {(n,): 0 for n in linears}
        heads = getattr(self.plan.skeleton.text, "num_attention_heads", 0) * self.plan.skeleton.head_dim_of(i)
        flops, outputs = 2.0 * self.holdings.length * heads, 0.0
        together = {s.linears: len(some) for some in stages(block, [Site(names) for names in found]) for s in some}
        for names in found:
            reach = share if names[0] in experts else 1.0
            flops += 2 * reach * sum(linears[n].weight.numel() for n in names)
            outputs += reach * sum(linears[n].out_features for n in names)
            self.squares += reach * linears[names[0]].in_features ** 2
            specs = [s for n in names if (s := self.plan.linears.get(full(i, n)))]
            self._site(specs, self.tokens * reach, together[names])
        self.matmuls += flops
        for dealt, forwards in self._forwards(experts=bool(experts)).items():
            self.work["forward", dealt] += forwards * self.tokens * flops
            self.work["passes", dealt] += 4 * forwards * self.tokens * outputs  # norms, gates, sums
        width = self.plan.skeleton.text.hidden_size
        self.work["passes", "batches"] += (
            4 * (1 + self.holdings.share) * self.tokens * width
        )  # states, written and read

    def _forwards(self, *, experts: bool) -> Mapping[str | int, float]:
        """Return how many forwards over the calibration a block takes, by how they are shared.

        Blocks of experts keep all batches suspended. A transform observes one forward, and searches with the rest.
        """
        samples, length = self.holdings.samples, self.holdings.length
        if not samples:
            return {}
        left = 0.0 if experts else 1 - min(1.0, self.alive / self.holdings.batches)
        streams = (1 + self.holdings.share) * (1 + left * (AGAIN - 1))
        observed = [step.forwards(samples, length) for step in self.method.transforms]
        again = 1.0 if self.method.tuners else 0.0  # what tuners have moved is put out by a forward of its own
        found: dict[str | int, float] = defaultdict(float)
        found["batches"] = streams + again + sum(min(1.0, n) for n in observed)
        found["each"] = sum(step.forwards(samples, length) for step in self.method.tuners)
        for step, forwards in zip(self.method.transforms, observed, strict=True):
            found[_searchers(step)] += max(0.0, forwards - 1)
        return found

    def _site(self, specs: Sequence[LinearSpec], reach: float, together: int = 1) -> None:
        """Count the statistics and the solve of linears that share an input; reach: the tokens that reach it.

        together: the experts that are dealt with it, each solved by one process.
        """
        if not specs:
            return
        method, K, N = self.method, specs[0].K, sum(s.N for s in specs)
        stats = method.needs([s.scheme.weight for s in specs])
        rows = min(pieces(N), *(s.scheme.weight.granularity.rows(s.N) for s in specs)) if together == 1 else together
        sums = K**2 * (TRIANGLE * (Hessian in stats) + (2 + TRIANGLE) * (Drift in stats))
        self.work["link", "sums" if together == 1 else "owner"] += 4 * sums
        self.work["link", "sent"] += N * K
        self.work["statistics", "batches"] += K**2 * reach * (1.1 * (Hessian in stats) + 2.25 * (Drift in stats))
        factors: str | int = "each" if together == 1 else together
        for step in method.transforms:
            self._steps([step], N, K, _searchers(step), "each")
        self._steps((*method.corrections, method.solver, *method.refiners), N, K, rows, factors)
        self._steps(method.tuners, N, K, "each", "each")
        self.work["products", rows] += 2.5 * N * K**2 * (Hessian in stats)
        self.work["passes", rows] += 40 * N * K  # rounded, decoded, compared, in part as integers
        self.work["packing", "first"] += N * K
        self.work["linears", "each"] += len(specs)

    def _steps(self, steps: Sequence[Step], N: int, K: int, dealt: str | int, factors: str | int) -> None:
        """Count what steps do for N rows, by how it is dealt, and likewise what they factor."""
        for step in steps:
            for kind, amount in step.operations(N, K)._asdict().items():
                self.work[kind, factors if kind == "factor" else dealt] += amount

    def _gradients(self) -> None:
        """Count the gradients that weigh tokens, and those of one batch and the trials by which bits are chosen."""
        each = _GRADIENTS * (self.matmuls + self._logits())
        if self.method.weightings:
            self.work["forward", "batches"] += each * self.tokens
            self.work["read", "each"] += 2 * self.plan.source.bytes()
        if self.method.recipe.target_bpw is None:
            return
        batch = self.holdings.side_by_side * self.holdings.length
        choices = len(self.method.recipe.candidates())
        weights = sum(s.N * s.K for s in self.plan.linears.values())
        self.work["forward", "first"] += batch * (self.matmuls + (0 if self.method.weightings else each))
        self.work["statistics", "first"] += 1.1 * batch * self.squares
        self.work["products", "first"] += 2 * batch * choices * weights
        self.work["fits", "first"] += choices * weights
        self.work["read", "first"] += self.plan.source.bytes()

    def _text(self) -> None:
        """Count the calibration text: cut by a process of its own; what the model writes takes a forward a token."""
        if not self.tokens:
            return
        length = self.holdings.length
        samples = blend.written(self.method.recipe.calib, self.holdings.samples)
        if read := self.tokens - samples * length:
            self.work["text", "first"] += READ_FACTOR * read
            self.work["starts", "each"] += 1
        if samples:
            self._writing(samples, length)

    def _writing(self, samples: int, length: int) -> None:
        """Count the text that the model writes."""
        skeleton = self.plan.skeleton
        batch = self.plan.writes()
        steps = ceil(samples / batch) * length + TRIED_STEPS
        tokens = samples * length + TRIED_STEPS * batch
        heads = getattr(skeleton.text, "num_attention_heads", 0) * sum(map(skeleton.head_dim_of, range(len(skeleton))))
        linears = sum(len(linears_of(block)) for block in skeleton.blocks)
        self.work["writing", "first"] += tokens * (self.matmuls + self._logits())
        self.work["passes", "first"] += tokens * (2 * length * heads + _DRAWN * skeleton.text.vocab_size)
        self.work["linears", "first"] += _CALLED * steps * linears
        self.work["read", "first"] += self.plan.source.bytes()

    def _logits(self) -> float:
        """Return the flops of the head for one token."""
        _, shape = self.plan.source.headers()[self.plan.weight_of(self.plan.model.head)]
        return 2.0 * shape[0] * shape[-1]

    def _files(self) -> None:
        """Count what is read, written, and judged when it is written."""
        plan, out = self.plan, self.plan.bytes()
        weights = sum(s.N * s.K for s in plan.matrices.values())
        self.work["read", "each"] += plan.source.bytes()
        self.work["read", "first"] += plan.source.bytes()  # looked at for NaN before anything
        self.work["passes", "first"] += plan.source.bytes() / plan.skeleton.stored_dtype.itemsize
        self.work["write", "first"] += 2 * out
        self.work["read", "first"] += 3 * out  # joined, and read twice to verify
        self.work["digest", "first"] += 2 * (2 * out + weights)
        self.work["decoding", "first"] += weights
        self.work["passes", "first"] += 20 * weights
        self.work["forward", "first"] += _VERIFIED * self.matmuls
        self.work["starts", "each"] += 1


def _searchers(step: Transform) -> str | int:
    """Return how processes share the search of a transform."""
    return step.candidates if step.candidates > 1 else "each"


def _share(block: nn.Module) -> float:
    """Return the share of the tokens that reach an expert of a block; 1 where every expert is called on all."""
    for holder, layer in block.named_modules():
        if isinstance(layer, Experts) and not layer.every:
            beside = block.get_submodule(holder.rpartition(".")[0]).modules()
            chosen = [k for m in beside if isinstance(k := getattr(m, "top_k", None), int)]
            return min(1.0, max(chosen, default=1) / layer.num_experts)
    return 1.0


def sites(plan: Plan, traced: Sequence[Mapping[tuple[str, ...], int]]) -> dict[str, str]:
    """Return the site of every linear of the blocks, by full names: that of the first linear that reads its input."""
    full = plan.skeleton.full_name
    return {full(i, n): full(i, names[0]) for i, at in enumerate(traced) for names in at for n in names}
