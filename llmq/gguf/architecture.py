"""What llama.cpp calls a model: architecture, hyper-parameter keys, tensor names, and the order of q and k rows.

    model_type        architecture   q and k rows    rotary scaling
    llama, mistral    llama          reordered       llama3: tensor rope_freqs.weight; linear, yarn: keys
    qwen2             qwen2          as they are     linear, yarn: keys
    qwen3             qwen3          as they are     linear, yarn: keys

Hugging Face rotates channel i of a head with channel i + d/2, ggml's `llama` graph rotates neighbours 2i and 2i + 1, so
that rows 0 .. d/2-1 and d/2 .. d-1 of every head are interleaved. Rows are independent in every quantizer: reordering
packed rows equals packing reordered rows.
Source: the `gguf` package's tensor map; llama.cpp's `conversion/llama.py` and `src/models/*.cpp` for what is read.
Not here: the tokenizer (tokenizer.py), types of tensors (mixture.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from llmq.heads import head_dim, kv_heads
from llmq.types import LlmqError

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
_KEYED_ROPE = ("default", "linear", "yarn")  # what llama.cpp reads from keys alone
_YARN_KEYS = {  # transformers' name -> the writer's method
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}
_DROPPED = (".rotary_emb.inv_freq",)  # buffers of old checkpoints that every runtime computes itself


@dataclass(frozen=True)
class Architecture:
    """One model's place in llama.cpp, made from its transformers config by `architecture`."""

    config: Any
    arch: gguf.MODEL_ARCH

    @property
    def name(self) -> str:
        """The value of `general.architecture`."""
        return gguf.MODEL_ARCH_NAMES[self.arch]

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return head_dim(self.config)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; the file then holds `token_embd.weight` alone."""
        return bool(self.config.tie_word_embeddings)

    @property
    def large(self) -> bool:
        """Whether this is what llama.cpp calls a 70B model, whose attn_v gets more bits."""
        grouped = self.config.num_attention_heads != self.kv_heads
        return self.blocks == 80 and (self.name == "qwen2" or (self.name == "llama" and grouped))

    def tensor(self, name: str) -> str | None:
        """Return ggml's name of a checkpoint tensor, None for one that is not written.

        Raises LlmqError for a tensor that this architecture has no place for.
        """
        if name.endswith(_DROPPED) or (self.tied and name == "lm_head.weight"):
            return None
        found = gguf.get_tensor_name_map(self.arch, self.blocks).get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LlmqError(
                f"tensor {name} has no place in llama.cpp's architecture {self.name!r}; write another format, or leave "
                "out what was added to the model"
            )
        return found

    def rows(self, name: str) -> Tensor | None:
        """Return the order in which the rows of a checkpoint tensor are written (int64 `[N]`), None for as it is."""
        if self.arch is not gguf.MODEL_ARCH.LLAMA:
            return None
        leaf = name.rpartition("self_attn.")[2]
        heads = {"q_proj": int(self.config.num_attention_heads), "k_proj": self.kv_heads}.get(leaf.partition(".")[0])
        if heads is None or leaf.rpartition(".")[2] not in ("weight", "bias"):
            return None
        return torch.arange(heads * self.head_dim).reshape(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def extra(self) -> dict[str, Tensor]:
        """Return tensors that no checkpoint holds, by ggml's names: Llama 3.1's frequency factors, float32 `[d/2]`."""
        rope = _rope(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(rope, self.head_dim)}

    def warnings(self) -> list[str]:
        """Return what llama.cpp does otherwise than the model's config says."""
        window = getattr(self.config, "sliding_window", None)
        used = getattr(self.config, "use_sliding_window", True)
        if window and used and window < self.config.max_position_embeddings:
            return [
                f"llama.cpp's {self.name} has no sliding window: beyond {window} tokens its attention sees more than "
                "the model was trained with"
            ]
        return []

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the hyper-parameter keys."""
        config, rope = self.config, _rope(self.config)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.blocks)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
            for key, method in _YARN_KEYS.items():
                if rope.get(key) is not None:
                    getattr(writer, method)(rope[key])


def architecture(config: Any) -> Architecture:
    """Return the architecture of a transformers config.

    Raises LlmqError for a model that llama.cpp's tables here do not cover, and for a rotary scaling that it cannot
    express.
    """
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise LlmqError(
            f"model_type {kind!r} is not among those written as GGUF ({', '.join(_ARCHITECTURES)}); use --format gptq, "
            "awq or compressed-tensors"
        )
    found = Architecture(config, _ARCHITECTURES[kind])
    rope = _rope(config)["rope_type"]
    if rope not in _KEYED_ROPE and not (rope == "llama3" and found.arch is gguf.MODEL_ARCH.LLAMA):
        raise LlmqError(
            f"rope_type {rope!r} cannot be expressed for llama.cpp's {found.name!r} ({', '.join(_KEYED_ROPE)}, and "
            "llama3 for llama); remove the scaling from config.json and stay within the trained context"
        )
    return found


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters with `rope_theta` and `rope_type` filled in, from either spelling of a config."""
    given = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    given.setdefault("rope_type", given.pop("type", None) or "default")
    given.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return given


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Return what each rotary frequency is divided by: 1 for short wavelengths, `factor` for long, smooth between.

    Source: Llama 3.1's rope scaling as transformers computes it (`_compute_llama3_parameters`).
    """
    frequency = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the trained context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
