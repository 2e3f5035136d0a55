"""What the keys of a GGUF file say, as the config of a transformers model; and ggml's names and order as transformers'.

Of llmq's code that writes GGUF nothing is used, so that a slip there is not repeated here. Every architecture is an
entry: the model_type, the tensors of a block that transformers calls otherwise than Llama's, how rows and norms are
stored, and what of the config its own keys say.
Source: llama.cpp `src/models/*.cpp`; transformers' configs.
Not here: reading tensors (ggml.py), rotary embedding, which is put in by value (ggml.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmq.errors import LlmqError
from llmq.gguf.reader import GgufFile, Stored
from llmq.verify import delta_net, gemma4
from llmq.verify.decode import Array

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"} | gemma4.OUTSIDE
_IN_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_MOST, _BLOCKS, _CHANNELS = 2**31 - 1, 512, 2**16  # llama.cpp reads no more blocks; a head has hundreds of channels
_LEAST, _GREATEST = 1e-38, 1e38  # float32
_SOFTMAX = 1  # of expert_gating_func


class Keys:
    """The keys of a file's architecture: `keys.number("block_count")`, without its prefix. of: another prefix.

    A file may hold any type under any name, so a value is asked for by what it must be. Every method returns its
    default where there is no such key, and raises LlmqError for one that is missing without a default, and for a value
    of another type or range.
    """

    def __init__(self, file: GgufFile, of: str | None = None) -> None:
        self.file, self.arch = file, str(file.value("general.architecture")) if of is None else of

    def number(self, key: str, *default: int | None, zero: bool = False, most: int = _MOST) -> Any:
        """Return a whole number above 0. zero: whether it may be 0."""
        least = 0 if zero else 1
        kind = f"whole number from {least} to {most}"
        return self._value(key, default, lambda v: type(v) is int and least <= v <= most, kind)

    def real(self, key: str, *default: float | None, zero: bool = False) -> Any:
        """Return a number above 0. zero: whether it may be 0."""
        kind = f"finite number {'of at least' if zero else 'above'} 0"
        return self._value(key, default, lambda v: _is_real(v) and (v >= _LEAST or (zero and v == 0)), kind)

    def flag(self, key: str, *default: bool) -> Any:
        """Return true or false."""
        return self._value(key, default, lambda v: isinstance(v, bool), "bool")

    def text(self, key: str, *default: str) -> Any:
        """Return a string."""
        return self._value(key, default, lambda v: isinstance(v, str), "text")

    def scaling(self) -> float:
        """Return the factor of the rotary embedding's scaling, 1 where there is none; llama.cpp takes 0 for none."""
        return self.real("rope.scaling.factor", 0.0, zero=True) or 1.0

    def first(self, key: str, count: int) -> list[int]:
        """Return the first numbers of an array of whole numbers."""
        kind = f"array of {count} whole numbers or more"
        return self._value(key, (), lambda v: _is_whole(v) and len(v) >= count, kind)[:count].tolist()

    def channels(self, key: str, *default: int) -> int:
        """Return a number of channels of a head, above 0."""
        return self.number(key, *default, most=_CHANNELS)

    def blocks(self) -> int:
        """Return how many blocks there are."""
        return self.number("block_count", most=_BLOCKS)

    def each(self, key: str, *default: int, zero: bool = False) -> list[int]:
        """Return a whole number above 0 for each block: an array, or one for all. zero: whether also 0 and false."""
        blocks, least = self.blocks(), 0 if zero else 1
        kind = f"whole number from {least} to {_MOST} for each of {blocks} blocks"
        said = self._value(key, default, lambda v: _is_each(v, blocks, "iub" if zero else "iu", least), kind)
        return [int(n) for n in np.broadcast_to(said, blocks)]

    def _value(self, key: str, default: tuple[Any, ...], good: Callable[[Any], bool], kind: str) -> Any:
        name = f"{self.arch}.{key}"
        value = self.file.value(name)
        if value is None and not default:
            raise LlmqError(f"{self.file.path}: key {name} is missing")
        if value is None:
            return default[0]
        if not good(value):
            raise LlmqError(f"{self.file.path}: key {name} is no {kind}; download or write the file again")
        return value


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and value <= _GREATEST  # a bool is none; nor is NaN


