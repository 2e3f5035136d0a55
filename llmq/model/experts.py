"""Experts as transformers fuses them, taken apart: each projection of each expert a linear of its own.

transformers holds the experts of a layer in 3-D parameters and says by flags how they lie; checkpoints hold a matrix
for each expert and projection, or all in one tensor (checkpoint/parts.py). Here every expert is called for every batch,
one after the other, on the tokens that are routed to it, which may be none: so its linears are sites like any other,
and are quantized, stored, and run packed like any other. What is computed is what transformers computes:

    y_t = sum over the experts e of token t:  w_te down_e(gate(gate_e x_t, up_e x_t))

They run in rounds of `ROUND`: what enters the gates of all of a round is announced, gates and ups run, what enters
their down projections is announced, those run.

Source: transformers 5.23, `integrations/moe.py` (`use_experts_implementation`, of which most families' experts are) and
`Llama4TextExperts`, which takes the tokens of all experts as one batch, zeros where a token is not an expert's.
Not here: which stored tensor is which (checkpoint/names.py).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmq.checkpoint.parts import Fused
from llmq.errors import LlmqError
from llmq.readers import RUNTIMES, Limit

_Index = Tensor | slice
_GATED = ("gate_proj", "up_proj")
ROUND = 8
"""Experts that run together: what enters each is announced before any of them does, so that as many processes can each
solve one of them while no batch needs its weights."""
_READ_APART = ("llama4", "qwen3_5_moe", "qwen3_vl_moe")  # whose experts vLLM loads as llm-compressor writes them


class Arrival(nn.Module):
    """Where it is announced what will enter a linear of an expert, before any of its kind in the round has run."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what will enter."""
        return x


Together = Callable[[Tensor, Tensor | None, Tensor | None], Tensor | None]
"""What computes all experts of a layer at once: given what the layer is called with; None where it cannot."""


