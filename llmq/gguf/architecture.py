"""What llama.cpp calls a model: architecture, hyper-parameter keys, tensor names, and how tensors are stored.

Hugging Face rotates channel i of a head with channel i + d/2; some of ggml's graphs rotate neighbours 2i and 2i + 1, so
that rows 0 .. d/2-1 and d/2 .. d-1 of every head of q and k are interleaved. Rows are independent in every quantizer:
reordering packed rows equals packing reordered rows. ggml's norms multiply by their weight: where transformers' do by
1 + weight (Gemma), 1 + weight is stored.

An architecture of llama.cpp is a program (programs.py), and what transformers makes of the config is held against it
(differences.py): it is written, or refused, whatever the key is called.
Source: the `gguf` package's tensor map; llama.cpp's `conversion/*.py` and `src/models/*.cpp` for what is read.
Not here: rotary embedding (rope.py), the tokenizer (tokenizer.py), types of tensors (mixture.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.gguf import delta_net, latent, mixture
from llmq.gguf.differences import differences
from llmq.gguf.programs import PROGRAMS, Program, period_of
from llmq.gguf.rope import Reads, Rotary, rotary
from llmq.gguf.varied import Varied, add_names, varied
from llmq.model.config import head_dim, kv_heads
from llmq.model.experts import unfuse
from llmq.model.norms import gain, is_norm
from llmq.model.pretrained import auto_class, foreign

_DROPPED = (".rotary_emb.inv_freq",)  # buffers of old checkpoints that every runtime computes itself
_BESIDE = (".scale", ".input_scale")  # what llama.cpp reads beside a weight (grids/_ggml_floats.py)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+\.(?:weight|bias|scale|input_scale))")
_ALIASES = {  # parameters that are no module's weight or bias; a router that was renamed; experts that are fused there
    r"\.dt_bias$": ".dt_proj.bias",
    r"\.sinks$": ".sinks.weight",
    r"\.layer_scalar$": ".layer_scalar.weight",
    r"\.router\.scale$": ".router.proj.scale",
    r"\.router\.per_expert_scale$": ".experts.down_proj.scale",
    r"\.e_score_correction_bias$": ".e_score_correction.bias",
    r"\.block_sparse_moe\.router\.weight$": ".block_sparse_moe.router.layer.weight",
    r"\.block_sparse_moe\.experts\.(?=\w+\.weight$)": ".mlp.experts.",
}
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Architecture:
    """One model's place in llama.cpp, made from its transformers config by `architecture`.

    config: of the language model.
    program: what llmq knows of the architecture in llama.cpp.
    rope: the rotary embedding.
    local: that of blocks with a window, where they have their own.
    windows: how far back attention sees in every block, 0 for all the way.
    varied: what differs between blocks, where the file says it of each.
    shifted: the norms that multiply by 1 + weight.
    parameters: the names of the tensors that transformers' language model has.
    tied: whether the head is the embedding, which the file then holds alone.
    decoder: what the names of the decoder's tensors begin with: `model`, but for a language model within a larger one.
    """

    config: Any
    program: Program
    rope: Rotary
    local: Rotary | None
    windows: tuple[int, ...]
    varied: Varied | None
    shifted: frozenset[str]
    parameters: frozenset[str]
    tied: bool
    decoder: str

    @property
    def name(self) -> str:
        """The value of `general.architecture`."""
        return self.program.name

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
    def large(self) -> bool:
        """Whether this is what llama.cpp calls a 70B model, whose attn_v gets more bits."""
        grouped = self.config.num_attention_heads != self.kv_heads
        return self.blocks == 80 and (self.name == "qwen2" or (self.name == "llama" and grouped))

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        names = gguf.get_tensor_name_map(self.program.arch, self.blocks)
        if self.varied is not None:
            add_names(names, self.blocks)
        return names

    def tensor(self, name: str) -> str | None:
        """Return ggml's name of a checkpoint tensor, None for one that is not written.

        Raises LlmqError for a tensor that transformers' model or this architecture has no place for.
        """
        if self.beside(name):
            return None
        if self._is_factor(name):
            module, _, leaf = name.rpartition(".")
            of = self.tensor(f"{module}.weight")
            return None if of is None else f"{of.removesuffix('weight')}{leaf}"
        name = self._plain(name)
        one = _EXPERT.fullmatch(name)
        if name.endswith(_DROPPED) or (self.tied and name == "lm_head.weight"):
            return None
        merged = f"{one[1]}.{one[3]}" if one else name
        for pattern, known in _ALIASES.items():
            merged = re.sub(pattern, known, merged)
        found = self._names.get_name(merged, try_suffixes=(".weight", ".bias", ".scale"))
        if name not in self.parameters:
            raise LlmqError(
                f"tensor {name} has no place in the model that config.json describes; correct config.json, or leave "
                "out what was added to the checkpoint"
            )
        if found is None or not self._reads(found):
            raise LlmqError(f"llama.cpp's architecture {self.name!r} has no tensor {name}; write another format")
        return found

    def expert(self, name: str) -> int | None:
        """Return the number of the expert that a checkpoint tensor is of; one tensor of the file holds those of all."""
        found = _EXPERT.fullmatch(self._plain(name))
        return int(found[2]) if found else None

    @property
    def experts(self) -> int:
        """How many experts a block has, 0 where it has none."""
        return next((int(getattr(self.config, k)) for k, v in self.program.counts.items() if v == "expert_count"), 0)

    @property
    def factors(self) -> frozenset[str]:
        """The linears, by ggml's name within a block, whose product llama.cpp multiplies by a factor of the file.

        It refuses one, by ending itself, where the linear has a bias too and is no attention's.
        """
        biased = any(".mlp." in n and n.endswith(".bias") for n in self.parameters)
        attention = {"attn_output"} if self.program.latent else {*_ATTENTION}
        return frozenset(attention) | (frozenset() if biased else frozenset(self.program.factors))

    def beside(self, name: str) -> bool:
        """Say whether a checkpoint tensor is of another part than the language model, such as one that reads images."""
        return self.decoder != "model" and not name.startswith((f"{self.decoder}.", "lm_head."))

    def _is_factor(self, name: str) -> bool:
        """Say whether a tensor lies beside a weight that was quantized, and is none of the model's own."""
        return name.endswith(_BESIDE) and self._plain(name) not in self.parameters

    def _plain(self, name: str) -> str:
        """Return the name that a tensor has where the language model stands alone."""
        return f"model{name.removeprefix(self.decoder)}" if name.startswith(f"{self.decoder}.") else name

    def _reads(self, ggml: str) -> bool:
        linear, _, leaf = ggml.removeprefix("blk.").partition(".")[2].rpartition(".")
        return leaf != "bias" or linear in self.program.biases

    def stored(self, name: str, tensor: Tensor, kind: str) -> Tensor:
        """Return a tensor of the checkpoint, floats or packed rows of a ggml type, as the file holds it."""
        if self._is_factor(name):
            return tensor if self.expert(name) is None else tensor.reshape(())
        if self._plain(name) in self.shifted:
            tensor = 1 + tensor.float()
        if self.program.delta and tensor.is_floating_point():
            tensor = delta_net.value(name, tensor)
        if name.endswith(".shared_expert_gate.weight"):
            tensor = tensor.squeeze(0)
        rows, columns = self.rows(name), self.columns(name)
        if columns is not None:
            size = mixture.qblock(kind)
            pieces = tensor.unflatten(1, (len(columns) // size, -1))
            tensor = pieces[:, columns[::size] // size].flatten(1)
        return tensor if rows is None else tensor[rows]

    def shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in which a tensor is stored."""
        return tuple(self.stored(name, torch.empty(tuple(shape), device="meta"), "F32").shape)

    def columns(self, name: str) -> Tensor | None:
        """Return the order in which the columns of a linear are written (int64 `[K]`), None for as it is."""
        return delta_net.columns(self.config, name) if self.program.delta else None

    def together(self, name: str, K: int) -> int:
        """Return how many of the K columns of a linear stay together, which blocks of its type must divide."""
        return K if self.columns(name) is None else int(self.config.linear_value_head_dim)

    def rows(self, name: str) -> Tensor | None:
        """Return the order in which the rows of a checkpoint tensor are written (int64 `[N]`), None for as it is."""
        if self.program.delta:
            return delta_net.rows(self.config, name)
        if not self.program.interleaved:
            return None
        leaf = name.rpartition("self_attn.")[2]
        heads = {"q_proj": int(self.config.num_attention_heads), "k_proj": self.kv_heads}.get(leaf.partition(".")[0])
        if heads is None or leaf.rpartition(".")[2] not in ("weight", "bias"):
            return None
        return torch.arange(heads * self.head_dim).reshape(heads, 2, self.head_dim // 2).transpose(1, 2).reshape(-1)

    def extra(self) -> dict[str, Tensor]:
        """Return tensors that no checkpoint holds, by ggml's names: the rotary divisors, float32 `[d/2]`."""
        return self.rope.tables

    def warnings(self) -> list[str]:
        """Return what a user of the file should know that the model's config does not say."""
        found = []
        if self.context < self.config.max_position_embeddings:
            found.append(
                f"llama.cpp's {self.name} has no sliding window, this model's is {max(self.windows)} tokens: the file "
                f"says that its context is {self.context} tokens, up to which both compute the same"
            )
        own = self.program.reads.table  # which every reader of the architecture must know
        if self.rope.divisors is not None and not own and self.config.rope_parameters["rope_type"] != "llama3":
            found.append(
                "llama.cpp's keys alone cannot say this rotary scaling, so that a table of frequencies "
                "(rope_freqs.weight) is in the file; readers other than llama.cpp may pass over it"
            )
        if self.rope.off:
            found.append(
                f"llama.cpp rounds the ends of the ramp of this rotary scaling: its frequencies are off by up to "
                f"{self.rope.off:.1%}, as in every GGUF file of {self.name}"
            )
        if self.rope.factors:
            found.append(
                f"llama.cpp takes the frequencies of long texts wherever it is started with a context of more than "
                f"{self.rope.context} tokens (-c), transformers where the text itself is longer"
            )
        return found

    @property
    def context(self) -> int:
        """How many tokens the model is trained for and llama.cpp computes rightly."""
        trained = int(self.config.max_position_embeddings)
        return trained if self.program.period else min(trained, max(self.windows, default=0) or trained)

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the hyper-parameter keys."""
        config = self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.blocks)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if self.varied is None:
            self._describe_blocks(writer)
        else:
            self.varied.describe(writer)
        self.rope.describe(writer)
        self._describe_windows(writer)
        for key in self.program.caps:
            if getattr(config, key):
                getattr(writer, f"add_{key}")(getattr(config, key))
        if self.program.delta:
            delta_net.keys(config, writer)
        if self.program.gating is not None:
            writer.add_expert_gating_func(self.program.gating)
        for key, method in (*self.program.multipliers.items(), *self.program.counts.items()):
            getattr(writer, f"add_{method}")(getattr(config, key))

    def _describe_blocks(self, writer: gguf.GGUFWriter) -> None:
        """Add the sizes of blocks that are all alike."""
        if getattr(self.config, "intermediate_size", None):
            writer.add_feed_forward_length(self.config.intermediate_size)
        writer.add_head_count_kv(self.kv_heads)
        if self.program.latent:
            latent.keys(self.config, writer)
        else:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def _describe_windows(self, writer: gguf.GGUFWriter) -> None:
        """Add how far blocks see, and the rotary embedding of those that do not see all the way."""
        if self.program.period:
            full = [not w for w in self.windows]
            writer.add_sliding_window(max(self.windows) or self.context)
            writer.add_sliding_window_pattern(
                period_of(full, self.program.period) if self.varied is None else self.varied.windowed
            )
        if self.local is not None:
            writer.add_rope_freq_base_swa(self.local.base)
        if self.local is not None and self.varied is not None:
            writer.add_rope_dimension_count_swa(self.local.d)


def architecture(config: Any) -> Architecture:
    """Return the architecture of a transformers config, which says of the head what is true (`names.own_head`).

    Raises LlmqError for a model that no entry of PROGRAMS covers, and for one that computes another function than
    llama.cpp does.
    """
    text = config.get_text_config()
    if text.model_type not in PROGRAMS:
        raise LlmqError(
            f"model_type {text.model_type!r} is not among those written as GGUF ({', '.join(PROGRAMS)}); use --format "
            "gptq, awq or compressed-tensors"
        )
    program, model = _program(text), _model(text)
    windows = tuple(_window(text, block) for block in model.model.layers)
    for reason in differences(config, model, program, windows):
        raise LlmqError(f"{reason}, which llama.cpp's {program.name} does not compute; write another format")
    rope, local = _rotary(text, model, program)
    shifted = frozenset(f"{n}.weight" for n, m in model.named_modules() if is_norm(m) and gain(m, text.rms_norm_eps))
    unfuse(model)
    names, tied = frozenset(model.state_dict()), bool(config.tie_word_embeddings)
    differing = varied(text, model, windows) if program.varied else None
    return Architecture(text, program, rope, local, windows, differing, shifted, names, tied, _decoder(config))


def _program(config: Any) -> Program:
    """Return the program of a config, without experts where it is one that has none."""
    program = PROGRAMS[config.model_type]
    without = program.optional and not getattr(config, program.optional)
    return replace(program, counts={}) if without else program


def _model(config: Any) -> Any:
    """Return transformers' model without weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def _decoder(config: Any) -> str:
    """Return the name of the decoder of the language model within the model of a config."""
    if config.get_text_config() is config:
        return "model"
    model = _model(config)
    return next(n for n, m in model.named_modules() if m is model.get_decoder())


def _rotary(config: Any, model: Any, program: Program) -> tuple[Rotary, Rotary | None]:
    """Return the rotary embedding of the blocks, and that of those with a window where it is their own."""
    with foreign("config.json, rope_parameters"):
        embedding = type(model.model.rotary_emb)(config)
        if not program.local:
            found = rotary(embedding, config, head_dim(config), program.reads)
            return (latent.turned(found, config, model) if program.latent else found), None
        kinds = [kind for kind in (_FULL, _SLIDING) if kind in config.layer_types]
        first, *more = [_of_kind(embedding, config, program, kind) for kind in kinds]
    local = more[0] if more else first
    if local.kind != "none" or "yarn" in (first.kind, local.kind) or {first.attn_factor, local.attn_factor} != {1}:
        raise LlmqError(
            f"llama.cpp's {program.name} turns blocks with a window without scaling, and scales others linearly at "
            "most; write another format, or take the scaling out of config.json"
        )
    return first, local


def _of_kind(embedding: Any, config: Any, program: Program, kind: str) -> Rotary:
    """Return the rotary embedding of the blocks of one layer type; a table is read for those without a window."""
    d = head_dim(config, config.layer_types.index(kind))
    return rotary(embedding, config, d, Reads() if kind == _SLIDING else program.reads, kind)


def _window(config: Any, block: nn.Module) -> int:
    """Return how far back the attention of a block sees, 0 for all the way."""
    own = getattr(getattr(block, "self_attn", None), "sliding_window", None)
    return int((config.sliding_window if config.model_type in ("mistral", "mixtral", "phi3") else own) or 0)
