"""What follows the last block of a model: the final norm, found by what runs there, and the output head that reads it.

    behind(model, "model.layers")      # ["model.norm"]; of GPT-NeoX ["gpt_neox.final_layer_norm"]

Not here: the blocks (skeleton.py), logits of hidden states (ends.py).
"""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmq.model.standing import Given, Reached, standing_in


class Tail(nn.Module):
    """What follows the last block, as one more block: the final norm, and the output head that reads it."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.norm(hidden))
        return out


def behind(model: Any, blocks: str) -> list[str]:
    """Return the names of what runs between the last block and the head, in that order: modules without children.

    model: without weights; one number stands for each of them. blocks: the name of the list of its blocks.
    """
    hidden = torch.zeros(1, 2, model.config.get_text_config().hidden_size)
    with standing_in(model, blocks, [Given(model.get_submodule(blocks)[-1], hidden)]):
        twin = copy.deepcopy(model)
    ran: list[str] = []
    head = twin.get_output_embeddings()
    for name, module in twin.named_modules():
        _zero(module)
        if module is head:
            module.register_forward_pre_hook(_arrive)
        elif isinstance(module, Given):
            module.register_forward_hook(lambda *_: ran.clear())
        elif not any(module.children()) and not isinstance(module, nn.Dropout | nn.Identity):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with suppress(Reached), torch.no_grad():
        twin(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
        ran.clear()  # no head was reached
    return ran


def _arrive(*_: Any) -> None:
    raise Reached


def _zero(module: nn.Module) -> None:
    """Give a module zeros for its weights, which take no memory."""
    for leaf, p in module.named_parameters(recurse=False):
        if p.is_meta:
            setattr(module, leaf, nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False))