class Experts(nn.Module):
    """Stands in for a fused module: its experts are its children by their number, `7.gate_proj`, `7.up_proj` ...

    Called as the fused one is: with hidden states `[T, H]`, each token's experts `[T, k]` and their weights `[T, k]`.
    fused: the parameters that the module replaced, and whose rows they hold.
    entries: the projections that read what enters an expert.
    together: asked first; where there is none, the experts run one after the other.
    every: whether each expert is called on all tokens, which changes no output.
    batched: whether it is called with the tokens of all experts instead, zeros where a token is not an expert's.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # its gating; in a list: no submodule
        self.batched = _is_batched(module)
        self.every = False
        self.together: Together | None = None
        self._trail: deque[list[Tensor]] | None = None
        self._lead: deque[list[Tensor]] | None = None
        self.fused = _fused(module)
        self.entries = _GATED if "gate_up_proj" in self.fused else ("up_proj",)
        self.num_experts = self.fused["down_proj"].shape[0]
        for fused in self.fused.values():
            if fused.leaf == "weight":
                self._add(fused, bias=any(f.leaf == "bias" for f in self.fused.values()))
        for name, child in module.named_children():
            if any(True for _ in child.parameters()):
                self.add_module(name, child)
        leaves = [f.projections[0] for f in self.fused.values() if f.leaf == "weight"]
        self.arrivals = {f"{e}.{leaf}": Arrival() for e in range(self.num_experts) for leaf in leaves}

    def _add(self, fused: Fused, *, bias: bool) -> None:
        """Make the linears of one fused parameter, on meta."""
        rows, K = fused.shape[:0:-1] if fused.transposed else fused.shape[1:]
        for e in range(self.num_experts):
            if str(e) not in self._modules:
                self.add_module(str(e), nn.Module())
            for projection in fused.projections:
                linear = _blank(K, rows // len(fused.projections), bias=bias)
                self._modules[str(e)].add_module(projection, linear)  # type: ignore[union-attr]

    def experts(self) -> Iterator[Any]:
        """Yield the experts in their order."""
        for e in range(self.num_experts):
            yield getattr(self, str(e))

    def rounds(self) -> list[range]:
        """Return the numbers of the experts that run together."""
        return [range(e, min(e + ROUND, self.num_experts)) for e in range(0, self.num_experts, ROUND)]

    def follow(self, other: Experts | None) -> None:
        """Call each expert first on the tokens that another model's same experts were called on, then on its own.

        What is computed stays the same. The other is called first, batch by batch, in the same order. None: no more.
        """
        if other is None:
            self._trail = self._lead = None
        elif not self.batched:
            other._trail = self._lead = deque()

    def forward(self, hidden: Tensor, index_Tk: Tensor | None = None, weight_Tk: Tensor | None = None) -> Tensor:
        """Return the sum of what each token's experts make of it, `[T, H]`."""
        if self.together is not None and (y := self.together(hidden, index_Tk, weight_Tk)) is not None:
            return y
        if index_Tk is None or weight_Tk is None:
            return self._batched(hidden)
        routed = self._places(index_Tk)
        led = self._lead.popleft() if self._lead is not None else [None] * self.num_experts
        if self._trail is not None:
            self._trail.append([token for _, token in routed])
        out = torch.zeros_like(hidden)
        called = [self._called(hidden, token, first) for (_, token), first in zip(routed, led, strict=True)]
        answers = self._answers([partial(_rows, hidden, tokens) for tokens, _ in called])
        for (place, token), (_, at), y in zip(routed, called, answers, strict=True):
            out.index_add_(0, token, (y[at] * weight_Tk[token, place, None]).to(out.dtype))
        return out

    def _places(self, index_Tk: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each expert its tokens, and of which choice of theirs it is: first choices first.

        Sorted at once: to look for each expert would wait for a GPU as often.
        """
        order = index_Tk.T.flatten().argsort(stable=True)
        counts = torch.bincount(index_Tk.flatten(), minlength=self.num_experts).tolist()
        return [(at // len(index_Tk), at % len(index_Tk)) for at in order.split(counts)[: self.num_experts]]

    def routed(self, hidden: Tensor, index_Tk: Tensor | None = None, _weight_Tk: Tensor | None = None) -> Tensor:
        """Return how many of the tokens that it is called with are routed to each expert, int64 `[E]`."""
        if index_Tk is None:
            return hidden.view(self.num_experts, -1, hidden.shape[-1]).any(-1).sum(-1)
        return torch.bincount(index_Tk.flatten(), minlength=self.num_experts)[: self.num_experts]

    def entering(self, hidden: Tensor) -> Tensor:
        """Return what enters any expert, `[T, H]`: without the zeros that stand for tokens of another one."""
        return hidden[hidden.any(-1)] if self.batched else hidden

    def _called(self, hidden: Tensor, token: Tensor, first: Tensor | None) -> tuple[_Index, _Index]:
        """Return on which tokens an expert is called, and where its own are among them.

        Those are its own, all, or first those of another model.
        """
        if self.every:
            return slice(None), token
        if first is None:
            return token, slice(None)
        called = torch.cat([first, token[~torch.isin(token, first)]])
        at = called.new_empty(len(hidden))
        at[called] = torch.arange(len(called), device=called.device)
        return called, at[token]

    def _batched(self, hidden: Tensor) -> Tensor:
        """Return the experts' outputs one below the other, as the hidden states `[E T, H]` are, each times its weight.

        A row of zeros is a token of another expert; it comes out as zeros.
        """
        out = torch.zeros_like(hidden)
        rows, to = (x.view(self.num_experts, -1, hidden.shape[-1]) for x in (hidden, out))
        tokens = [of_one.any(-1).nonzero()[:, 0] for of_one in rows]
        answers = self._answers([partial(_rows, of_one, t) for of_one, t in zip(rows, tokens, strict=True)])
        for e, y in enumerate(answers):
            to[e, tokens[e]] = y
        return out

    def _answers(self, takes: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
        """Yield what each expert makes of its tokens. takes: returns those of each one, as often as it is asked."""
        entry, leave = dict.fromkeys(name.partition(".")[2] for name in self.arrivals)
        for some in self.rounds():
            for e in some:
                self._announce(f"{e}.{entry}", takes[e])
            inner = {e: self._inner(getattr(self, str(e)), takes[e]()) for e in some}
            for e in some:
                self._announce(f"{e}.{leave}", partial(inner.__getitem__, e))
            for e in some:
                yield self._outer(getattr(self, str(e)), inner.pop(e))

    def _announce(self, name: str, take: Callable[[], Tensor]) -> None:
        """Say what will enter a linear, where anyone listens."""
        if self.arrivals[name]._forward_pre_hooks:
            self.arrivals[name](take())

    def _inner(self, expert: Any, x: Tensor) -> Tensor:
        """Return what enters an expert's down projection, `[T, I]`."""
        entered = [getattr(expert, leaf)(x) for leaf in self.entries]
        return self.activated(torch.cat(entered, -1) if len(entered) > 1 else entered[0])

    def activated(self, entered: Tensor) -> Tensor:
        """Return what enters down projections `[T, I]`, of what all `entries` made of it, side by side."""
        module: Any = self._module[0]
        if len(self.entries) == 1:
            return module.act_fn(entered)  # type: ignore[no-any-return]
        if self.fused["gate_up_proj"].interleaved:
            entered = entered.unflatten(-1, (2, -1)).mT.flatten(-2)
        return module._apply_gate(entered) if hasattr(module, "_apply_gate") else _gate(module, entered)  # type: ignore[no-any-return]

    def _outer(self, expert: Any, inner: Tensor) -> Tensor:
        """Return what an expert makes of its tokens, `[T, H]`."""
        return self.finished(expert.down_proj(inner))

    def finished(self, y: Tensor) -> Tensor:
        """Return what experts make of tokens, of what their down projections did."""
        return self._modules["post_expert_norm"](y) if "post_expert_norm" in self._modules else y  # type: ignore[misc]


def _rows(x: Tensor, index: _Index) -> Tensor:
    """Return some rows of a tensor, or that very tensor, by which it is known who reads the same."""
    return x[index] if isinstance(index, Tensor) else x


def _blank(K: int, N: int, *, bias: bool) -> nn.Linear:
    """Return a linear on meta without drawing weights for it, which takes most of the time of making one."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = K, N
    linear.weight = nn.Parameter(torch.empty(N, K, device="meta"))
    linear.register_parameter("bias", nn.Parameter(torch.empty(N, device="meta")) if bias else None)
    return linear


def _gate(module: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return up * module.act_fn(gate)  # type: ignore[no-any-return]


def _fused(module: Any) -> dict[str, Fused]:
    """Return how the parameters of a fused module hold its experts."""
    transposed = getattr(module, "is_transposed", _is_batched(module))
    interleaved = not getattr(module, "is_concatenated", True)
    found = {}
    for name, p in module.named_parameters(recurse=False):
        stem, leaf = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        both = stem == "gate_up_proj"
        weight = leaf == "weight"
        found[name] = Fused(
            tuple(p.shape), _GATED if both else (stem,), leaf, transposed and weight, interleaved and both
        )
    return found


def _is_batched(module: nn.Module) -> bool:
    """Say whether these are Llama 4's experts: they have no flags, and transformers too knows them by this name."""
    return type(module).__name__ == "Llama4TextExperts"


def is_fused(module: nn.Module) -> bool:
    """Say whether a module holds experts in a way that `Experts` takes apart."""
    known = hasattr(module, "is_concatenated") or _is_batched(module)
    own = {n for n, _ in module.named_parameters(recurse=False)}
    up = own & {"gate_up_proj", "up_proj"}
    biases = {f"{n}_bias" for n in (*up, "down_proj")}
    return known and len(up) == 1 and own in ({*up, "down_proj"}, {*up, "down_proj", *biases})


def unfuse(model: nn.Module) -> dict[str, nn.Module]:
    """Replace every module of fused experts; one that cannot be taken apart stays. Returns those replaced, by name."""
    found = {n: m for n, m in model.named_modules() if is_fused(m)}
    for name, module in found.items():
        model.set_submodule(name, Experts(module))
    return found


def entrance(block: nn.Module, linear: str) -> nn.Module:
    """Return the module whose call tells what enters a linear: itself, or where that is announced before."""
    holder = block.get_submodule(linear.rpartition(".")[0].rpartition(".")[0])
    arrivals = holder.arrivals if isinstance(holder, Experts) else {}
    return arrivals.get(".".join(linear.split(".")[-2:]), block.get_submodule(linear))


def in_experts(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block's experts by name."""
    holders = tuple(f"{n}." for n, m in block.named_modules() if isinstance(m, Experts))
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and n.startswith(holders)}


class Passing:
    """The linears of a block's experts whose weights are not there: each is read where a forward comes to it.

    get: returns a tensor of the block by its name there. stay: whether a weight stays behind the forward, for others to
    come by, until `only` others are wanted. A context manager; copies of the block that are made within are served too.
    """

    def __init__(self, block: nn.Module, get: Callable[[str], Tensor]) -> None:
        self._linears = {n: m for n, m in in_experts(block).items() if m.weight.is_meta}
        self._get, self.stay = get, False
        self._there: dict[str, list[nn.Linear]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, linear in self._linears.items():
            self._hooks.append(linear.register_forward_pre_hook(self._arriving(name)))
            self._hooks.append(linear.register_forward_hook(lambda *_: self._left()))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.only(())

    def put(self, name: str, weight: Tensor) -> None:
        """Put a weight in place, where it is one that is read on arrival."""
        if name in self._linears:
            self._fill(name, self._linears[name], weight)

    def only(self, names: Sequence[str]) -> None:
        """Drop all weights but those of some linears."""
        for name in self._there.keys() - set(names):
            for linear in self._there.pop(name):
                for leaf, p in linear.named_parameters():
                    setattr(linear, leaf, nn.Parameter(torch.empty_like(p, device="meta")))

    def _fill(self, name: str, linear: nn.Linear, weight: Tensor | None = None) -> None:
        linear.weight = nn.Parameter(self._get(f"{name}.weight") if weight is None else weight)
        if linear.bias is not None:
            linear.bias = nn.Parameter(self._get(f"{name}.bias"))
        self._there.setdefault(name, []).append(linear)

    def _arriving(self, name: str) -> Any:
        def hook(linear: nn.Linear, _args: tuple[Tensor, ...]) -> None:
            if linear.weight.is_meta:
                self._fill(name, linear)

        return hook

    def _left(self) -> None:
        if not self.stay:
            self.only(())


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block by name, but for those that choose experts, which stay float."""
    choosing = routers(block)
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and n not in choosing}


def check_routing(model: nn.Module, where: str) -> None:
    """Raise LlmqError, naming `where`, for a layer that routes a token to more experts than it has."""
    for name, experts in model.named_modules():
        if isinstance(experts, Experts):
            beside = model.get_submodule(name.rpartition(".")[0]).modules()
            several = [k for m in beside if isinstance(k := getattr(m, "top_k", None), int)]
            if several and max(several) > experts.num_experts:
                said = f"a token is sent to {max(several)} experts of {experts.num_experts}"
                raise LlmqError(f"{where}: {said}; correct it")


def routers(block: nn.Module) -> set[str]:
    """Return the linears of a block that choose experts or weigh what they say; no runtime packs them.

    They stand beside the experts, have an output for each of them or one in all, and are called router or gate.
    """
    found = set()
    for holder, experts in block.named_modules():
        if isinstance(experts, Experts):
            parent = holder.rpartition(".")[0]
            beside = block.get_submodule(parent)
            for name, module in beside.named_modules(prefix=parent):
                known = re.search(r"router|gate(?!_proj|_up)", name.removeprefix(parent))
                outputs = isinstance(module, nn.Linear) and module.out_features in (1, experts.num_experts)
                if known and outputs and not name.startswith(f"{holder}."):
                    found.add(name)
    return found


def apart(tensor: str, model_type: object, method: str) -> list[Limit]:
    """Return who reads experts that are written one by one in a format, where a model's own checkpoints have `tensor`.

    Of some types vLLM loads them as llm-compressor writes them.
    """
    if method == "compressed-tensors" and str(model_type).startswith(_READ_APART):
        return []
    say = (
        f"checkpoints of {model_type} hold all experts of a layer in one tensor ({tensor}); they are written one by "
        "one, as only llmq (llmq.load, register()) reads them for this model_type"
    )
    return [Limit(say, refuses=tuple(RUNTIMES))]
