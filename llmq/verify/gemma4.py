"""Gemma 4's names and keys in a GGUF file, as transformers has them: blocks that differ.

Source: llama.cpp `src/models/gemma4.cpp`; transformers' `configuration_gemma4.py`.
Not here: what reads a file (ggml.py), the other architectures (keys.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmq.verify.keys import Keys

NAMES = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm", "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2", "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2", "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale", "ffn_down_exps.scale": "router.per_expert_scale",
}  # fmt: skip
NAMES |= {f"ffn_{part}_exps": f"experts.*.{part}_proj" for part in ("gate", "up", "down")}
"""Of a block's modules, by ggml's; a star stands for the number of an expert."""
OUTSIDE = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}


def config(keys: Keys) -> dict[str, Any]:
    """Return what of a config the keys say."""
    windowed, heads = keys.each("attention.sliding_window_pattern", zero=True), keys.each("attention.head_count_kv")
    widths, plain = keys.each("feed_forward_length"), {"rope_type": "default", "rope_theta": 10000.0}
    full = [i for i, w in enumerate(windowed) if not w]
    experts = keys.number("expert_count", 0, zero=True) or None
    return {
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windowed],
        "sliding_window": keys.number("attention.sliding_window"),
        "head_dim": keys.channels("attention.key_length_swa"),
        "global_head_dim": keys.channels("attention.key_length"),
        "num_key_value_heads": next((h for h, w in zip(heads, windowed, strict=True) if w), heads[0]),
        "num_global_key_value_heads": heads[full[0]] if full else None,
        "attention_k_eq_v": any(f"blk.{i}.attn_k.weight" in keys.file.tensors for i in full)
        and not any(f"blk.{i}.attn_v.weight" in keys.file.tensors for i in full),
        "num_kv_shared_layers": keys.number("attention.shared_kv_layers", 0, zero=True),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "hidden_size_per_layer_input": keys.number("embedding_length_per_layer_input", zero=True),
        "vocab_size_per_layer_input": keys.file.tensors["token_embd.weight"].shape[1],
        "final_logit_softcapping": keys.real("final_logit_softcapping", 0.0, zero=True) or None,
        "rope_parameters": {"full_attention": plain, "sliding_attention": plain},
        "enable_moe_block": experts is not None,
        "num_experts": experts,
        "top_k_experts": keys.number("expert_used_count", None),
        "moe_intermediate_size": keys.number("expert_feed_forward_length", None),
    }
