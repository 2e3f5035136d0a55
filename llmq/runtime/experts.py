"""The experts of a layer on a GPU as two products: the gates and ups of all of them are one launch, the downs another.

    pairs of a token and one of its experts, sorted by expert on the device (llmq_kernels.routing)
    y[t, j] = finished(down_e(activated(gate_e x_t, up_e x_t)))      e = index[t, j]
    sum over j of weight[t, j] y[t, j]

What is activated and finished is `Experts`', so that it is what the model's own forward does. A token's experts are
summed at once, in float32, where one after the other adds each to what is rounded already: as transformers' own grouped
experts do. Nothing waits for the device, and all sizes are known beforehand, so that a CUDA graph holds it.

The packed words of all experts lie in one tensor for each of both products, of which each linear still has its part, so
that the tensors of the file come back as from any other linear. transformers' registry of functions for experts is no
door to this: its functions read fused parameters, of which a packed checkpoint has none.

Grouped are layers whose experts are alike in back-end, bits, groups and what else a kernel fixes; other layers, and
all on other devices, run one expert after the other (model/experts.py). Not here: the product (llmq_kernels.grouped
and grouped_int8).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.experts import Experts
from llmq.runtime.backends._triton import TritonPrepacked, Whole, check_dtype, reworded, writes
from llmq.runtime.linear import QuantLinear


def group_experts(model: nn.Module) -> int:
    """Have the experts of every layer below a module computed at once, where they can be; return how many can."""
    return sum(_group(m) for m in model.modules() if isinstance(m, Experts) and m.together is None)


def _group(experts: Experts) -> bool:
    rows = [[[getattr(e, n) for n in names] for e in experts.experts()] for names in (experts.entries, ("down_proj",))]
    if not all(_alike(product) for product in rows):
        return False
    experts.together = Layer(experts, *(Product(product) for product in rows))
    return True


def _alike(rows: Sequence[Sequence[Any]]) -> bool:
    """Say whether linears by expert, those that read its input, can be stacked."""
    first, *others = [[_kind(linear) for linear in row] for row in rows]
    return None not in first and all(row == first for row in others) and len({kind[1:] for kind in first if kind}) == 1


def _kind(linear: Any) -> tuple[Hashable, ...] | None:
    """Return what linears of a product have in common, N of those at one place before the others; None for none."""
    packed = linear.prepacked if isinstance(linear, QuantLinear) else None
    if not isinstance(packed, TritonPrepacked) or packed.site is not None or packed.kind_of_expert() is None:
        return None
    return packed.N, packed.kind_of_expert(), linear.bias is None


class Product:
    """The linears of a layer's experts that read one activation, multiplied as one.

    rows: by expert. members: their weights, which become parts of `whole`.
    """

    def __init__(self, rows: Sequence[Sequence[QuantLinear]]) -> None:
        from llmq_kernels.layout import spans_of

        held: Any = [[linear.prepacked for linear in row] for row in rows]
        self.members: list[TritonPrepacked] = [m for row in held for m in row]
        self.whole, parts = held[0][0].stack([[m.packed for m in row] for row in held])
        for member, part in zip(self.members, (p for row in parts for p in row), strict=True):
            member.hold(part)
        self.linear = self.members[0].linear
        self._spans = [(at.start, w.N) for at, w in zip(spans_of([w.Np for w in parts[0]]), parts[0], strict=True)]
        self._dense = sum(size for _, size in self._spans) == self.whole.one.N
        self._biases = [linear.bias for row in rows for linear in row if linear.bias is not None]
        self._joined: tuple[int, Tensor | None] = (-1, None)

    def __call__(self, x: Tensor, plan: Any) -> Tensor:
        """Map `x` `[T, K]` to `[T k, N]`, the features of a row's linears side by side."""
        check_dtype(self.linear, x)
        try:
            y = self.members[0].multiply_experts(x, self.whole, plan, self.bias()).flatten(0, 1)
        except ValueError as e:
            reworded(self.linear, e)
        if self._dense:
            return y
        return torch.cat([y[:, begin : begin + N] for begin, N in self._spans], -1)

    def bias(self) -> Tensor | None:
        """Return the biases of all experts `[E + 1, N]`, padded as their weights are and the last of zeros."""
        if not self._biases:
            return None
        now = sum(map(writes, self._biases))
        if self._joined[1] is None or (self._joined[0] != now and not torch.compiler.is_compiling()):
            self._joined = now, self._join_biases()
        return self._joined[1]

    def _join_biases(self) -> Tensor:
        experts = len(self.members) // len(self._spans)
        found = self._biases[0].new_zeros(experts + 1, self.whole.one.N)
        for i, (begin, N) in enumerate(self._spans):
            found[:-1, begin : begin + N] = torch.stack(self._biases[i :: len(self._spans)])
        return found


class Layer(Whole):
    """What `Experts.together` is: all experts of a layer at once, until a weight of theirs is moved or replaced."""

    def __init__(self, experts: Experts, enter: Product, leave: Product) -> None:
        self.members = [*enter.members, *leave.members]
        self._experts, self._enter, self._leave = experts, enter, leave
        for member in self.members:
            member.site = self

    def dissolve(self) -> None:
        """Leave each expert to itself."""
        super().dissolve()
        self._experts.together = None

    def __call__(self, hidden: Tensor, index_Tk: Tensor | None, weight_Tk: Tensor | None) -> Tensor | None:
        """Return what `Experts.forward` does, None for what a kernel cannot take: float32 beside biases."""
        from llmq_kernels import routing

        if hidden.dtype == torch.float32 and (self._enter.bias() is not None or self._leave.bias() is not None):
            return None
        experts = self._experts
        index = self._of_batches(hidden) if index_Tk is None else index_Tk
        plan = routing.plan(index, experts.num_experts)
        inner = experts.activated(self._enter(hidden, plan))
        y = experts.finished(self._leave(inner, plan.of_pairs))
        if weight_Tk is None:
            return y
        return (y.view(*index.shape, -1) * weight_Tk[..., None]).sum(1).to(hidden.dtype)

    def _of_batches(self, hidden: Tensor) -> Tensor:
        """Return each row's expert, `[E T, 1]`, of which each has T of the rows `[E T, H]`; zeros are nobody's."""
        E = self._experts.num_experts
        experts = torch.arange(E, device=hidden.device).repeat_interleave(len(hidden) // E)
        return experts.where(hidden.any(-1), E)[:, None]