def _is_whole(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu"


def _is_each(value: Any, blocks: int, kinds: str, least: int) -> bool:
    if not isinstance(value, int | np.ndarray):
        return False
    said = np.array(value)
    whole = said.dtype.kind in kinds and said.shape in ((), (blocks,))
    return whole and bool(least <= said.min() <= said.max() <= _MOST)


def _nothing(_keys: Keys) -> dict[str, Any]:
    return {}


def _windows(keys: Keys, period: int) -> dict[str, Any]:
    """Return the windows of blocks: of every `period` the last sees all the way."""
    period, blocks = keys.number("attention.sliding_window_pattern", period), range(keys.blocks())
    kinds = ["sliding_attention" if i % period < period - 1 else "full_attention" for i in blocks]
    return {"sliding_window": keys.number("attention.sliding_window"), "layer_types": kinds}


def _gemma(large: int, period: int) -> Callable[[Keys], dict[str, Any]]:
    def config(keys: Keys) -> dict[str, Any]:
        wide = keys.number("embedding_length") // keys.number("attention.head_count")
        return _windows(keys, period) | {
            "query_pre_attn_scalar": wide if keys.blocks() == large else keys.channels("attention.key_length"),
            "attn_logit_softcapping": keys.real("attn_logit_softcapping", 0.0, zero=True) or None,
            "final_logit_softcapping": keys.real("final_logit_softcapping", 0.0, zero=True) or None,
        }

    return config


def _granite(keys: Keys) -> dict[str, Any]:
    said = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
    said |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
    return {name: keys.real(key) for name, key in said.items()}


def _partial(keys: Keys) -> dict[str, Any]:
    turned = keys.channels("rope.dimension_count") / keys.channels("attention.key_length")
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": turned}}


def _routed(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _qwen2moe(keys: Keys) -> dict[str, Any]:
    return _routed(keys) | _shared(keys) | {"norm_topk_prob": False}


def _dense_first(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "n_routed_experts": keys.number("expert_count"),
        "n_shared_experts": keys.number("expert_shared_count"),
        "first_k_dense_replace": keys.number("leading_dense_block_count", zero=True),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "routed_scaling_factor": keys.real("expert_weights_scale"),
    }


def _glm4moe(keys: Keys) -> dict[str, Any]:
    normed = any(t.endswith("attn_q_norm.weight") for t in keys.file.tensors)
    return _partial(keys) | _dense_first(keys) | {"use_qk_norm": normed}


def _deepseek2(keys: Keys) -> dict[str, Any]:
    """Return the widths of latent attention, the groups of experts, and by how much yarn multiplies attention."""
    turned = keys.channels("rope.dimension_count")
    times = 10 * keys.real("rope.scaling.yarn_log_multiplier", 0.0, zero=True)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": keys.scaling(), "mscale": times,
            "mscale_all_dim": times, "original_max_position_embeddings": 4096}  # fmt: skip
    return (
        _dense_first(keys)
        | {
            "q_lora_rank": keys.number("attention.q_lora_rank", None),
            "kv_lora_rank": keys.number("attention.kv_lora_rank"),
            "qk_rope_head_dim": turned,
            "head_dim": turned,  # of what turns
            "qk_nope_head_dim": keys.channels("attention.key_length") - turned,
            "v_head_dim": keys.channels("attention.value_length"),
            "n_group": keys.number("expert_group_count", 1),
            "topk_group": keys.number("expert_group_used_count", 1),
        }
        | ({"rope_parameters": yarn} if times else {})
    )


def _olmoe(keys: Keys) -> dict[str, Any]:
    return {
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "norm_topk_prob": False,
    }


def _shared(keys: Keys) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": keys.number("expert_shared_feed_forward_length")}


def _granitemoe(keys: Keys) -> dict[str, Any]:
    return _granite(keys) | _mixtral(keys)


def _mixtral(keys: Keys) -> dict[str, Any]:
    return {"num_local_experts": keys.number("expert_count"), "num_experts_per_tok": keys.number("expert_used_count")}


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    width = {"intermediate_size": keys.number("expert_feed_forward_length"), "attention_bias": True}
    return _windows(keys, 2) | _mixtral(keys) | width


def _qwen35moe(keys: Keys) -> dict[str, Any]:
    return delta_net.config(keys) | _routed(keys) | _shared(keys)


def _smollm3(_keys: Keys) -> dict[str, Any]:
    return {"no_rope_layers": None, "no_rope_layer_interval": 4}


@dataclass(frozen=True)
class Reading:
    """How transformers reads an architecture.

    names: of a block's modules, by ggml's; a star stands for the number of an expert.
    interleaved: whether rows of the halves of every head of q and k take turns.
    shifted: whether norms are stored as 1 + weight.
    config: what of a config the architecture's own keys say.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    shifted: bool = False
    config: Callable[[Keys], dict[str, Any]] = _nothing

    def name(self, ggml: str) -> str:
        """Return transformers' name of a tensor; one that is not known keeps its own, and nothing will read it."""
        block, known = _BLOCK.fullmatch(ggml), _IN_BLOCK | {**self.names}
        if block and block[2] in known:  # a parameter that is no module's weight or bias
            return f"model.layers.{block[1]}.{known[block[2]]}"
        module, _, kind = (block[2] if block else ggml).rpartition(".")
        if block:
            return f"model.layers.{block[1]}.{known.get(module, module)}.{kind}"
        return f"{_OUTSIDE.get(module, module)}.{kind}"

    def is_own(self, ggml: str) -> bool:
        """Say whether a tensor is a parameter of the model, which may be named as what lies beside a weight is."""
        block = _BLOCK.fullmatch(ggml)
        return block is not None and block[2] in self.names

    def tensors(self, stored: Stored) -> Iterator[tuple[str, Stored]]:
        """Yield what transformers has of a stored tensor, by its names: the tensor itself, or those of its experts."""
        name = self.name(stored.name)
        if "*" not in name or stored.data.ndim < 2:
            yield name, stored
            return
        for e in range(stored.shape[-1]):
            yield name.replace("*", str(e)), replace(stored, shape=stored.shape[:-1], data=stored.data[e])

    def rounds(self, name: str) -> bool:
        """Say whether a tensor, by transformers' name, is stored as another float that says it: 1 + w, -exp(w)."""
        return self._adds_one(name) or name.endswith(".A_log")

    def _adds_one(self, name: str) -> bool:
        return self.shifted and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")

    def shape(self, name: str, stored: Stored) -> tuple[int, ...]:
        """Return the shape that a stored tensor has in transformers."""
        shape = tuple(reversed(stored.shape))
        if name.endswith("shared_expert_gate.weight"):
            return (1, *shape)
        return (shape[0], 1, *shape[1:]) if name.endswith("conv1d.weight") and shape else shape

    def in_order(self, name: str, values: Array, keys: Keys) -> Array:
        """Return a tensor's values as transformers stores them, by its name there."""
        if name.endswith("shared_expert_gate.weight"):
            return values[None]
        if "linear_attn." in name:
            return delta_net.in_order(name, values, keys)
        if self._adds_one(name):
            return values - 1
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        if not self.interleaved or heads is None:
            return values
        halves = values.reshape(keys.number(heads), -1, 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


_EXPERTS = {"ffn_gate_inp": "mlp.gate"} | {
    f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")
}
_SHARED = {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"} | {
    f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")
}
_ALL_SHARED = {f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
_CORRECTED = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}  # fmt: skip
_FOUR_NORMS = _BEHIND | {"ffn_norm": "pre_feedforward_layernorm"}
READINGS: Mapping[str, Reading] = {
    "llama": Reading("llama", interleaved=True),
    "qwen2": Reading("qwen2"),
    "qwen3": Reading("qwen3"),
    "gemma2": Reading("gemma2", _FOUR_NORMS, shifted=True, config=_gemma(46, 2)),
    "gemma3": Reading("gemma3_text", _FOUR_NORMS, shifted=True, config=_gemma(62, 6)),
    "gemma4": Reading("gemma4_text", gemma4.NAMES, config=gemma4.config),
    "phi3": Reading("phi3", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, config=_partial),
    "olmo2": Reading("olmo2", _BEHIND),
    "granite": Reading("granite", interleaved=True, config=_granite),
    "glm4": Reading(
        "glm4",
        {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
         "ffn_up": "mlp.gate_up_proj"},
        config=_partial,
    ),
    "smollm3": Reading("smollm3", interleaved=True, config=_smollm3),
    "qwen3moe": Reading("qwen3_moe", _EXPERTS, config=_routed),
    "qwen2moe": Reading("qwen2_moe", _EXPERTS | _SHARED, config=_qwen2moe),
    "olmoe": Reading("olmoe", _EXPERTS, config=_olmoe),
    "glm4moe": Reading(
        "glm4_moe",
        _EXPERTS | _ALL_SHARED | _CORRECTED | {"post_attention_norm": "post_attention_layernorm"},
        config=_glm4moe,
    ),
    "deepseek2": Reading("deepseek_v3", _EXPERTS | _ALL_SHARED | _CORRECTED | _LATENT, config=_deepseek2),
    "granitemoe": Reading(
        "granitemoe",
        {"ffn_gate_inp": "block_sparse_moe.router"}
        | {f"ffn_{part}_exps": f"block_sparse_moe.experts.*.{part}_proj" for part in ("gate", "up", "down")},
        interleaved=True,
        config=_granitemoe,
    ),
    "gpt-oss": Reading(
        "gpt_oss",
        _EXPERTS | {"ffn_gate_inp": "mlp.router", "attn_sinks.weight": "self_attn.sinks",
                    "post_attention_norm": "post_attention_layernorm"},
        config=_gpt_oss,
    ),
    "qwen35moe": Reading(
        "qwen3_5_moe_text", delta_net.NAMES | _EXPERTS | _SHARED, shifted=True, config=_qwen35moe
    ),
    "qwen35": Reading("qwen3_5_text", delta_net.NAMES, shifted=True, config=delta_net.config),
}  # fmt: skip
"""By `general.architecture`."""
MIXTRAL = Reading("mixtral", _EXPERTS, interleaved=True, config=_mixtral)
"""The architecture `llama` with experts."""
DEEPSEEK_V2 = replace(READINGS["deepseek2"], model_type="deepseek_v2")
"""The architecture `deepseek2` whose experts are chosen by a softmax."""


def reading(keys: Keys) -> Reading:
    """Return how the architecture of a file is read. Raises LlmqError for one that is not known."""
    if keys.arch not in READINGS:
        raise LlmqError(f"{keys.file.path}: verify knows the keys of {', '.join(READINGS)}, not of {keys.arch!r}")
    if keys.arch == "deepseek2" and keys.number("expert_gating_func", _SOFTMAX, zero=True) == _SOFTMAX:
        return DEEPSEEK_V2
    return MIXTRAL if keys.arch == "llama" and keys.number("expert_count", 0, zero=True) else READINGS[keys.arch]
