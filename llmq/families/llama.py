"""Llama: RMSNorm -> q, k, v -> o; RMSNorm -> gate, up -> down. No biases."""

from dataclasses import dataclass

from llmq.types import Site


@dataclass(frozen=True)
class Llama:
    """The sites of a Llama block, in the order they run."""

    sites: tuple[Site, ...] = (
        Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn"),
        Site(("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", per_head=True),
        Site(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp"),
        Site(("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj"),
    )
