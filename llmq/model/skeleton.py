"""A transformers model without weights, of which one decoder block at a time is filled.

    skeleton = Skeleton(Source(path), torch.float32)      # parameters on meta: a 70B model takes no memory
    with skeleton.loaded(3, device) as block:             # block 3 as transformers runs it; dropped on leaving
        ...

Not here: what the batches do inside a block (lanes.py), which of its linears share an input (sites.py).
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint import Source
from llmq.checkpoint.names import own_head, settle
from llmq.model.config import head_dim
from llmq.model.lanes import Call
from llmq.model.pretrained import blank_model, model_config
from llmq.model.sites import refuse_other_matrices
from llmq.types import LlmqError


class Skeleton:
    """A transformers model without weights (parameters on meta, buffers real), and where its blocks are.

    prefix: the name of the block list, e.g. `model.layers`.
    The source gets the model's names, and an own head where its config ties one (`names.settle`, `own_head`).
    Raises LlmqError for an architecture that transformers does not know, that has no list of decoder blocks or weights
    outside `nn.Linear` in them, and for every tensor that is missing or has another shape.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype, self.stored_dtype = source, dtype, source.dtype
        self.config: Any = model_config(source)
        blank = blank_model(source, self.config)
        depth = getattr(self.config, "num_hidden_layers", None)
        lists = [(n, m) for n, m in blank.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not lists:
            raise LlmqError(f"{source.path}: no list of {depth} decoder blocks; only decoder-only models are quantized")
        self.prefix, blocks = lists[0]
        for i, block in enumerate(blocks):
            refuse_other_matrices(block, f"{self.prefix}.{i}")
        settle(source, blank)
        if own_head(source, blank):
            source.config["tie_word_embeddings"] = self.config.tie_word_embeddings = False
        self.model: Any = blank_model(source, self.config, buffers=True)
        self.blocks: Any = self.model.get_submodule(self.prefix)

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield every linear of every block by its full name."""
        for i, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    yield self.full_name(i, name), module

    def full_name(self, i: int, name: str) -> str:
        """Return the full name of what block `i` calls so; the one behind the last has a `norm` and a `head`."""
        if i < len(self):
            return f"{self.prefix}.{i}.{name}"
        module, dot, local = name.partition(".")
        real = {"norm": self.final_norm, "head": self.name_of(self.model.get_output_embeddings())}
        return f"{real.get(module, module)}{dot}{local}"

    @property
    def final_norm(self) -> str:
        """The name of the norm behind the blocks, in the models that have it there."""
        return f"{self.prefix.rpartition('.')[0]}.norm".lstrip(".")

    @contextmanager
    def loaded(self, i: int, device: torch.device) -> Iterator[nn.Module]:
        """Yield block `i` with its weights in memory; they are dropped on leaving.

        One behind the last is what follows the blocks (`Tail`), whose head keeps no weight: nothing runs through it.
        """
        tail = i == len(self)
        name = self.final_norm if tail else f"{self.prefix}.{i}"
        filled = self.model.get_submodule(name)
        wanted = [n for n, _ in filled.named_parameters()] + [n for n, _ in _saved_buffers(filled)]
        state = {n: self.source.get(f"{name}.{n}").to(device, self.dtype) for n in wanted}
        filled.load_state_dict(state, strict=True, assign=True)
        filled.to(device)  # buffers that are not saved
        try:
            yield Tail(filled, self.model.get_output_embeddings()) if tail else filled
        finally:
            filled.to("meta")
            _trim_heap()

    def filled(self, device: torch.device) -> Any:
        """Return the whole model with its weights in memory, for good: of a skeleton that is used for nothing else."""
        state = {n: self.source.get(n).to(device, self.dtype) for n in self.model.state_dict() if n in self.source}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        return self.model.to(device)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return head_dim(self.config)

    def name_of(self, module: nn.Module | None) -> str:
        """Return the full name of a module of the model; "lm_head" where there is none."""
        return next((n for n, m in self.model.named_modules() if m is module), "lm_head")

    def outside(self) -> list[str]:
        """Return the checkpoint's tensors that belong to no block."""
        return [n for n in self.source.names() if not n.startswith(self.prefix + ".")]


class Tail(nn.Module):
    """What follows the last block, as one more block: the final norm, and the output head that reads it."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.norm(hidden))
        return out


def _trim_heap() -> None:
    """Hand freed pages back to the system, where the C library can: glibc keeps them otherwise, and peaks creep up.

    A block frees hundreds of middling tensors among long-lived ones; without this, 22 blocks of 44 M weights peaked
    0.7 GB above 6 of them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = {n for n, _ in module.named_parameters()}
    return [(n, t) for n, t in module.state_dict().items() if n not in parameters]


class _Reached(Exception):  # noqa: N818, an arrival, not an error
    """Ends the recording forward: no block is needed beyond the last."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and hands the hidden states through."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list: not a submodule
        self.last = last
        self.entered = torch.empty(0)
        self.call: Call = ((), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)  # transformers reads attributes such as attention_type

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.entered, self.call = hidden, (args, kwargs)
        if self.last:
            raise _Reached
        return hidden


def embed(
    skeleton: Skeleton, batches: Sequence[Tensor], device: torch.device
) -> tuple[list[Tensor], list[Sequence[Call]]]:
    """Return the hidden states that enter block 0, per batch, and the other arguments of every block's call.

    batches: of tokens, int64 `[B, S]`, no padding. The second list is indexed `[batch][block]`; batches of one shape
    share the tensors that are equal (masks, rotary tables). Only what lies before the blocks is loaded, in its stored
    dtype.
    """
    model, blocks = skeleton.model, skeleton.blocks
    parent, _, leaf = skeleton.prefix.rpartition(".")
    owner = model.get_submodule(parent)
    hidden: list[Tensor] = []
    calls: list[Sequence[Call]] = []
    first: dict[torch.Size, Sequence[Call]] = {}
    with outside_loaded(skeleton, device):
        for ids in batches:
            recorders = [_Recorder(b, i == len(blocks) - 1) for i, b in enumerate(blocks)]
            setattr(owner, leaf, nn.ModuleList(recorders))
            try:
                model(input_ids=ids.to(device), use_cache=False)
            except _Reached:
                hidden.append(recorders[0].entered)  # some models take apart what a block returns
            finally:
                setattr(owner, leaf, blocks)
            own = [r.call for r in recorders]
            calls.append(_sharing(own, first.setdefault(ids.shape, own), {}))
    return hidden, calls


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


@contextmanager
def outside_loaded(skeleton: Skeleton, device: torch.device, *, head: bool = False) -> Iterator[None]:
    """Load everything that is no block: with the head, or all but it.

    Embeddings stay in their stored dtype, their outputs are cast; all else computes in the skeleton's.
    """
    output = skeleton.model.get_output_embeddings()
    modules = [
        (n, m)
        for n, m in skeleton.model.named_modules()
        if not f"{n}.".startswith(f"{skeleton.prefix}.") and (head or m is not output)
    ]
    tied = f"{skeleton.name_of(skeleton.model.get_input_embeddings())}.weight"
    for name, module in modules:
        for leaf, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            if module is output:
                tensor = skeleton.source.get(full if full in skeleton.source else tied).to(device, skeleton.dtype)
            else:
                dtype = None if isinstance(module, nn.Embedding) else skeleton.dtype
                tensor = skeleton.source.get(full).to(device, dtype)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))
    embeddings = skeleton.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _m, _a, out: out.to(skeleton.dtype))
    try:
        yield
    finally:
        hook.remove()
        for _, module in modules:
            for leaf, p in module.named_parameters(recurse=False):
                setattr(module, leaf, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))
