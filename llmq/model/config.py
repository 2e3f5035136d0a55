"""The heads of an attention, as a Hugging Face config gives or implies them; blocks may differ (Gemma 4)."""

from collections.abc import Callable
from typing import Any


def head_dim(config: Any, block: int | None = None) -> int:
    """Return the channels of one head: of a block by its number, else of the block that has the most."""
    return _of(config, block, lambda c: getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)


def kv_heads(config: Any, block: int | None = None) -> int:
    """Return how many heads have keys and values of their own: in a block by its number, else the most of any."""
    return _of(config, block, lambda c: getattr(c, "num_key_value_heads", None) or c.num_attention_heads)


def _of(config: Any, block: int | None, read: Callable[[Any], Any]) -> int:
    if not getattr(config, "is_heterogeneous", False):
        return int(read(config))
    blocks = config.per_layer_config if block is None else [config.per_layer_config[block]]
    return max(int(read(c)) for c in blocks)
