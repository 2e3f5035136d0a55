"""A loaded block and a few tokens, run again and again with something changed on the way.

    trial = Trial(block, sites, hidden, call)
    trial.run({"v_proj": lambda out: 2 * out}).inputs       what the sites read then, [T, K] each

Not here: what is asked of a block this way (producers.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmq.model.experts import linears_of
from llmq.model.lanes import Call
from llmq.types import Site

OFFSETS = {"w": 0.0, "1 + w": 1.0}
"""The gain of a norm beyond what it stores, by how it stores it."""
Change = Callable[[Tensor], Tensor]
_CLOSE = 1e-3  # of the largest value, where a test is not exact


class Pass(NamedTuple):
    """What a forward gave: each tensor that the block returned or left in its arguments, the sites' inputs `[T, K]`."""

    returned: list[Tensor]
    inputs: list[Tensor]


class Trial:
    """A block with what it is called with, for a few tokens `[1, T, H]`.

    Where a norm or a linear puts out 0 for every token (a gain of 0, a row of zeros), something is added to the channel
    in all runs: what reads it would not be seen else, and does not depend on the weights.
    """

    def __init__(self, block: nn.Module, sites: Sequence[Site], hidden: Tensor, call: Call) -> None:
        self.block, self.sites, self.hidden, self.call = block, sites, hidden, call
        self.modules: dict[str, Any] = dict(block.named_modules())
        self.linears = set(linears_of(block))
        self.norms = {n for n, m in self.modules.items() if _has_gain(m)}
        self._opening: dict[str, Change] = {}
        self._opening = self._openings()
        self.as_it_is = self.run()

    def _openings(self) -> dict[str, Change]:
        """Return what opens the channels that are 0, by the module that puts them out."""
        found: dict[str, Change] = {}

        def look(name: str) -> Change:
            def at(out: Tensor) -> Tensor:
                closed_N = out.abs().flatten(0, -2).amax(0) == 0 if out.numel() else out.new_zeros(1).bool()
                if closed_N.any():
                    index = torch.arange(len(closed_N), device=out.device)
                    found[name] = _plus(closed_N * (1 + index % 7) * (out.float().std() / 4 or 1))
                return out

            return at

        self.run({name: look(name) for name in self.linears | self.norms})
        return found

    def width(self, name: str) -> int:
        """Return the output channels of a norm or a linear."""
        return len(self.modules[name].weight)

    def run(self, outputs: Mapping[str, Change] | None = None, inputs: Mapping[str, Change] | None = None) -> Pass:
        """Run the block, with the outputs of some modules and the inputs of some linears changed."""
        seen: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for name, change in (*self._opening.items(), *(outputs or {}).items()):
                hooks.callback(self.modules[name].register_forward_hook(_on_output(change)).remove)
            for i, site in enumerate(self.sites):
                hooks.callback(self.modules[site.linears[0]].register_forward_pre_hook(_into(seen, i)).remove)
            for name, change in (inputs or {}).items():
                hooks.callback(self.modules[name].register_forward_pre_hook(_on_input(change)).remove)
            out = self.block(self.hidden, *self.call[0], **self.call[1])
        return Pass([t.clone() for t in _tensors((out, self.call))], [seen[i] for i in range(len(self.sites))])

    @cached_property
    def exact(self) -> Trial:
        """The same in float32."""
        if self.hidden.dtype == torch.float32:
            return self
        call = _in_float32(self.call)
        return Trial(copy.deepcopy(self.block).float(), self.sites, self.hidden.float(), call)

    @cached_property
    def _calls(self) -> dict[str, list[tuple[Any, Any, Any]]]:
        """How the float32 block calls its modules: arguments, keywords and what they return, by name."""
        calls: dict[str, list[tuple[Any, Any, Any]]] = {}

        def watch(name: str) -> Any:
            return lambda _m, args, kwargs, out: calls.setdefault(name, []).append((args, kwargs, out))

        with ExitStack() as hooks:
            for name, module in self.exact.modules.items():
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
            self.exact.run()
        return calls

    def gain(self, name: str) -> str:
        """Return how a norm stores its gain, as `stored_gain` does."""
        args, kwargs, _ = self._calls[name][0]
        return stored_gain(self.exact.modules[name], args, kwargs)

    def passes_basis(self, name: str, heads: Tensor, i: int) -> bool:
        """Say whether another basis of the channels `heads[h, d]` of a linear, alike in each head, reaches site `i`."""
        d = heads.shape[1]
        Q_dd = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0].to(self.hidden.device)

        def turned(out: Tensor) -> Tensor:
            out = out.clone()
            out[..., heads] = out[..., heads] @ Q_dd
            return out

        was, now = self.exact.as_it_is.inputs[i], self.exact.run({name: turned}).inputs[i]
        return _close(now, (was.unflatten(-1, (-1, d)) @ Q_dd).flatten(-2))

    def parent(self, linears: Sequence[str]) -> str:
        """Return the smallest module around linears that is called once and returns a tensor; "" is the block."""
        if len(linears) == 1:
            return linears[0]
        around = [n.split(".")[:-1] for n in linears]
        while not all(names[: len(around[0])] == around[0] for names in around) or not self._called_once(around[0]):
            around[0] = around[0][:-1]
        return ".".join(around[0])

    def _called_once(self, path: Sequence[str]) -> bool:
        calls = self._calls.get(".".join(path), [])
        return not path or (len(calls) == 1 and isinstance(_first(calls[0][2]), Tensor))


def stored_gain(norm: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return how a float32 norm stores its gain, "w" or "1 + w"; "" where neither can be scaled as its output is."""
    factor_N = 2 ** (torch.arange(len(norm.weight), device=norm.weight.device) % 5 / 2 - 1)
    wanted = norm(*args, **kwargs) * factor_N
    for gain, offset in OFFSETS.items():
        scaled = copy.deepcopy(norm)
        scaled.weight.data = (norm.weight + offset) * factor_N - offset
        if getattr(norm, "bias", None) is not None:
            scaled.bias.data = norm.bias * factor_N
        if _close(scaled(*args, **kwargs), wanted):
            return gain
    return ""


def _has_gain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) and out else out


def _on_output(change: Change) -> Any:
    return lambda _module, _args, out: change(out) if isinstance(out, Tensor) else None


def _on_input(change: Change) -> Any:
    return lambda _module, args: (change(args[0]), *args[1:])


def _plus(more_N: Tensor) -> Change:
    return lambda out: out + more_N.to(out)


def _into(seen: dict[int, Tensor], i: int) -> Any:
    return lambda _module, args: seen.update({i: args[0].reshape(-1, args[0].shape[-1])})


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _in_float32(value: Any) -> Any:
    """Return arguments with every float tensor in them in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float32(v) for v in value)
    return {k: _in_float32(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _close(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors agree, each channel within a thousandth of its largest value."""
    largest = b.abs().flatten(0, -2).amax(0) if b.numel() else b
    return bool(((a - b).abs() <= _CLOSE * largest + torch.finfo(b.dtype).tiny).all())
