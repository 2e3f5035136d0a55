"""Qwen3.5's linear attention (gated delta net) in a file: keys, the order of value heads, what must hold.

Hugging Face keeps the value heads of one key head together; ggml repeats the key heads one after another, so that value
head j belongs to key head j mod H_k:

    Hugging Face   k0: v0 v1   k1: v2 v3   ...        file   v0 v2 ... v1 v3 ...

Rows move by heads in q, k, v (of v alone), in z, in the two gates and the convolution; in the output projection columns
do. The decay is stored as it is used, -exp(A_log), and the convolution without its middle axis of 1.
Source: llama.cpp `conversion/qwen.py` (_LinearAttentionVReorderBase) and `src/models/qwen35.cpp`.
Not here: attention beside it, which is as everywhere (architecture.py).
"""

from collections.abc import Iterator
from typing import Any

import gguf
import torch
from torch import Tensor

from llmq.gguf.programs import period_of

_SECTIONS = [11, 11, 10]  # transformers' own, of pairs that turn by time, height and width


def keys(config: Any, writer: gguf.GGUFWriter) -> None:
    """Add the keys."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_full_attention_interval(_interval(config))
    writer.add_rope_dimension_sections([*_sections(config), 0])


def differences(config: Any) -> Iterator[str]:
    """Yield what a config asks for that llama.cpp has no keys for, as the subject of a sentence."""
    if config.linear_key_head_dim != config.linear_value_head_dim:
        yield f"linear attention of {config.linear_key_head_dim} key and {config.linear_value_head_dim} value channels"
    if config.linear_num_value_heads % config.linear_num_key_heads:
        yield f"{config.linear_num_value_heads} value heads of {config.linear_num_key_heads} key heads"
    if _interval(config) == 0:
        yield f"config.json asks for blocks of {', '.join(config.layer_types)}"
    pairs = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1)) // 2
    sections = _sections(config)
    if len(sections) != 3 or any(i >= 3 * sections[i % 3] for i in range(pairs)) or sum(sections) > config.head_dim:
        yield f"mrope_section {sections} for {pairs} pairs of channels"


def rows(config: Any, name: str) -> Tensor | None:
    """Return the order of the rows of a tensor (int64 `[N]`), None for as it is."""
    heads, channels = _heads(config), config.linear_value_head_dim
    if "linear_attn." not in name or config.linear_num_value_heads == config.linear_num_key_heads:
        return None
    leaf = name.rpartition("linear_attn.")[2].partition(".")[0]
    if leaf in ("in_proj_a", "in_proj_b", "A_log", "dt_bias"):
        return heads
    if leaf == "in_proj_z":
        return _channels(heads, channels)
    if leaf in ("in_proj_qkv", "conv1d"):
        before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        return torch.cat([torch.arange(before), before + _channels(heads, channels)])
    return None


def columns(config: Any, name: str) -> Tensor | None:
    """Return the order of the columns of a linear (int64 `[K]`), None for as it is. They move by whole heads."""
    if not name.endswith("linear_attn.out_proj.weight") or config.linear_num_value_heads == config.linear_num_key_heads:
        return None
    return _channels(_heads(config), config.linear_value_head_dim)


def value(name: str, tensor: Tensor) -> Tensor:
    """Return a float tensor as it is stored, its rows apart."""
    if name.endswith("linear_attn.A_log"):
        return -tensor.float().exp()
    return tensor.squeeze(1) if name.endswith("linear_attn.conv1d.weight") else tensor


def _heads(config: Any) -> Tensor:
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    return torch.arange(heads).reshape(groups, heads // groups).T.reshape(-1)


def _channels(heads: Tensor, channels: int) -> Tensor:
    return (heads[:, None] * channels + torch.arange(channels)).reshape(-1)


def _interval(config: Any) -> int:
    return period_of([kind == "full_attention" for kind in config.layer_types])


def _sections(config: Any) -> list[int]:
    return list(config.rope_parameters.get("mrope_section", _SECTIONS))
