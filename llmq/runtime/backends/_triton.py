"""What the Triton back-ends share: a kernel called with its bias, alone or for a site; its errors in a user's words.

A kernel's function is called as it is, and as an operator where torch.compile or fake tensors look on (llmq_kernels'
`linear`). Not here: which GPUs can run the kernels (llmq/gpu.py), what makes a site (runtime/joining.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from llmq.gpu import DEVICES
from llmq.runtime.backends import Prepacked
from llmq.types import LlmqError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class TritonPrepacked(Prepacked):
    """A weight that a kernel multiplies, adding the bias before it rounds; alone, or as a part of its site's.

    linear: what messages call it. site: what it is a part of, None where it is alone; place: as which.
    stack: llmq_kernels' function that makes one of the weights of a layer's experts, None where none does.
    """

    devices: ClassVar[frozenset[str]] = DEVICES
    linear: str
    site: Whole | None = None
    place: int
    stack: Callable[..., Any] | None = None
    _join: Callable[..., Any]

    @property
    @abstractmethod
    def packed(self) -> Any:
        """The weight as the kernel takes it, of the buffers that are here now."""

    @abstractmethod
    def multiply(self, x: Tensor, w: Any, bias: Tensor | None) -> Tensor:
        """Return `x @ W^T + bias` for a weight like `packed`. Raises KernelError where the kernel cannot take it."""

    @abstractmethod
    def kind(self) -> Hashable:
        """Return what weights of one activation must have in common to be multiplied as one, None for none."""

    def kind_of_expert(self) -> Hashable:
        """Return what the weights of a layer's experts must have in common, None for none."""
        return None if self.stack is None else self.kind()

    def entering(self, x: Tensor) -> Tensor:
        """Return what the kernel multiplies of an activation."""
        return x

    def multiply_experts(self, x: Tensor, w: Any, plan: Any, bias: Tensor | None) -> Tensor:
        """Return `[T, k, N]`, the product of `x` `[T, K]` and the weights of a layer's experts, as `stack` makes them.

        bias: `[E + 1, N]`. Raises KernelError where the kernel cannot take it.
        """
        from llmq_kernels import grouped

        return grouped.linear(self.entering(x), w, plan, bias)

    @abstractmethod
    def hold(self, w: Any) -> None:
        """Hold a weight for the kernel."""

    def join(self, members: Sequence[TritonPrepacked]) -> Any:
        """Return the weights of `members` as one, and make theirs parts of it."""
        whole, parts = self._join([m.packed for m in members])
        for member, part in zip(members, parts, strict=True):
            member.hold(part)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`. Raises LlmqError for activations other than float16, bfloat16 and float32."""
        return self.affine(x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Prepacked.affine`; the kernel adds the bias before it rounds."""
        check_dtype(self.linear, x)
        site = self.site
        try:
            if site is not None and (y := site.part(self, x, bias)) is not None:
                return y
            return self.multiply(x, self.packed, bias)
        except ValueError as e:
            reworded(self.linear, e)

    def leave(self) -> None:
        """See `Prepacked.leave`."""
        if self.site is not None:
            self.site.dissolve()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the buffers; what has moved is no part any more."""
        before = list(self._buffers.values())
        super()._apply(fn, recurse)
        if any(now is not was for now, was in zip(self._buffers.values(), before, strict=True)):
            self.leave()
        return self


def check_dtype(linear: str, x: Tensor) -> None:
    """Raise LlmqError, naming a linear, for an activation that no kernel takes."""
    if x.dtype not in _FLOATS:
        raise LlmqError(
            f"{linear}: its activations are {x.dtype}, and a GPU's kernels take float16, bfloat16 and "
            "float32; load the model with dtype=torch.bfloat16, or with backend='reference'"
        )


def reworded(linear: str, e: ValueError) -> NoReturn:
    """Raise what a kernel says against a linear as an LlmqError, and any other error as it is."""
    from llmq_kernels.errors import KernelError

    if not isinstance(e, KernelError):
        raise e
    raise LlmqError(f"{linear}: {e} (backend='reference' does without the kernel)") from e


class Whole:
    """Weights in one memory, of which each of `members` has its part, until one of them leaves."""

    members: list[TritonPrepacked]

    def part(self, member: TritonPrepacked, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the product of a member, None where it is to be multiplied alone."""
        return None

    def dissolve(self) -> None:
        """Leave each member to itself."""
        for member in self.members:
            member.site = None


class Site(Whole):
    """Weights that read one activation, multiplied as one: the first that is asked computes what all of them need.

    The others are asked for the very same tensor, as the attention and the MLP of a block do, and take their part. What
    is asked of another tensor, or of one that was written to since, is computed anew. Of writing, inference mode and
    torch.compile do not tell: there a model must not change an activation between its linears, as none does.

    members: in the order of their parts. biases: of each, None where it has none, asked for whenever one is needed.
    """

    def __init__(self, members: Sequence[TritonPrepacked], biases: Sequence[Callable[[], Tensor | None]]) -> None:
        self.members, self._biases = list(members), list(biases)
        self.whole = members[0].join(members)
        self._parts = [m.packed for m in members]
        self._sizes = [*(w.Np for w in self._parts[:-1]), self._parts[-1].N]
        self._joined: tuple[list[tuple[Tensor | None, int]], Tensor | None] = ([(None, 0)] * len(members), None)
        self._left: tuple[Tensor, int, dict[int, Tensor]] | None = None
        for i, member in enumerate(members):
            member.site, member.place = self, i

    def part(self, member: TritonPrepacked, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the product of a member, None where its bias is not the site's."""
        i, left, version = member.place, self._left, writes(x)
        if left is None or left[0] is not x or left[1] != version or i not in left[2]:
            biases = [own() for own in self._biases]
            if biases[i] is not bias:
                return None
            parts = member.multiply(x, self.whole, self._bias(biases)).split(self._sizes, -1)
            left = self._left = x, version, {j: self._cut(part, j) for j, part in enumerate(parts)}
        y = left[2].pop(i)
        if not left[2]:
            self._left = None
        return y

    def _cut(self, part: Tensor, i: int) -> Tensor:
        N = self._parts[i].N
        return part if self._sizes[i] == N else part[..., :N]

    def _bias(self, biases: list[Tensor | None]) -> Tensor | None:
        """Return the biases behind each other, zeros for what has none; None where none has one."""
        if all(b is None for b in biases):
            return None
        known, joined = self._joined
        now = [(b, 0 if b is None else writes(b)) for b in biases]
        if any(a is not b or u != v for (a, u), (b, v) in zip(known, now, strict=True)):
            like = next(b for b in biases if b is not None)
            joined = like.new_zeros(sum(self._sizes))
            for b, part in zip(biases, joined.split(self._sizes), strict=True):
                if b is not None:
                    part[: len(b)] = b
            self._joined = now, joined
        return joined


def writes(x: Tensor) -> int:
    """Return how often a tensor was written to, where that is known: not in inference mode, nor to torch.compile."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
