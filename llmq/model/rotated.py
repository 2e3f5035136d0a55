"""A checkpoint in another basis: the function is unchanged, the weights are turned as they are read.

heads     v = Q^T v (rows of each key-value head),   o = o Q (columns of each head), through attention, which mixes
          tokens and not channels.
residual  what reads the stream: W diag(g) R, the gain g of the norm before it folded in and set to 1; what writes it:
          R^T W; embedding E R, head W diag(g) R. An RMSNorm with gains of 1 commutes with R.

Linears whose producer is a norm as wide as the stream read it, others with as many rows as it has channels write it.
That is a claim, and `prove` tries it: block(h R) == block(h) R; what breaks it (norms behind the linears, or norms that
subtract a mean, or a router that reads the stream) is refused.
Not here: the bases (algorithms/rotate.py), the producers (producers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from llmq import registry
from llmq.checkpoint.source import View
from llmq.model.lanes import Call, run
from llmq.model.producers import entering, heads_of, of_blocks, structure
from llmq.model.skeleton import Skeleton
from llmq.model.trial import OFFSETS, stored_gain
from llmq.steps import Rotation
from llmq.types import LlmqError, Site

_CLOSE = 1e-3  # of what a block adds to the stream
_ROUNDED = 0.02  # of an embedding, which is stored in 16 bits again


@dataclass
class _Roles:
    """What the modules of a block have to do with the bases, by name.

    linears: all. values: the rows of a linear that make heads, `[heads, d]`. heads: linears that read these.
    reads: linears that read the stream, and the norm before them. norms: their gains beyond what they store.
    writes: linears that write the stream.
    """

    linears: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    norms: dict[str, float] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    writes: set[str] = field(default_factory=set)


def _roles(skeleton: Skeleton, block: nn.Module, sites: Sequence[Site]) -> _Roles:
    """Return the roles in a block, without weights, of these sites."""
    roles, width = _Roles(), skeleton.text.hidden_size
    for site in sites:
        shapes = {n: block.get_submodule(n).get_parameter("weight").shape for n in site.linears}
        by, K = site.producer, shapes[site.linears[0]][1]
        roles.linears |= set(site.linears)
        if by is not None and by.per_head:
            heads = heads_of(by.feeding(K), skeleton.head_dim)
            roles.values |= {} if heads is None else {by.module: heads}
            roles.heads |= set(site.linears)
        if by is not None and by.gain and by.rows is None and width == K:
            roles.norms[by.module] = OFFSETS[by.gain]
            roles.reads |= dict.fromkeys(site.linears, by.module)
        else:
            roles.writes |= {n for n, (N, _) in shapes.items() if width == N}
    return roles


class Rotated(View):
    """A checkpoint in another basis, each tensor turned as it is read: linears in float32, the others as stored.

    skeleton: of the checkpoint as it is. Q_dd, R_HH: the bases of a head and of the stream, None where it has none.
    Raises LlmqError for a stream to turn where the final norm is not known, where the checkpoint holds more than the
    language model, or where the head is tied and may not be untied.
    """

    def __init__(self, skeleton: Skeleton, step: Rotation) -> None:
        super().__init__(skeleton.source)
        self.skeleton, self.step = skeleton, step
        self.Q_dd, self.R_HH = step.rotate(skeleton.head_dim, skeleton.text.hidden_size)
        self._prefix = f"{skeleton.prefix}."
        self._embedding = f"{skeleton.name_of(skeleton.model.get_input_embeddings())}.weight"
        self._head = f"{skeleton.name_of(skeleton.model.get_output_embeddings())}.weight"
        if self.R_HH is not None:
            self._untie()

    def _untie(self) -> None:
        named, kind = registry.dump(self.step), self.skeleton.config.model_type
        if self.skeleton.text is not self.skeleton.config:
            raise LlmqError(
                f"{named}: what model_type {kind!r} sees in images would enter unturned; leave residual out"
            )
        if self._last_norm not in self:
            raise LlmqError(f"{named}: the final norm of model_type {kind!r} has no gain; leave residual out")
        if strangers := self._strangers():
            raise LlmqError(
                f"{named}: {strangers[0]} (of {len(strangers)} tensors beside the language model) read its residual "
                "stream, perhaps, and would have to turn with it; leave residual out"
            )
        if self._head not in self and not self.step.untie:
            size = self.sizes()[self._embedding]
            raise LlmqError(
                f"{named} unties the head of {self.path} from its embedding, which adds "
                f"{size / 1e6:.1f} MB; say so with untie=true, or leave residual out"
            )
        self.config |= {"tie_word_embeddings": False}
        self._entries.setdefault(self._head, self._entries[self._embedding])

    def _strangers(self) -> list[str]:
        """Return the tensors that belong neither to a block nor to what the language model has around these."""
        around = {n for n, _ in self.skeleton.around()}
        numbers = {str(i) for i in range(len(self.skeleton))}
        return [
            name
            for name in self.names()
            if name.rpartition(".")[0] not in around
            and not (name.startswith(self._prefix) and name.removeprefix(self._prefix).partition(".")[0] in numbers)
        ]

    @cached_property
    def roles(self) -> list[_Roles]:
        """The roles of the modules of every block."""
        found = of_blocks(self.skeleton, torch.device("cpu"))
        return [_roles(self.skeleton, block, f.sites) for block, f in zip(self.skeleton.blocks, found, strict=True)]

    @cached_property
    def _last_offset(self) -> float:
        """The gain of the final norm beyond what it stores."""
        with self.skeleton.loaded(len(self.skeleton), torch.device("cpu")) as tail, torch.no_grad():
            gain = stored_gain(tail.norm, (torch.randn(2, 9, self.skeleton.text.hidden_size),), {})
        if not gain:
            raise LlmqError(f"it is not known how {self._last_norm} stores its gain; leave residual out")
        return OFFSETS[gain]

    @cached_property
    def _last_norm(self) -> str:
        """The tensor that is the gain of the final norm."""
        return f"{self.skeleton.final_norm}.weight"

    def turned(self, stream: Tensor) -> Tensor:
        """Return the residual stream in the new basis."""
        return stream if self.R_HH is None else stream @ self.R_HH.to(stream)

    @property
    def last_gain(self) -> Tensor:
        """The gain of the final norm, float32 `[H]`."""
        return self.base.get(self._last_norm).float() + self._last_offset

    def get(self, name: str) -> Tensor:
        """Return one tensor, rotated."""
        tensor = self.base.get(name if name in self.base else self._embedding)  # a tied head is untied here
        if name.startswith(self._prefix):
            block, _, local = name.removeprefix(self._prefix).partition(".")
            return self._of_block(tensor, int(block), *local.rsplit(".", 1))
        if self.R_HH is None:
            return tensor
        if name == self._last_norm:
            return torch.full_like(tensor, 1 - self._last_offset)
        if name == self._head:
            tensor = tensor.float() * self.last_gain
        if name in (self._head, self._embedding):
            return (tensor.float() @ self.R_HH).to(self.dtype_of(name))
        return tensor

    def _of_block(self, tensor: Tensor, number: int, module: str, kind: str = "") -> Tensor:
        """Return a tensor of a block: the `kind` (weight or bias) of a module."""
        roles = self.roles[number] if number < len(self.roles) else _Roles()  # of what predicts further tokens
        if module in roles.norms and kind == "weight" and self.R_HH is not None:
            return torch.full_like(tensor, 1 - roles.norms[module])
        if module not in roles.linears:
            return tensor
        out = tensor.float()
        if self.Q_dd is not None and module in roles.values:  # rows of each head
            out = _turned_rows(out, roles.values[module], self.Q_dd)
        if self.Q_dd is not None and module in roles.heads and kind == "weight":  # columns of each head
            out = (out.reshape(len(out), -1, len(self.Q_dd)) @ self.Q_dd).reshape(out.shape)
        if self.R_HH is None:
            return out
        if module in roles.writes:
            return self.R_HH.T @ out
        if kind == "bias" or module not in roles.reads:
            return out
        norm = roles.reads[module]
        gain = self.base.get(f"{self._prefix}{number}.{norm}.weight").float() + roles.norms[norm]
        return (out * gain) @ self.R_HH


def _turned_rows(out: Tensor, heads: Tensor, Q_dd: Tensor) -> Tensor:
    """Return a weight `[N, K]` or a bias `[N]` with the rows `heads[h, d]` in another basis, alike in each head."""
    rows = out[heads]
    rows = (rows.reshape(*heads.shape, -1).mT @ Q_dd).mT.reshape(rows.shape)
    return out.index_copy(0, heads.flatten(), rows.flatten(0, 1))


def prove(skeleton: Skeleton, source: Rotated, device: torch.device) -> None:
    """Hold a model, whose source is rotated, against the checkpoint as it is, on a few tokens.

    Raises LlmqError where there is no head to turn, and where something does not compute what it did.
    """
    base, named = source.skeleton, registry.dump(source.step)
    if source.Q_dd is not None and not any(roles.values for roles in source.roles):
        raise LlmqError(f"{named}: nothing passes from a linear to another by heads in this model; leave heads out")

    def claim(what: str, got: Tensor, wanted: Tensor, of: Tensor, close: float) -> None:
        error = ((got - wanted).norm() / of.norm()).item()
        if not error < close:
            raise LlmqError(
                f"{named}: {what} of model_type {base.config.model_type!r} changes by {error:.2g} in another basis: a "
                "norm behind a linear or one that subtracts a mean, or something else than linears behind a norm that "
                "reads the residual stream; leave residual out"
            )

    with torch.no_grad():
        (hidden, calls), (entered, others) = entering(base, device), entering(skeleton, device)
        turned = source.turned(hidden)
        claim("what enters the blocks", entered, turned, turned, _ROUNDED)
        first = {structure(block): i for i, block in reversed([*enumerate(base.blocks)])}
        for i in sorted(first.values()):
            out, now = (
                _through(s, i, device, h, c[i]) for s, h, c in ((base, hidden, calls), (skeleton, turned, others))
            )
            claim(f"block {i}", now, source.turned(out), out - hidden, _CLOSE)
        if source.R_HH is not None:
            out, now = (_through(s, len(base), device, h) for s, h in ((base, hidden), (skeleton, turned)))
            claim("the final norm", now, source.turned(out / source.last_gain.to(device)), now, _CLOSE)


def _through(skeleton: Skeleton, i: int, device: torch.device, hidden: Tensor, call: Call = ((), {})) -> Tensor:
    """Return what block `i` makes of a few tokens, or the final norm behind the last."""
    with skeleton.loaded(i, device) as block:
        return run(block.get_submodule("norm") if i == len(skeleton) else block, hidden, call)
