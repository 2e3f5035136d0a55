"""The heads of an attention, as a Hugging Face config gives or implies them."""

from typing import Any


def head_dim(config: Any) -> int:
    """Return the channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Any) -> int:
    """Return how many heads have keys and values of their own."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
