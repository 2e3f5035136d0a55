"""What a forward of a block holds in memory, found by running it on tensors without values (torch's meta device).

    found = footprints(skeleton, 2048)[0]           block 0, one sequence of 2048 tokens
    found.at[("mlp.down_proj",)]                    bytes of a batch that is suspended there, what entered included

The block is transformers' own, so that a family needs no formula: of a Llama it comes out that a batch before `o_proj`
still holds its queries, keys and values. Only headers are read. Experts are called on an even share of the tokens.
Not here: what a run holds besides, and its peak (pipeline/memory.py).
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llmq.checkpoint.source import View
from llmq.model.ends import embed
from llmq.model.experts import Experts, linears_of
from llmq.model.lanes import Call, run
from llmq.model.producers import structure
from llmq.model.skeleton import Skeleton

_META, _CPU = torch.device("meta"), torch.device("cpu")
_UNEVEN = 4  # times the even share of tokens that an expert is given


class Footprint(NamedTuple):
    """Bytes that one sequence takes in a block, beside the weights; what entered the block is part of each.

    at: what is held when the linears of a site are called, by their names, in call order.
    most: the most at any time. backward: the most where gradients are wanted.
    left: what stays in the objects that the block is called with, such as keys and values for later blocks.
    """

    at: dict[tuple[str, ...], int]
    most: int
    backward: int
    left: int


class Entered(NamedTuple):
    """What one sequence takes before block 0: its hidden states, and the arguments of all calls, shared by blocks."""

    hidden: int
    calls: int


def footprints(skeleton: Skeleton, tokens: int, *, gradients: bool = False) -> tuple[Entered, list[Footprint]]:
    """Return what one sequence of so many tokens takes before the blocks, and in each of them.

    gradients: whether `backward` is found too; it is 0 else.
    """
    blank = copy.copy(skeleton)
    blank.source = _Blank(skeleton.source)
    known: dict[Any, Footprint] = {}
    with torch.no_grad():
        (entered,), (calls,) = embed(blank, [torch.zeros(1, tokens, dtype=torch.int64)], _CPU)
        sizes = Entered(entered.nbytes, sum(t.nbytes for t in _distinct(calls)))
        hidden, calls = tree_map(lambda x: x.to(_META) if isinstance(x, Tensor) else x, (entered, list(calls)))
        for i, block in enumerate(blank.blocks):
            if (kind := structure(block)) not in known:
                with blank.loaded(i, _META), _even_experts(block):
                    backward = _backward(block, hidden, calls[i]) if gradients else 0
                    known[kind] = _forward(block, hidden, calls[i])._replace(backward=backward)
    return sizes, [known[structure(block)] for block in blank.blocks]


def _forward(block: nn.Module, hidden: Tensor, call: Call) -> Footprint:
    seen: list[tuple[weakref.ref[Tensor], int, list[str]]] = []  # activations, and the linears that read each

    def note(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        names = next((names for x, _, names in seen if x() is args[0]), None)
        if names is None:
            seen.append((weakref.ref(args[0]), held.now, [name]))
        else:
            names.append(name)

    with ExitStack() as stack:
        for name, linear in linears_of(block).items():
            stack.callback(linear.register_forward_pre_hook(partial(note, name)).remove)
        held = _Held((*block.parameters(), *block.buffers(), *_distinct(call)))
        stack.enter_context(_Fused())
        with held:
            held.count(hidden)
            out = run(block, hidden, call)
        del out
        at = {tuple(names): now for _, now, names in seen}
        return Footprint(at, held.most, 0, held.now - hidden.nbytes)


def _backward(block: nn.Module, hidden: Tensor, call: Call) -> int:
    """Return the most that a forward holds which keeps what the gradient by its input needs, and then takes that."""
    held = _Held((*block.parameters(), *block.buffers(), *_distinct(call)))
    with torch.enable_grad(), _Fused(), held:
        x = hidden.detach().requires_grad_()
        held.count(x)
        out = run(block, x, call)
        torch.autograd.grad(out, x, torch.empty_like(out))
    return held.most


class _Blank(View):
    """A checkpoint of zeros that takes no memory."""

    def get(self, name: str) -> Tensor:
        """Return zeros of a tensor's shape, all of them one and the same."""
        return torch.zeros((), dtype=self.dtype_of(name)).expand(self.shape_of(name))


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that come and go. free: those that are not counted."""

    def __init__(self, free: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes = {_key(t): 0 for t in free}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count a tensor until its storage goes."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Fused(TorchFunctionMode):
    """Attention as kernels on real devices compute it: without a matrix of all products of queries and keys.

    Heads whose values are of another width than their keys have no such kernel on a CPU; those products are counted.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].shape[-1] == args[2].shape[-1]:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
        out = q_BHTD.new_empty(q_BHTD.transpose(1, 2).shape).transpose(1, 2)
        ctx.save_for_backward(q_BHTD, k_BHTD, v_BHTD, out)
        return out

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def _even_experts(block: nn.Module) -> Iterator[None]:
    """Have the experts of a block called on as many tokens each, whatever their router says."""
    layers: list[Any] = [m for m in block.modules() if isinstance(m, Experts)]
    for layer in layers:
        layer.forward = partial(_even, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _even(layer: Experts, hidden: Tensor, index_Tk: Tensor | None = None, *_weights: Tensor) -> Tensor:
    """Hold what `Experts.forward` does: where the tokens of all experts lie, the sum of outputs, one expert at work.

    And what enters the down projections of a round of experts.
    """
    rows = len(hidden) if index_Tk is None else index_Tk.numel()
    routed = hidden.new_empty(2, rows, dtype=torch.int64)
    even = len(hidden) if layer.every else -(-rows // layer.num_experts)
    share = min(len(hidden), _UNEVEN * even)
    out, experts = torch.zeros_like(hidden), list(layer.experts())
    for some in layer.rounds():
        inner = [layer._inner(experts[e], hidden.new_empty(share, hidden.shape[-1])).shape[-1] for e in some]
        entering = hidden.new_empty(even * len(some), inner[0])
        for e in some:
            layer._outer(experts[e], hidden.new_empty(share, inner[0]))
        del entering
    del routed
    return out


def _distinct(values: Any) -> list[Tensor]:
    """Return the tensors in arguments, one for each memory that they lie in."""
    return list({_key(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())
