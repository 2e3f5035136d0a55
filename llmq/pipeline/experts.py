"""The experts of a block while it is calibrated: how many tokens reach each, and what their layer knows besides.

An expert sees the tokens that are routed to it. The input of its gate and up is a part of what enters its layer, so the
layer's second moments stand in for tokens that it did not see (algorithms/_hessian.py); an expert without any token is
rounded to nearest. Both are recorded.
Not here: the module (model/experts.py), solving a site (solving.py).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from statistics import quantiles
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from llmq.checkpoint.parts import Part
from llmq.checkpoint.source import Source
from llmq.model.experts import ROUND, Experts, apart, in_experts
from llmq.readers import Limit
from llmq.stats import Hessian
from llmq.team import Team
from llmq.types import LinearSpec, LlmqError, Site

Found = TypeVar("Found")
NO_TOKEN = "no token reached this expert"  # noqa: S105


class Layer:
    """One module of experts. counts: the tokens routed to each, int64 `[E]`. moments: of all that enters."""

    def __init__(self, experts: Experts, tokens: int, *, moments: bool) -> None:
        self.experts = experts
        self.counts = torch.zeros(experts.num_experts, dtype=torch.int64)
        self.moments = Hessian(tokens) if moments and not experts.every else None

    def see(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Count a batch that enters."""
        routed = self.experts.routed(*args)
        self.counts = self.counts.to(routed.device) + routed  # there, so that no batch is waited for
        if self.moments is not None:
            self.moments.update(self.experts.entering(args[0]))

    def mean(self, site: Site) -> Tensor | None:
        """Return the mean `X^T X` over all tokens where the site reads them as they enter; nothing for `down_proj`."""
        known = self.moments is not None and self.moments.count and not site.linears[0].endswith(".down_proj")
        return self.moments.mean() if self.moments is not None and known else None


class Layers:
    """All modules of experts of a block, by name; a context manager that watches what enters them."""

    def __init__(self, block: nn.Module, tokens: int, *, moments: bool) -> None:
        found = {n: m for n, m in block.named_modules() if isinstance(m, Experts)}
        self._layers = {n: Layer(m, tokens, moments=moments) for n, m in found.items()}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.experts.register_forward_pre_hook(layer.see) for layer in self._layers.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            layer.experts.follow(None)

    def lead(self, copy: nn.Module) -> None:
        """Let the experts of a float copy of the block be called on these ones' tokens too, so that the two compare."""
        for name, layer in self._layers.items():
            follower = copy.get_submodule(name)
            if isinstance(follower, Experts):
                follower.follow(layer.experts)

    def of(self, site: Site) -> Layer | None:
        """Return the layer that a site belongs to, None where its linears are no expert's."""
        return next((layer for n, layer in self._layers.items() if site.linears[0].startswith(f"{n}.")), None)

    def counts(self, full: Callable[[str], str], team: Team) -> dict[str, list[int]]:
        """Return the tokens routed to each expert, by the full names of the modules, whichever process saw them."""
        seen = team.gather({full(n): layer.counts.tolist() for n, layer in self._layers.items()})
        return {name: [sum(each) for each in zip(*(theirs[name] for theirs in seen), strict=True)] for name in seen[0]}


def together(names: Mapping[str, Any], model: nn.Module) -> dict[str, list[str]]:
    """Return which of `names` are linears of experts, by the module of experts that they belong to."""
    found: dict[str, list[str]] = {n: [] for n, m in model.named_modules() if isinstance(m, Experts)}
    for name in names if found else ():
        holder = name.rpartition(".")[0].rpartition(".")[0]
        if holder in found:
            found[holder].append(name)
    return found


def refuse_unlike(linears: Mapping[str, LinearSpec], model: nn.Module) -> None:
    """Raise LlmqError where the experts of one layer would not all be quantized alike: runtimes run them as one."""
    every = {n: m.num_experts * _projections(m) for n, m in model.named_modules() if isinstance(m, Experts)}
    for layer, names in together(linears, model).items():
        odd = next((n for n in names if linears[n].scheme != linears[names[0]].scheme), None)
        if odd is not None or 0 < len(names) < every[layer]:
            what = f"{odd} differs from {names[0]}" if odd else f"{every[layer] - len(names)} of its linears stay float"
            raise LlmqError(
                f"{layer}: the experts of a layer are quantized alike, all of them or none, as runtimes run them as "
                f"one, but {what}; let --override and --skip match all of it, or choose a --group-size that fits all"
            )


