"""A checkpoint in another basis: the function is unchanged, the weights are turned as they are read.

heads     v = Q^T v (rows of each key-value head),   o = o Q (columns of each head), through attention, which mixes
          tokens and not channels.
residual  what reads the stream: W diag(g) R, the gain g of the norm before it folded in and set to 1; what writes it:
          R^T W; embedding E R, head W diag(g) R. An RMSNorm with gains of 1 commutes with R.

Linears whose producer is a norm read the residual stream, those with another producer write it (families/).
Not here: the bases (algorithms/rotate.py).
"""

import torch
from torch import Tensor

from llmq import registry
from llmq.checkpoint.source import View
from llmq.model.sites import family_sites, no_table
from llmq.model.skeleton import Skeleton
from llmq.steps import Rotation
from llmq.types import LlmqError


class Rotated(View):
    """A checkpoint in another basis, each tensor turned as it is read: linears in float32, the others as stored.

    Raises LlmqError for a family without a table of sites, and for a tied head that may not be untied.
    """

    def __init__(self, skeleton: Skeleton, step: Rotation) -> None:
        super().__init__(skeleton.source)
        self._Q_dd, self._R_HH = step.rotate(skeleton.head_dim, skeleton.config.hidden_size)
        sites = family_sites(skeleton.config.model_type, skeleton.blocks[0])
        if sites is None:
            raise LlmqError(no_table(skeleton.config.model_type, registry.dump(step)))
        self._prefix = f"{skeleton.prefix}."
        self._site = {n: s for s in sites for n in s.linears}
        self._norms = {s.producer for s in sites if s.producer not in self._site}
        self._values = {s.producer for s in sites if s.per_head}
        self._embedding = f"{skeleton.name_of(skeleton.model.get_input_embeddings())}.weight"
        self._head = f"{skeleton.name_of(skeleton.model.get_output_embeddings())}.weight"
        self._last_norm = f"{skeleton.final_norm}.weight"
        if self._R_HH is not None:
            if self._head not in self and not step.untie:
                size = self.sizes()[self._embedding]
                raise LlmqError(
                    f"{registry.dump(step)} unties the head of {self.path} from its embedding, which adds "
                    f"{size / 1e6:.1f} MB; say so with untie=true, or leave residual out"
                )
            self.config |= {"tie_word_embeddings": False}
            self._entries.setdefault(self._head, self._entries[self._embedding])

    def get(self, name: str) -> Tensor:
        """Return one tensor, rotated."""
        tensor = self.base.get(name if name in self.base else self._embedding)  # a tied head is untied here
        if name.startswith(self._prefix):
            block, _, local = name.removeprefix(self._prefix).partition(".")
            return self._of_block(tensor, f"{self._prefix}{block}.", *local.rsplit(".", 1))
        if self._R_HH is None:
            return tensor
        if name == self._last_norm:
            return torch.ones_like(tensor)
        if name == self._head:
            tensor = tensor.float() * self.base.get(self._last_norm).float()
        if name in (self._head, self._embedding):
            return (tensor.float() @ self._R_HH).to(self.dtype_of(name))
        return tensor

    def _of_block(self, tensor: Tensor, prefix: str, module: str, kind: str) -> Tensor:
        """Return a tensor of a block: the `kind` (weight or bias) of a module."""
        if module in self._norms and kind == "weight" and self._R_HH is not None:
            return torch.ones_like(tensor)
        if module not in self._site:
            return tensor
        site, out = self._site[module], tensor.float()
        if self._Q_dd is not None and module in self._values:  # rows of each head
            out = (out.reshape(-1, len(self._Q_dd), out[0].numel()).mT @ self._Q_dd).mT.reshape(out.shape)
        if self._Q_dd is not None and site.per_head and kind == "weight":  # columns of each head
            out = (out.reshape(len(out), -1, len(self._Q_dd)) @ self._Q_dd).reshape(out.shape)
        if self._R_HH is None:
            return out
        if site.producer not in self._norms:
            return self._R_HH.T @ out
        if kind == "bias":
            return out
        return (out * self.base.get(f"{prefix}{site.producer}.weight").float()) @ self._R_HH
