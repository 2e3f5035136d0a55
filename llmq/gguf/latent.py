"""Multi-head latent attention (DeepSeek V2 and V3) in a file: keys, the scale of attention, what must hold.

One linear, `attn_kv_b`, makes keys and values of all heads from a latent. A file may hold it so, or as two halves, of
which that of the keys is transposed; it is written as the checkpoint has it, since a row's codes share scales, and
columns do not. llama.cpp then keeps whole keys and values in its cache, not the latent.

Under yarn both leave cosine and sine as they are, and multiply attention by (1 + m ln s)^2, of a factor s and a key m.
Source: llama.cpp `src/models/deepseek2.cpp`; transformers' `modeling_deepseek_v3.py`.
Not here: experts, which are as everywhere (programs.py).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gguf

from llmq.errors import LlmqError
from llmq.gguf.rope import Rotary

_CLOSE = 1e-5
_DIRECT, _OTHER = 27, 26  # blocks by which llama.cpp tells models without a latent of q, and others that differ in more


def keys(config: Any, writer: gguf.GGUFWriter) -> None:
    """Add the keys."""
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)


def differences(config: Any) -> Iterator[str]:
    """Yield what a config asks for that llama.cpp does not compute, as the subject of a sentence."""
    if not getattr(config, "rope_interleave", True):
        yield "rotary embedding of halves (rope_interleave false)"
    blocks, direct = config.num_hidden_layers, config.q_lora_rank is None
    if blocks == _OTHER or direct != (blocks == _DIRECT):
        yield f"{blocks} blocks {'without' if direct else 'with'} a latent of q (q_lora_rank)"


def turned(found: Rotary, config: Any, model: Any) -> Rotary:
    """Return a rotary embedding that says what attention is multiplied by too.

    Raises LlmqError where no key says it.
    """
    scaling = model.model.layers[0].self_attn.scaling
    times = math.sqrt(scaling * math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim))
    if found.kind == "yarn" and abs(found.magnitude() - 1) < _CLOSE:
        return replace(found, attn_factor=1.0, log_multiplier=(times - 1) / math.log(found.factor))
    if found.kind != "none" or found.attn_factor != 1 or abs(times - 1) > _CLOSE:
        raise LlmqError(
            "llama.cpp's deepseek2 takes yarn's mscale and mscale_all_dim where they are equal, and no other scaling; "
            "write another format, or take the scaling out of config.json"
        )
    return found
