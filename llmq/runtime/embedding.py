"""The quantized embedding, which decodes the rows that are looked up, and the head that multiplies with its table.

    y = W[ids]        as the module does that it stands for: Gemma's scales what it has looked up
    y = x @ W^T       of a head that is tied to it

The tensors are the embedding's alone. A head computes with a back-end (backends/), which holds the codes once more in
its own layout, and with the reference where none can run it.
Not here: the tensors themselves (packed.py), which modules are replaced (integrations/).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmq.format import Format
from llmq.runtime import reference
from llmq.runtime.backends import Prepacked, choose
from llmq.runtime.packed import PackedWeight, leaves
from llmq.types import LinearSpec


class QuantEmbedding(PackedWeight):
    """A drop-in for an `nn.Embedding`, or a class derived from it, whose table stays packed.

    embedding: the module that it stands for, whose weight is dropped; the rest of what it does is done.
    See `PackedWeight` for the other arguments.
    """

    def __init__(
        self,
        fmt: Format,
        spec: LinearSpec,
        embedding: nn.Embedding,
        *,
        stored: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(fmt, spec, fmt.layout(spec) if stored is None else stored, device)
        self.num_embeddings, self.embedding_dim, self.dtype = spec.N, spec.K, embedding.weight.dtype
        del embedding.weight
        embedding.register_buffer("weight", torch.empty(0, spec.K, dtype=self.dtype, device="cpu"), persistent=False)
        embedding.padding_idx = None  # which says where a gradient is not wanted: there is none
        self.lookup = embedding

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of some tokens, int64 `[n]`, in the dtype of the model, `[n, K]`; no others are decoded."""
        own = {local: t[ids] for local, t in self.file_tensors().items() if local not in self.fmt.derived}
        return reference.decode(self.fmt.unpack(own, replace(self.spec, N=len(ids))), self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens, int64 `[...]`, to `[..., K]`."""
        place = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        found: Tensor = functional_call(self.lookup, {"weight": self.rows(ids.flatten())}, (place,))
        return found

    def extra_repr(self) -> str:
        """Describe the layer the way `nn.Embedding` does."""
        grid = self.spec.scheme.weight
        return f"{self.spec.N}, {self.spec.K}, bits={grid.bits}, {grid.granularity}, format={self.fmt.quant_method}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """See `PackedWeight._apply`; what is looked up has the dtype that the model is given."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class TiedHead(nn.Module):
    """An output head that is tied to a quantized embedding: it has no tensors in any checkpoint."""

    prepacked: Prepacked | None

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self._of = [embedding]  # in a list: no submodule
        self.in_features, self.out_features = embedding.spec.K, embedding.spec.N
        self.packs, self.prepacked = False, None

    def prepack(self) -> None:
        """Hand the table to the first back-end that can run it, here and wherever the head is moved to."""
        (embedding,) = self._of
        self.packs = True
        if self.prepacked is None and embedding.loaded:
            q = embedding.unpack()
            backend = choose(embedding.spec, q)
            self.prepacked = None if backend is None else backend(q, embedding.spec)

    def empty(self) -> None:
        """Forget what the back-end holds."""
        self.packs, self.prepacked = False, None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., K]` to `[..., N]` in the dtype of `x`."""
        if self.packs:
            self.prepack()
        if self.prepacked is not None:
            y: Tensor = self.prepacked(x)
            return y
        return reference.linear(x, self._of[0].unpack(), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.prepacked is not None and leaves(self, fn):
            self.prepacked = None  # made anew when it is next asked for
        return super()._apply(fn, recurse)
