"""What llama.cpp calls a model: architecture, hyper-parameter keys, tensor names, and the order of q and k rows.

    model_type        architecture   q and k rows    frequency table   biases read
    llama, mistral    llama          reordered       yes               of every linear
    qwen2             qwen2          as they are     no                of q, k, v
    qwen3             qwen3          as they are     no                of q, k, v

Hugging Face rotates channel i of a head with channel i + d/2, ggml's `llama` graph rotates neighbours 2i and 2i + 1, so
that rows 0 .. d/2-1 and d/2 .. d-1 of every head are interleaved. Rows are independent in every quantizer: reordering
packed rows equals packing reordered rows.

An architecture of llama.cpp is a program, and a config can ask transformers for another one under the same model_type
(another activation, a window, attention both ways). So what decides the function is read from the modules that
transformers makes of the config: it is written, or refused, whatever the key is called.
Source: the `gguf` package's tensor map; llama.cpp's `conversion/llama.py` and `src/models/*.cpp` for what is read.
Not here: rotary embedding (rope.py), the tokenizer (tokenizer.py), types of tensors (mixture.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.gguf.rope import Rotary, rotary
from llmq.model.config import head_dim, kv_heads
from llmq.model.pretrained import foreign

_ATTENTION = ("attn_q", "attn_k", "attn_v")
_DROPPED = (".rotary_emb.inv_freq",)  # buffers of old checkpoints that every runtime computes itself


@dataclass(frozen=True)
class _Program:
    """What one architecture of llama.cpp computes.

    biases: which linears' it reads. table: whether it reads `rope_freqs.weight`. square: whether all heads together
    must have as many channels as the residual stream.
    """

    arch: gguf.MODEL_ARCH
    biases: tuple[str, ...] = _ATTENTION
    table: bool = False
    square: bool = False


_LLAMA = _Program(gguf.MODEL_ARCH.LLAMA, (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"), table=True)
_PROGRAMS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Program(gguf.MODEL_ARCH.QWEN2, square=True),
    "qwen3": _Program(gguf.MODEL_ARCH.QWEN3),
}


@dataclass(frozen=True)
class Architecture:
    """One model's place in llama.cpp, made from its transformers config by `architecture`.

    window: how far back attention sees, 0 for all the way.
    parameters: the names of the tensors that transformers' model has.
    """

    config: Any
    program: _Program
    rope: Rotary
    window: int
    parameters: frozenset[str]

    @property
    def name(self) -> str:
        """The value of `general.architecture`."""
        return gguf.MODEL_ARCH_NAMES[self.program.arch]

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return kv_heads(self.config)

    @property
    def gqa(self) -> int:
        """Query heads for every key-value head."""
        return int(self.config.num_attention_heads) // self.kv_heads

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

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(self.program.arch, self.blocks)

    def tensor(self, name: str) -> str | None:
        """Return ggml's name of a checkpoint tensor, None for one that is not written.

        Raises LlmqError for a tensor that transformers' model or this architecture has no place for.
        """
        if name.endswith(_DROPPED) or (self.tied and name == "lm_head.weight"):
            return None
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name not in self.parameters:
            raise LlmqError(
                f"tensor {name} has no place in the model that config.json describes; correct config.json, or leave "
                "out what was added to the checkpoint"
            )
        if found is None or not self._reads(found):
            raise LlmqError(f"llama.cpp's architecture {self.name!r} has no tensor {name}; write another format")
        return found

    def _reads(self, ggml: str) -> bool:
        linear, _, leaf = ggml.removeprefix("blk.").partition(".")[2].rpartition(".")
        return leaf != "bias" or linear in self.program.biases

    def rows(self, name: str) -> Tensor | None:
        """Return the order in which the rows of a checkpoint tensor are written (int64 `[N]`), None for as it is."""
        if self.program is not _LLAMA:
            return None
        leaf = name.rpartition("self_attn.")[2]
        heads = {"q_proj": int(self.config.num_attention_heads), "k_proj": self.kv_heads}.get(leaf.partition(".")[0])
        if heads is None or leaf.rpartition(".")[2] not in ("weight", "bias"):
            return None
        return torch.arange(heads * self.head_dim).reshape(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def extra(self) -> dict[str, Tensor]:
        """Return tensors that no checkpoint holds, by ggml's names: the rotary divisors, float32 `[d/2]`."""
        return {} if self.rope.divisors is None else {"rope_freqs.weight": self.rope.divisors}

    def warnings(self) -> list[str]:
        """Return what a user of the file should know that the model's config does not say."""
        found = []
        if self.context < self.config.max_position_embeddings:
            found.append(
                f"llama.cpp's {self.name} has no sliding window, this model's is {self.window} tokens: the file says "
                f"that its context is {self.context} tokens, up to which both compute the same"
            )
        if self.rope.divisors is not None and self.config.rope_parameters["rope_type"] != "llama3":
            found.append(
                "llama.cpp's keys alone cannot say this rotary scaling, so that a table of frequencies "
                "(rope_freqs.weight) is in the file; readers other than llama.cpp may pass over it"
            )
        return found

    @property
    def context(self) -> int:
        """How many tokens the model is trained for and llama.cpp computes rightly."""
        return min(self.config.max_position_embeddings, self.window or self.config.max_position_embeddings)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the hyper-parameter keys."""
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.blocks)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        self.rope.describe(writer)


def architecture(config: Any) -> Architecture:
    """Return the architecture of a transformers config, which says of the head what is true (`names.own_head`).

    Raises LlmqError for a model that llama.cpp's tables here do not cover, and for one that computes another function
    than llama.cpp does.
    """
    kind = config.model_type
    if kind not in _PROGRAMS:
        raise LlmqError(
            f"model_type {kind!r} is not among those written as GGUF ({', '.join(_PROGRAMS)}); use --format gptq, "
            "awq or compressed-tensors"
        )
    program, model = _PROGRAMS[kind], _model(config)
    for reason in _differences(config, model, program):
        raise LlmqError(f"{reason}, which llama.cpp's {kind} does not compute; write another format")
    with foreign("config.json, rope_parameters"):
        rope = rotary(type(model.model.rotary_emb)(config), config, head_dim(config), divisors=program.table)
    return Architecture(
        config,
        program,
        rope,
        max((_window(config, block) for block in model.model.layers), default=0),
        frozenset(model.state_dict()),
    )


def _model(config: Any) -> Any:
    """Return transformers' model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _differences(config: Any, model: Any, program: _Program) -> Iterator[str]:
    """Yield what transformers computes otherwise than a program of llama.cpp, as the subject of a sentence."""
    probe, d = torch.linspace(-4, 4, 33), head_dim(config)
    if not 0 < config.max_position_embeddings < 2**32:
        yield f"config.json asks for {config.max_position_embeddings:,} positions"
    if not 0 <= config.rms_norm_eps < 1e30:
        yield f"norms add {config.rms_norm_eps}"
    if not getattr(config, "is_causal", True):
        yield "config.json asks for attention both ways (is_causal false)"
    if d % 2 or (program.square and d * config.num_attention_heads != config.hidden_size):
        yield f"{config.num_attention_heads} heads of {d} channels for a residual stream of {config.hidden_size}"
    for block in model.model.layers[:1]:
        if not torch.allclose(block.mlp.act_fn(probe), nn.functional.silu(probe), atol=1e-6):
            yield f"config.json asks for the activation {config.hidden_act!r}"
        if abs(block.self_attn.scaling - d**-0.5) > 1e-6 * d**-0.5:
            yield f"attention is scaled by {block.self_attn.scaling}"
        if block.input_layernorm.variance_epsilon != config.rms_norm_eps:
            yield f"norms add {block.input_layernorm.variance_epsilon}"


def _window(config: Any, block: nn.Module) -> int:
    """Return how far back the attention of a block sees, 0 for all the way."""
    own = getattr(block.self_attn, "sliding_window", None)
    return int((config.sliding_window if config.model_type == "mistral" else own) or 0)
