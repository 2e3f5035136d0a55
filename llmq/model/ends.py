"""What lies before the blocks of a model and behind them: from tokens to hidden states, from hidden states to logits.

    hidden, calls = embed(skeleton, [ids], device)      # what enters block 0, and what each block is called with
    with outside_loaded(skeleton, device, head=True):
        logits_BSV = logits(skeleton, hidden_BSH)       # of what leaves the last block

transformers' own forward runs, with the blocks taken out: whatever a model does around them is done.
Not here: the blocks (skeleton.py), what happens inside one (lanes.py).
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.lanes import Call
from llmq.model.skeleton import Skeleton
from llmq.model.standing import Given, Reached, Recorder, standing_in


def embed(
    skeleton: Skeleton, batches: Iterable[Tensor], device: torch.device
) -> tuple[list[Tensor], list[Sequence[Call]]]:
    """Return what `entering` yields, as two lists; the second is indexed `[batch][block]`."""
    hidden, calls = zip(*entering(skeleton, batches, device), strict=True)
    return list(hidden), list(calls)


def entering(
    skeleton: Skeleton, batches: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Sequence[Call]]]:
    """Yield, batch by batch, the hidden states that enter block 0 and the other arguments of every block's call.

    batches: of tokens, int64 `[B, S]`, no padding; those of one shape share the tensors that are equal (masks, rotary
    tables). Only what lies before the blocks is loaded, in its stored dtype.
    """
    blocks = skeleton.blocks
    first: dict[torch.Size, Sequence[Call]] = {}
    with outside_loaded(skeleton, device):
        for ids in batches:
            recorders = [Recorder(b, i == len(blocks) - 1) for i, b in enumerate(blocks)]
            try:
                with standing_in(skeleton.model, skeleton.prefix, recorders):
                    skeleton.model(input_ids=ids.to(device), use_cache=False)
            except Reached:
                own = [r.call for r in recorders]
                yield recorders[0].entered, _sharing(own, first.setdefault(ids.shape, own), {})


def _sharing(new: Any, old: Any, seen: dict[tuple[int, int], Any]) -> Any:
    """Return arguments with every tensor that equals the old one replaced by it; others, and objects, are kept.

    seen: what was compared before, by identity: blocks that were called with one object still are.
    """
    key = (id(new), id(old))
    if new is old or type(new) is not type(old):
        return new
    if key not in seen:
        found = new
        if isinstance(new, Tensor):
            found = old if new.shape == old.shape and torch.equal(new, old) else new
        elif type(new) in (list, tuple) and len(new) == len(old):
            found = type(new)(_sharing(a, b, seen) for a, b in zip(new, old, strict=True))
        elif type(new) is dict:
            found = {k: _sharing(v, old.get(k), seen) for k, v in new.items()}
        seen[key] = found
    return seen[key]


def of_their_own(calls: Sequence[Call]) -> Sequence[Call]:
    """Return the calls of a batch with its objects copied, so that what blocks leave in them stays apart.

    Gemma 4's blocks hand keys and values on in one that all are called with. Tensors are shared.
    """
    seen: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        if type(value) is dict:
            return {k: copied(v) for k, v in value.items()}
        if isinstance(value, Tensor):
            return value
        if id(value) not in seen:
            seen[id(value)] = copy.copy(value)
        return seen[id(value)]

    return [copied(call) for call in calls]


def logits(skeleton: Skeleton, hidden_BSH: Tensor) -> Tensor:
    """Return the logits `[B, S, V]` of hidden states behind the last block, of a skeleton with `outside_loaded`."""
    ids = torch.zeros(hidden_BSH.shape[:2], dtype=torch.int64, device=hidden_BSH.device)  # which nothing reads
    with standing_in(skeleton.model, skeleton.prefix, [Given(skeleton.blocks[-1], hidden_BSH)]):
        found: Tensor = skeleton.model(input_ids=ids, use_cache=False).logits
    return found.as_subclass(Tensor)


@contextmanager
def outside_loaded(skeleton: Skeleton, device: torch.device, *, head: bool = False) -> Iterator[None]:
    """Load what of the language model is no block: with the head, or all but it.

    Embeddings stay in their stored dtype and their outputs are cast, so that no large copy is made; the rest computes
    in the skeleton's.
    """
    output = skeleton.model.get_output_embeddings()
    modules = [(n, m) for n, m in skeleton.around() if head or m is not output]
    tied = f"{skeleton.name_of(skeleton.model.get_input_embeddings())}.weight"
    hooks, filled, read = [], list[tuple[nn.Module, str]](), dict[str, Tensor]()
    for name, module in modules:
        stored = isinstance(module, nn.Embedding)
        for leaf, held in _own(module):
            full = f"{name}.{leaf}" if name else leaf
            full = tied if module is output and full not in skeleton.source else full
            if not held.is_meta:
                setattr(module, leaf, held.to(device))
                continue
            tensor = read[full] if full in read else skeleton.source.get(full).to(device)
            if full == tied:
                read[full] = tensor  # one copy for the embedding and the head, where they compute in one dtype
            tensor = tensor if stored else tensor.to(skeleton.computed_in(full))
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor)
            filled.append((module, leaf))
        if stored:
            hooks.append(module.register_forward_hook(lambda _m, _a, out: out.to(skeleton.dtype)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, leaf in filled:
            empty = torch.empty_like(getattr(module, leaf), device="meta")
            setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if leaf in module._parameters else empty)


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers of a module itself; weights are on meta, what it computes is real."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
