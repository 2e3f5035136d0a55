"""What each architecture of llama.cpp computes, as far as models of Hugging Face differ in it.

    model_type        architecture   of its own
    llama, mistral    llama          q and k rows interleaved, a table of frequencies, biases of every linear
    qwen2             qwen2          biases of q, k, v
    qwen3             qwen3          norms of every head of q and k
    gemma2            gemma2         windows in every other block, tanh caps on attention and logits, four norms
    gemma3_text       gemma3         windows in five blocks of six, turned by a base of their own
    gemma4_text       gemma4         heads of two widths, values normed, an embedding for each block (varied.py)
    phi3              phi3           q, k, v in one linear, gate and up in one; part of a head may be turned
    olmo2             olmo2          norms behind attention and MLP only, over all heads of q and k together
    granite           granite        as llama, with four multipliers
    glm4              glm4           neighbours of half a head are turned, gate and up in one linear
    smollm3           smollm3        as llama, every fourth block without rotary embedding
    qwen3_5_text      qwen35         gated attention beside linear attention (delta_net.py)
    qwen3_moe         qwen3moe       experts in every block, their weights made to add up to 1
    qwen2_moe         qwen2moe       experts in every block beside one that is shared, their weights as they are
    olmoe             olmoe          norms over all heads of q and k together; experts as qwen2_moe's, none shared
    glm4_moe          glm4moe        half a head turned, some dense blocks first, experts chosen by sigmoids and a bias
    deepseek_v2, _v3  deepseek2      keys and values of a latent; some dense blocks first, experts in groups (V3)
    mixtral           llama          as llama, experts in every block
    granitemoe        granitemoe     as granite, experts in every block
    gpt_oss           gpt-oss        windows in every other block, sinks, experts with biases and a clamped gate
    qwen3_5_moe_text  qwen35moe      as qwen35, experts in every block beside one that is shared

A program is compiled in: what it does not read from a key of the file (a period of four, a cap, a scale of attention)
it assumes, so an entry here says what is assumed, and differences.py holds the model against it.
Source: llama.cpp `src/models/*.cpp`, `src/llama-model.cpp` (llama_model_rope_type) and `conversion/*.py`.
Not here: names of tensors (the `gguf` package's map), rotary embedding by value (rope.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
from torch import Tensor, nn
from torch.nn import functional as F

from llmq.gguf.rope import Reads
from llmq.model.config import head_dim

_ATTENTION = ("attn_q", "attn_k", "attn_v")
_LINEARS = (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_GATED, _ROUTED_TO = ("ffn_gate", "ffn_up", "ffn_down"), ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_LINEAR = ("attn_gate", "ssm_out", "ssm_alpha", "ssm_beta")
_KEYS, _TABLE, _PARTIAL = Reads(), Reads(divisors=True), Reads(partial=True)


def _by_head(config: Any) -> float:
    return head_dim(config) ** -0.5


def _not_at_all(_config: Any) -> float:
    return 1.0


def _by_stream(blocks: int) -> Callable[[Any], float]:
    """Return Gemma's scale: of the 27B model, told by its number of blocks, the residual stream's share of a head."""

    def scale(config: Any) -> float:
        large = config.num_hidden_layers == blocks
        return (config.hidden_size // config.num_attention_heads) ** -0.5 if large else _by_head(config)

    return scale


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Program:
    """One architecture of llama.cpp.

    biases: the linears whose biases it reads.
    interleaved: whether rows 0 .. d/2-1 and d/2 .. d-1 of every head of q and k take turns in the file.
    reads: what it reads of a rotary embedding.
    square: whether all heads together must have as many channels as the residual stream.
    paired: whether there must be a key-value head for every query head.
    untied: whether the output head must be a tensor of its own.
    activation: between up and down; None for gpt-oss's clamped gate.
    scaled: whether embeddings are multiplied by the root of their width.
    scale: what attention scores are multiplied by, as a function of the config; None where a key says it.
    period: of every so many blocks the last sees all tokens, the others a window; 0 where it knows no windows.
    local: whether blocks with a window have a rotary base of their own.
    nope: of every so many blocks the last has no rotary embedding; 0 where all have one.
    varied: whether blocks may differ in their heads, MLPs, keys and values (varied.py); windows are then said of each.
    caps: keys of the config for tanh caps, which methods of the writer of the same names add.
    capped: whether it caps whatever the keys say.
    within: whether transformers applies caps to a language model within a larger model too.
    multipliers: methods of the writer by keys of the config, whose values are numbers other than 0.
    delta: whether there are blocks of linear attention (delta_net.py).
    latent: whether keys and values are made of a latent (latent.py).
    counts: methods of the writer by keys of the config that are whole numbers about experts; every block then has some,
        but for as many of the first as `first_k_dense_replace` says where that is among them.
    optional: the key of the config without which no block has experts; empty where all have.
    normed: whether the weights of a token's experts are made to add up to 1, None where a key says it.
    gating: what makes weights of a router's outputs, where a key says it.
    factors: the linears beside those of attention whose product it multiplies by a factor of the file (`NAME.scale`);
        of others it passes over it without a word.
    """

    arch: gguf.MODEL_ARCH
    biases: tuple[str, ...] = _ATTENTION
    interleaved: bool = False
    reads: Reads = _KEYS
    square: bool = False
    paired: bool = False
    untied: bool = False
    activation: Callable[[Tensor], Tensor] | None = nn.functional.silu
    scaled: bool = False
    scale: Callable[[Any], float] | None = _by_head
    period: int = 0
    local: bool = False
    nope: int = 0
    varied: bool = False
    caps: tuple[str, ...] = ()
    capped: bool = False
    within: bool = False
    multipliers: Mapping[str, str] = field(default_factory=dict)
    delta: bool = False
    latent: bool = False
    counts: Mapping[str, str] = field(default_factory=dict)
    optional: str = ""
    normed: bool | None = True
    gating: gguf.ExpertGatingFuncType | None = None
    factors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The value of `general.architecture`."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


def period_of(full: Sequence[bool], usual: int = 1) -> int:
    """Return n where of every n blocks the last, and no other, attends to all tokens; 0 where there is no such n.

    full: whether each block does. usual: the n to take where it fits, before the least.
    """
    for n in (usual, *range(1, len(full) + 2)):
        if all(sees == (i % n == n - 1) for i, sees in enumerate(full)):
            return n
    return 0


_ARCH = gguf.MODEL_ARCH
_LLAMA = Program(_ARCH.LLAMA, _LINEARS, interleaved=True, reads=_TABLE, factors=_GATED)
_ROUTED = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
           "moe_intermediate_size": "expert_feed_forward_length"}  # fmt: skip
_SHARED = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_LOCAL = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_BESIDE = {"num_experts": "expert_count", "top_k_experts": "expert_used_count",
           "moe_intermediate_size": "expert_feed_forward_length"}  # fmt: skip
_FINAL = "final_logit_softcapping"
_MULTIPLIERS = {"attention_multiplier": "attention_scale", "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}  # fmt: skip
_DENSE_FIRST = {"n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                "n_shared_experts": "expert_shared_count", "moe_intermediate_size": "expert_feed_forward_length",
                "first_k_dense_replace": "leading_dense_block_count"}  # fmt: skip
_FACTOR = {"routed_scaling_factor": "expert_weights_scale"}
PROGRAMS: Mapping[str, Program] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Program(_ARCH.QWEN2, square=True),
    "qwen3": Program(_ARCH.QWEN3, factors=_GATED),
    "gemma2": Program(
        _ARCH.GEMMA2, (), activation=_gelu, scaled=True, scale=_by_stream(46), period=2,
        caps=("attn_logit_softcapping", _FINAL), capped=True,
    ),
    "gemma3_text": Program(
        _ARCH.GEMMA3, (), activation=_gelu, scaled=True, scale=_by_stream(62), period=6, local=True, caps=(_FINAL,),
    ),
    "gemma4_text": Program(
        _ARCH.GEMMA4, (), reads=Reads(table=True), activation=_gelu, scaled=True, scale=_not_at_all, period=6,
        local=True, varied=True, caps=(_FINAL,), within=True, optional="enable_moe_block",
        counts=_BESIDE, factors=(*_GATED, *_ROUTED_TO[:2]),
    ),
    "phi3": Program(_ARCH.PHI3, (), reads=Reads(factors=True, partial=True), square=True),
    "olmo2": Program(_ARCH.OLMO2, (), square=True, untied=True),
    "granite": Program(
        _ARCH.GRANITE, _LINEARS, interleaved=True, reads=_TABLE, scale=None, multipliers=_MULTIPLIERS,
    ),
    "glm4": Program(_ARCH.GLM4, reads=_PARTIAL),
    "smollm3": Program(_ARCH.SMOLLM3, interleaved=True, nope=4),
    "qwen3_5_text": Program(
        _ARCH.QWEN35, ("ssm_dt",), reads=_PARTIAL, delta=True, factors=(*_GATED, *_LINEAR)
    ),
    "qwen3_moe": Program(_ARCH.QWEN3MOE, counts=_ROUTED, factors=_ROUTED_TO),
    "qwen2_moe": Program(_ARCH.QWEN2MOE, counts=_ROUTED | _SHARED, normed=False),
    "olmoe": Program(
        _ARCH.OLMOE, (), square=True, paired=True, normed=False,
        counts={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    ),
    "glm4_moe": Program(
        _ARCH.GLM4_MOE, (*_ATTENTION, "exp_probs_b"), reads=_PARTIAL, normed=None,
        gating=gguf.ExpertGatingFuncType.SIGMOID,
        counts=_DENSE_FIRST | {"norm_topk_prob": "expert_weights_norm"}, multipliers=_FACTOR,
    ),
    "deepseek_v2": Program(
        _ARCH.DEEPSEEK2, (), reads=_PARTIAL, paired=True, scale=None, latent=True, normed=None, counts=_DENSE_FIRST,
        gating=gguf.ExpertGatingFuncType.SOFTMAX, multipliers=_FACTOR,
    ),
    "deepseek_v3": Program(
        _ARCH.DEEPSEEK2, ("exp_probs_b",), reads=_PARTIAL, paired=True, scale=None, latent=True, normed=None,
        gating=gguf.ExpertGatingFuncType.SIGMOID, multipliers=_FACTOR, counts=_DENSE_FIRST | {
            "norm_topk_prob": "expert_weights_norm", "n_group": "expert_group_count",
            "topk_group": "expert_group_used_count",
        },
    ),
    "mixtral": Program(
        _ARCH.LLAMA, _LINEARS, interleaved=True, reads=_TABLE, counts=_LOCAL, factors=_ROUTED_TO
    ),
    "granitemoe": Program(
        _ARCH.GRANITE_MOE, _LINEARS, interleaved=True, reads=_TABLE, scale=None, multipliers=_MULTIPLIERS,
        counts=_LOCAL,
    ),
    "gpt_oss": Program(
        _ARCH.GPT_OSS, (*_ATTENTION, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        untied=True, activation=None, reads=Reads(blunt=True), period=2,
        counts=_LOCAL | {"intermediate_size": "expert_feed_forward_length"},
    ),
    "qwen3_5_moe_text": Program(
        _ARCH.QWEN35MOE, ("ssm_dt",), reads=_PARTIAL, delta=True,
        counts=_ROUTED | _SHARED, factors=(*_ROUTED_TO, *(f"{n}_shexp" for n in _GATED), *_LINEAR),
    ),
}  # fmt: skip
"""By transformers' model_type."""