def reader_limits(source: Source, linears: Mapping[str, LinearSpec], method: str) -> list[Limit]:
    """Return a limit where experts that the checkpoint has in one tensor are written one by one: who reads that."""
    parts = {n: e.name for n, e in source.entries().items() if isinstance(e, Part) and n.endswith(".weight")}
    taken = next((tensor for n, tensor in parts.items() if n.removesuffix(".weight") in linears), None)
    return [] if taken is None else apart(taken, source.config.get("model_type"), method)


def floats_apart(model: nn.Module, method: str) -> bool:
    """Say whether float experts that the checkpoint has in one tensor are written one by one.

    For GGUF, which puts all together at the end, and where transformers reads them so: it takes Llama 4's apart in any
    compressed-tensors model.
    """
    batched = any(isinstance(m, Experts) and m.batched for m in model.modules())
    return method == "gguf" or (method == "compressed-tensors" and batched)


def stages(block: nn.Module, sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites of a block as they are ready together: experts' of one round, all others one by one."""
    experts = in_experts(block)
    return [list(some) for _, some in itertools.groupby(sites, lambda site: _stage(site, experts))]


def _stage(site: Site, experts: Collection[str]) -> tuple[str, int, str]:
    name = site.linears[0]
    if name not in experts:
        return name, 0, ""
    layer, e, leaf = name.rsplit(".", 2)
    return layer, int(e) // ROUND, leaf


def beside_experts(block: nn.Module, sites: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[int, list[str]]]:
    """Return for each site of experts how many weights of such are in place at most, and the linears solved with it.

    Those of one stage are in place together, and those of the stage before until all batches have left it.
    """
    found, experts, before = {}, in_experts(block), 0
    for stage in stages(block, [Site(names) for names in sites if names[0] in experts]):
        weights = [sum(experts[n].weight.numel() for n in site.linears) for site in stage]
        solved: list[str] = []
        for site, own in zip(stage, weights, strict=True):
            found[site.linears] = max(before + own, sum(weights)), list(solved)
            solved += site.linears
        before = sum(weights)
    return found


def in_order(named: Mapping[str, Found]) -> dict[str, Found]:
    """Return what is known of linears or tensors with those of one expert side by side, in the order of the experts."""
    places: dict[str, int] = {}

    def place(name: str) -> tuple[int, int]:
        layer = any_expert(name).partition("experts.*.")
        return places.setdefault(layer[0] if layer[1] else name, len(places)), number(name)

    return {name: named[name] for name in sorted(named, key=place)}


def number(linear: str) -> int:
    """Return the number of the expert that a linear belongs to, 0 where it is no expert's."""
    found = re.search(r"\.experts\.(\d+)\.", linear)
    return int(found[1]) if found else 0


def any_expert(names: str) -> str:
    """Return names of linears with a star for the number of an expert."""
    return re.sub(r"(experts)\.\d+\.", r"\1.*.", names)


def _projections(experts: Experts) -> int:
    return sum(len(f.projections) for f in experts.fused.values() if f.leaf == "weight")


def described(counts: Mapping[str, list[int]], width: int, *, every: bool) -> dict[str, Any]:
    """Return what `quantization.json` says of calibrated experts: how the tokens fell on them, and who had too few.

    width: the columns of what enters them: from fewer tokens no H of full rank comes.
    """
    flat = sorted(n for each in counts.values() for n in each)
    low, middle, high = (round(q) for q in quantiles(flat, n=4)) if len(flat) > 1 else (flat[0],) * 3
    named = [(f"{layer}.{e}", n) for layer, each in counts.items() for e, n in enumerate(each)]
    return {
        "calibrated_on": "all tokens" if every else "the tokens routed to each",
        "tokens": {"least": flat[0], "quartiles": [low, middle, high], "most": flat[-1], "experts": len(flat)},
        "few": [n for n, seen in named if 0 < seen < width],
        "none": [n for n, seen in named if not seen],
        "layers": dict(counts),
    }
