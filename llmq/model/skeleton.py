"""A transformers model without weights, of which one decoder block at a time is filled.

    skeleton = Skeleton(Source(path), torch.float32)      # parameters on meta: a 70B model takes no memory
    with skeleton.loaded(3, device) as block:             # block 3 as transformers runs it; dropped on leaving
        ...

Not here: what lies before and behind the blocks (ends.py), what the batches do inside one (lanes.py), which of its
linears share an input (sites.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq import aside
from llmq.checkpoint import Source
from llmq.checkpoint.names import own_head, settle
from llmq.heap import trim
from llmq.model.config import head_dim
from llmq.model.experts import check_routing, in_experts, linears_of
from llmq.model.pretrained import blank_model, foreign, model_config, shut
from llmq.model.sites import refuse_other_matrices
from llmq.model.tail import Tail, behind
from llmq.types import LlmqError

Read = dict[str, Tensor]
"""What was read of a block, by the names there."""


class Skeleton:
    """A transformers model without weights (parameters on meta, buffers real), and where its blocks are.

    prefix: the name of the block list, e.g. `model.layers`, or `model.language_model.layers` where a model that reads
    images wraps a language model. config: transformers' of the whole; text: its part for the language model.
    The source gets the model's names, and an own head where its config ties one (`names.settle`, `own_head`).
    Raises LlmqError for an architecture that transformers does not know, that has no list of decoder blocks or matrices
    outside `nn.Linear` in them, and for every tensor that is missing or has another shape.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype, self.stored_dtype = source, dtype, source.dtype
        self.config: Any = model_config(source)
        blank = blank_model(source, self.config)
        self.text: Any = self.config.get_text_config()
        depth = getattr(self.text, "num_hidden_layers", None)
        decoder = f"{_name_in(blank, blank.get_decoder())}."
        lists = [(n, m) for n, m in blank.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        lists = [(n, m) for n, m in lists if n.startswith(decoder)] or lists
        if not lists:
            raise LlmqError(f"{source.path}: no list of {depth} decoder blocks; only decoder-only models are quantized")
        self.prefix, blocks = lists[0]
        for i, block in enumerate(blocks):
            refuse_other_matrices(block, f"{self.prefix}.{i}")
        check_routing(blank, f"{source.path}/config.json")
        settle(source, blank)
        if own_head(source, blank):
            source.config["tie_word_embeddings"] = self.config.tie_word_embeddings = False
        self.model: Any = blank_model(source, self.config, buffers=True)
        self.blocks: Any = self.model.get_submodule(self.prefix)

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield every linear of every block by its full name, but for those that choose experts."""
        for i, block in enumerate(self.blocks):
            yield from ((self.full_name(i, name), module) for name, module in linears_of(block).items())

    def full_name(self, i: int, name: str) -> str:
        """Return the full name of what block `i` calls so; the one behind the last has a `norm` and a `head`."""
        if i < len(self):
            return f"{self.prefix}.{i}.{name}"
        module, dot, local = name.partition(".")
        real = {"norm": self.final_norm, "head": self.name_of(self.model.get_output_embeddings())}
        return f"{real.get(module, module)}{dot}{local}"

    @cached_property
    def final_norm(self) -> str:
        """The name of the norm between the last block and the head. Raises LlmqError where other things run there."""
        where = f"{self.source.path}/config.json (model_type {self.config.model_type!r})"
        with foreign(where), shut():
            found = behind(self.model, self.prefix)
        if len(found) != 1:
            raise LlmqError(
                f"{where}: between the last block and the head runs {', '.join(found) or 'nothing'}, not one norm "
                "alone; leave the head float (no --lm-head) and the residual stream as it is"
            )
        return found[0]

    def tensor(self, i: int, name: str, device: torch.device) -> Tensor:
        """Return a tensor of block `i` by its name there, as it is computed with."""
        return self.source.get(self.full_name(i, name)).to(device, self.dtype)

    @contextmanager
    def loaded(
        self, i: int, device: torch.device, *, experts: bool = True, read: Read | None = None
    ) -> Iterator[nn.Module]:
        """Yield block `i` with its weights in memory; they are dropped on leaving.

        One behind the last is what follows the blocks (`Tail`), whose head keeps no weight: nothing runs through it.
        experts: whether those of experts are read too, or left to who needs one (`Passing`). read: what was read of the
        block before (`reads`), which is used up.
        """
        tail = i == len(self)
        filled, name = self._module(i), self._place(i)
        tensors = self._tensors(i, experts) if read is None else _drained(read)
        on_gpu = device.type == "cuda"  # then the copy need not be waited for, and a change of dtype is the GPU's
        _fill(filled, {n: t.to(device, self.computed_in(f"{name}.{n}"), non_blocking=on_gpu) for n, t in tensors})
        computed = _computed_buffers(filled)
        for owner, leaf, tensor in computed:
            setattr(owner, leaf, tensor.to(device))
        try:
            yield Tail(filled, self.model.get_output_embeddings()) if tail else filled
        finally:
            filled.to("meta")
            for owner, leaf, tensor in computed:  # a block may be loaded again
                setattr(owner, leaf, tensor)
            trim()

    def reads(self, blocks: Iterable[int], device: torch.device, *, experts: bool = True) -> Iterator[Read | None]:
        """Yield what `loaded` is to be given of these blocks, each read while the one before is worked on.

        None where that does not pay: a block more would be in memory.
        """
        if not aside.pays(device):
            return (None for _ in blocks)
        return aside.ahead(partial(self._read, device, experts), blocks)

    def _read(self, device: torch.device, experts: bool, i: int) -> Read:
        """Return the tensors of block `i` by their names there, as they are stored, in the host's memory."""
        return {n: aside.pinned(t, device) for n, t in self._tensors(i, experts)}

    def _tensors(self, i: int, experts: bool) -> Iterator[tuple[str, Tensor]]:
        block, name = self._module(i), self._place(i)
        left = {} if experts else in_experts(block)
        for n in block.state_dict():
            if n.rpartition(".")[0] not in left:
                yield n, self.source.get(f"{name}.{n}")

    def _module(self, i: int) -> nn.Module:
        """Return block `i`; of the one behind the last, what of it is read: the final norm."""
        found: nn.Module = self.model.get_submodule(self.final_norm) if i == len(self) else self.blocks[i]
        return found

    def _place(self, i: int) -> str:
        return self.final_norm if i == len(self) else f"{self.prefix}.{i}"

    def computed_in(self, name: str) -> torch.dtype | None:
        """Return the dtype that a tensor of the checkpoint is computed in, None for the one that it is stored in."""
        return self.dtype

    def filled(self, device: torch.device) -> Any:
        """Return the whole model with its weights in memory, for good: of a skeleton that is used for nothing else."""
        state = {n: self.source.get(n).to(device, self.dtype) for n in self.model.state_dict() if n in self.source}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        return self.model.to(device)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head. Raises LlmqError where they differ from block to block."""
        sizes = {self.head_dim_of(i) for i in range(len(self))}
        if len(sizes) > 1:
            few = " and ".join(map(str, sorted(sizes)))
            raise LlmqError(f"heads of {few} channels in model_type {self.config.model_type!r}; leave rotate out")
        return sizes.pop()

    def head_dim_of(self, i: int) -> int:
        """Return the channels of one attention head of block `i`."""
        return head_dim(self.text, i)

    def name_of(self, module: nn.Module | None) -> str:
        """Return the full name of a module of the model; "lm_head" where there is none."""
        return _name_in(self.model, module) or "lm_head"

    def outside(self) -> list[str]:
        """Return the checkpoint's tensors that belong to no block."""
        blocks = tuple(f"{self.prefix}.{i}." for i in range(len(self)))
        return [n for n in self.source.names() if not n.startswith(blocks)]

    def embeddings(self) -> list[str]:
        """Return the names of all embeddings."""
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)]

    def around(self) -> list[tuple[str, nn.Module]]:
        """Return the modules of the language model that belong to no block, by name: not those that read images."""
        modules = [(n, m) for n, m in self.model.named_modules() if not f"{n}.".startswith(f"{self.prefix}.")]
        if self.text is self.config:
            return modules
        of_language = {self.model.get_output_embeddings(), *self.model.get_decoder().modules()}
        return [(n, m) for n, m in modules if m in of_language]


def _name_in(model: nn.Module, module: nn.Module | None) -> str:
    """Return the full name of a module of a model; "" where it is not there, or the model itself."""
    return next((n for n, m in model.named_modules() if m is module), "")


def _drained(read: Read) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors and forget them one by one."""
    while read:
        yield read.popitem()


def _fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module its parameters and buffers; `load_state_dict` would compare every name with every submodule's."""
    modules = dict(module.named_modules())
    for name, tensor in state.items():
        parent, _, leaf = name.rpartition(".")
        weight = leaf in modules[parent]._parameters
        setattr(modules[parent], leaf, nn.Parameter(tensor) if weight else tensor)


def _computed_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the buffers that no checkpoint holds: the modules that have them, their names there, and themselves."""
    return [(m, leaf, m.get_buffer(leaf)) for m in module.modules() for leaf in m._non_persistent_buffers_set]
