"""Blocks that differ from each other (Gemma 4) in a file: what its lists say of each, and what must hold.

    with a window       heads of one width and number      turned by a base of their own
    that see all        heads of another                   turned by a table (rope_freqs), their values may be the keys
    the last ones       keys and values of the last block before them with heads as theirs; the MLP may be twice as wide

llama.cpp takes of the blocks that make keys and values the last for those that see all, the one before it for the rest.
Experts are two tensors here, gate and up; llama.cpp reads those as well as the one that its converter writes.
Source: llama.cpp `src/models/gemma4.cpp`, `src/llama-model.cpp` (which block's cache is used), `conversion/gemma.py`.
Not here: rotary embedding (rope.py), windows (architecture.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

_EXPERTS = {"gate_proj": gguf.MODEL_TENSOR.FFN_GATE_EXP, "up_proj": gguf.MODEL_TENSOR.FFN_UP_EXP}


@dataclass(frozen=True)
class Varied:
    """What differs, by block, in the order of blocks.

    windowed: whether it has a window. widths: of its MLP. heads: of its keys and values. channels: of one head, by
    which transformers lets blocks differ with their windows alone. shared: how many of the last blocks take keys and
    values of another. beside: the channels of the embedding that every block adds of its own, 0 for none.
    """

    windowed: tuple[bool, ...]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    shared: int
    beside: int

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys."""
        writer.add_feed_forward_length(self.widths)
        writer.add_head_count_kv(self.heads)
        full, local = (self._channels(windowed) for windowed in (False, True))
        writer.add_key_length(full)
        writer.add_value_length(full)
        writer.add_key_length_swa(local)
        writer.add_value_length_swa(local)
        writer.add_shared_kv_layers(self.shared)
        writer.add_embedding_length_per_layer_input(self.beside)

    def _channels(self, windowed: bool) -> int:
        """Return the channels of a head in blocks with or without a window; where there are none, in the others."""
        return next((c for c, w in zip(self.channels, self.windowed, strict=True) if w == windowed), self.channels[0])


def varied(config: Any, model: Any, windows: Sequence[int]) -> Varied:
    """Return what differs between the blocks of a model that transformers makes of a config."""
    blocks = model.model.layers
    return Varied(
        tuple(w > 0 for w in windows),
        tuple(b.mlp.gate_proj.out_features for b in blocks),
        tuple(config.num_attention_heads // b.self_attn.num_key_value_groups for b in blocks),
        tuple(b.self_attn.head_dim for b in blocks),
        sum(b.self_attn.is_kv_shared_layer for b in blocks),
        config.hidden_size_per_layer_input or 0,
    )


def differences(config: Any, found: Varied) -> Iterator[str]:
    """Yield what a model computes that llama.cpp does not, as the subject of a sentence."""
    if found.beside and config.vocab_size_per_layer_input != config.vocab_size:
        yield f"{config.vocab_size_per_layer_input} tokens with an embedding for single blocks of {config.vocab_size}"
    own = found.windowed[: len(found.windowed) - found.shared]
    for windowed in sorted({*found.windowed[len(own) :]}):
        made = len(own) - 1 - own[::-1].index(windowed)
        if made != len(own) - (2 if windowed else 1):
            yield f"block {made} makes the keys and values of the last {found.shared} (num_kv_shared_layers)"


def add_names(names: gguf.TensorNameMap, blocks: int) -> None:
    """Add what a map of tensors lacks: experts whose gate and up are apart."""
    for i in range(blocks):
        for part, tensor in _EXPERTS.items():
            names.mapping[f"model.layers.{i}.experts.{part}"] = tensor, gguf.TENSOR_NAMES[tensor].format(bid=i)
