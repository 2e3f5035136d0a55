"""Experts that were written one by one, joined again where transformers' model has all of them in one tensor.

    mlp.experts.0.gate_proj.weight [I, H], mlp.experts.0.up_proj.weight [I, H], 1 ...    as llmq packs gpt_oss, llama4
    mlp.experts.gate_up_proj [E, H, 2I]                                                  as transformers loads them

Of most families transformers joins them itself as it loads; those stay as they are.
Not here: how a tensor holds its experts (checkpoint/parts.py), which name is which tensor (checkpoint/names.py).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint import Source
from llmq.checkpoint.names import match
from llmq.checkpoint.parts import Fused
from llmq.errors import LlmqError
from llmq.guard.reading import BITS, Entry
from llmq.model.experts import unfuse
from llmq.model.pretrained import model_config, transformers_model

_OWN = re.compile(r"(.+)\.(\d+\.\w+\.(?:weight|bias))")


@dataclass(frozen=True)
class Joined(Entry):
    """A tensor of all experts, made of theirs when it is read. parts: in the order of `fused.names()`."""

    fused: Fused
    parts: tuple[Entry, ...]

    def read(self) -> Tensor:
        """Return the tensor. Raises LlmqError as the parts do."""
        return torch.stack([self.read_slice(e) for e in range(self.shape[0])])

    def read_slice(self, i: int) -> Tensor:
        """Return one expert's matrix, or bias."""
        n = len(self.fused.projections)
        own = [part.read() for part in self.parts[i * n : (i + 1) * n]]
        return self.fused.joined(own, transposed=self.fused.transposed)


def join(source: Source) -> list[str]:
    """Give a source of floats the tensors of all experts that transformers' model loads in no other way.

    Returns what a user should know: that no model is made of the config, which then tells nothing of experts.
    Raises LlmqError for an expert that is missing or misshapen.
    """
    stored = source.entries()
    try:
        wholes = together(source, list(stored))
    except LlmqError as e:
        return [f"experts are written as they are stored, since no model is made of the config: {e}"]
    made = {name: _joined(name, fused, stored, parts) for name, (fused, parts) in wholes.items()}
    gone = {part for _, parts in wholes.values() for part in parts}
    if made:
        source.become({n: e for n, e in stored.items() if n not in gone} | made, source.decoded or {})
    return []


def together(source: Source, names: Collection[str]) -> dict[str, tuple[Fused, list[str]]]:
    """Return the tensors of all experts that transformers' model loads in no other way, and the names of their parts.

    Raises LlmqError where no model is made of the config.
    """
    own = list(dict.fromkeys(found[1] for name in names if (found := _OWN.fullmatch(name))))
    if not any(place.endswith("experts") for place in own):
        return {}
    model = transformers_model(source, model_config(source))
    missing, wholes = set(match(model, names).missing), dict[str, tuple[Fused, list[str]]]()
    for holder in unfuse(model):
        experts: Any = model.get_submodule(holder)
        for parameter, fused in experts.fused.items():
            if f"{holder}.{parameter}" in missing:
                place = _place(holder, own)
                wholes[f"{place}.{parameter}"] = fused, [f"{place}.{name}" for name, _, _ in fused.names()]
    return wholes


def _place(holder: str, own: Collection[str]) -> str:
    """Return what the checkpoint calls the experts of a module: it may have another prefix there."""
    tail = holder[holder.index("layers.") :] if "layers." in holder else holder
    return next((place for place in own if place == tail or place.endswith(f".{tail}")), holder)


def _joined(name: str, fused: Fused, own: Mapping[str, Entry], wanted: list[str]) -> Joined:
    if absent := [n for n in wanted if n not in own]:
        raise LlmqError(f"tensor {absent[0]} is missing; the checkpoint does not match its config.json")
    parts = tuple(own[n] for n in wanted)
    rows, *columns = reversed(fused.shape[1:]) if fused.transposed else fused.shape[1:]
    shape = (rows // len(fused.projections), *columns)
    for part in parts:
        if (part.shape, part.dtype) != (shape, parts[0].dtype):
            raise LlmqError(
                f"{part.name} is {part.dtype} {list(part.shape)}, not {parts[0].dtype} {list(shape)} as its config says"
            )
    size = prod(fused.shape) * BITS[parts[0].dtype] // 8
    return Joined(parts[0].file, name, parts[0].dtype, fused.shape, parts[0].start, size, fused, parts)
