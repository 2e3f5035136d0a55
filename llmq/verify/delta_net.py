"""Qwen3.5's linear attention read back: its keys, and its tensors in the order and form that transformers has.

Value heads lie in the file with one of every key head first, then the second of every key head; transformers keeps
those of a key head together. Of llmq's code that writes them nothing is used.
Source: llama.cpp `src/models/qwen35.cpp`; transformers' `Qwen3_5GatedDeltaNet`.
Not here: attention beside it (keys.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmq.errors import LlmqError
from llmq.verify.decode import Array

if TYPE_CHECKING:
    from llmq.verify.keys import Keys

NAMES = {
    "post_attention_norm": "post_attention_layernorm", "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z", "ssm_beta": "linear_attn.in_proj_b", "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_out": "linear_attn.out_proj", "ssm_conv1d": "linear_attn.conv1d", "ssm_norm": "linear_attn.norm",
    "ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias",
}  # fmt: skip
_BY_HEAD = ("in_proj_a", "in_proj_b", "A_log", "dt_bias", "in_proj_z")


def config(keys: Keys) -> dict[str, Any]:
    """Return what the keys say of linear attention, and of the part of a head that attention turns.

    Raises LlmqError for keys that say nothing that can be.
    """
    heads, period = keys.number("ssm.time_step_rank"), keys.number("full_attention_interval", 4)
    turned = keys.channels("rope.dimension_count") / keys.channels("attention.key_length")
    if heads % keys.number("ssm.group_count"):
        raise LlmqError(f"{keys.file.path}: the heads of linear attention do not read: ssm.time_step_rank is {heads}")
    return {
        "linear_conv_kernel_dim": keys.number("ssm.conv_kernel"),
        "linear_key_head_dim": keys.number("ssm.state_size"),
        "linear_value_head_dim": keys.number("ssm.inner_size") // heads,
        "linear_num_key_heads": keys.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "layer_types": ["linear_attention" if (i + 1) % period else "full_attention" for i in range(keys.blocks())],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": turned,
            "mrope_section": keys.first("rope.dimension_sections", 3),
        },
    }  # fmt: skip


def in_order(name: str, values: Array, keys: Keys) -> Array:
    """Return a tensor of linear attention as transformers stores it."""
    leaf = name.rpartition("linear_attn.")[2].partition(".")[0]
    if leaf == "out_proj":
        return np.ascontiguousarray(_together(np.ascontiguousarray(values.T), keys).T)
    if leaf in ("in_proj_qkv", "conv1d"):
        before = 2 * keys.number("ssm.group_count") * keys.number("ssm.state_size")
        values = np.concatenate([values[:before], _together(values[before:], keys)])
    elif leaf in _BY_HEAD:
        values = _together(values, keys)
    if leaf == "A_log":
        values = np.log(-values)
    return values[:, None] if leaf == "conv1d" else values


def _together(values: Array, keys: Keys) -> Array:
    """Return the rows of value heads, those of one key head together."""
    groups = keys.number("ssm.group_count")
    tiles = values.reshape(keys.number("ssm.time_step_rank") // groups, groups, -1, *values.shape[1:])
    return np.ascontiguousarray(tiles.swapaxes(0, 1)).reshape(values.shape)
