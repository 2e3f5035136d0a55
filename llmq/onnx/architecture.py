"""What a decoder computes, found by value from the modules that transformers makes of its config, or refused by name.

    model_type                     norms of a block lie
    llama, mistral, qwen2, qwen3   before attention, before the MLP
    granite, smollm3, phi3         the same; four multipliers, blocks without rotary embedding, fused linears
    olmo2, olmo3                   behind attention, behind the MLP
    gemma2, gemma3_text, glm4      before and behind both

A model_type says which code runs, so that there is a table of those that are the same graph; all else is read from the
modules or tried out on them: windows, scales, caps and multipliers, the activation, how norms store their gain, which
blocks are turned and by which angles. Rotary embedding is a table of cosines and sines for each position, which
transformers' own module fills, so that every kind of scaling is right; one whose angles change with the length of the
text has no such table.
Not here: the nodes (decoder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError, printable
from llmq.model.config import head_dim, kv_heads
from llmq.model.norms import gain, is_norm
from llmq.model.pretrained import foreign

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}
_TABLE_BYTES = 2**30
_REMEDY = "export it as GGUF (--to gguf), or use the checkpoint as it is"


@dataclass(frozen=True)
class Family:
    """Which norms a block has, by their names in it, "" where there is none, and how its heads are turned.

    before, behind: of attention. before_mlp, behind_mlp: of the MLP. neighbours: whether channels 2i and 2i + 1 are
    turned together, not i and i + d/2. windowed: whether config.sliding_window, not the module, says the window.
    """

    before: str = "input_layernorm"
    behind: str = ""
    before_mlp: str = "post_attention_layernorm"
    behind_mlp: str = ""
    neighbours: bool = False
    windowed: bool = False


_BEHIND = Family("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_AROUND = Family(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed=True),
    "qwen2": Family(),
    "qwen3": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "phi3": Family(windowed=True),
    "olmo2": _BEHIND,
    "olmo3": _BEHIND,
    "gemma2": _AROUND,
    "gemma3_text": _AROUND,
    "glm4": Family(
        "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm", neighbours=True
    ),
}
"""By transformers' model_type."""


@dataclass(frozen=True)
class Table:
    """Cosines and sines by position, float32 `[T, r/2]`, r channels of a head being turned, the first ones."""

    cos: Tensor
    sin: Tensor

    @property
    def channels(self) -> int:
        """How many channels of a head are turned."""
        return 2 * self.cos.shape[1]


@dataclass(frozen=True)
class Architecture:
    """A model's function, beside its weights.

    config: of transformers. windows: how many tokens attention sees in each block, its own among them; 0 for all.
    turns: the name of the rotary table of each block, "" where it has none. tables: by name. activation: its name.
    shifted: the weights of norms that multiply by 1 + weight. scale: of attention scores.
    embedding, residual, logits: what is multiplied with. cap, last_cap: of scores and of logits, 0 for none.
    """

    config: Any
    family: Family
    windows: tuple[int, ...]
    turns: tuple[str, ...]
    tables: Mapping[str, Table]
    activation: str
    shifted: frozenset[str]
    scale: float
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    cap: float = 0.0
    last_cap: float = 0.0
    heads: int = field(init=False)
    kv_heads: int = field(init=False)
    head_dim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", int(self.config.num_attention_heads))
        object.__setattr__(self, "kv_heads", kv_heads(self.config))
        object.__setattr__(self, "head_dim", head_dim(self.config))

    @property
    def blocks(self) -> int:
        """Decoder blocks."""
        return len(self.windows)

    @property
    def positions(self) -> int:
        """How many positions the tables have."""
        return min(len(t.cos) for t in self.tables.values())


def architecture(config: Any, model: Any, positions: int | None = None) -> Architecture:
    """Return what the blank `model` of a config computes.

    positions: how many the rotary tables have, None for all that the config promises.
    Raises LlmqError, naming the reason, for what the nodes of decoder.py do not compute.
    """
    if config.model_type not in FAMILIES:
        raise LlmqError(
            f"model_type {printable(repr(config.model_type), 80)} is not among those written as ONNX "
            f"({', '.join(FAMILIES)}); {_REMEDY}"
        )
    for reason in _differences(config, model):
        raise LlmqError(f"{reason}, which llmq does not write as ONNX; {_REMEDY}")
    family, blocks = FAMILIES[config.model_type], model.model.layers
    kinds = _kinds(config)
    turned = [bool(getattr(b.self_attn, "use_rope", True)) for b in blocks]
    turns = tuple((kinds[i] if kinds else "rotary") if t else "" for i, t in enumerate(turned))
    return Architecture(
        config,
        family,
        windows=tuple(_window(config, family, block) for block in blocks),
        turns=turns,
        tables={name: _table(config, model, name, positions) for name in dict.fromkeys(turns) if name},
        activation=_activation(blocks[0].mlp) or "",
        shifted=frozenset(f"{n}.weight" for n, m in _norms(model) if gain(m, config.rms_norm_eps)),
        scale=float(blocks[0].self_attn.scaling),
        embedding=_number(config, "embedding_multiplier", 1) * _embedding_scale(model),
        residual=_number(config, "residual_multiplier", 1),
        logits=1 / _number(config, "logits_scaling", 1),
        cap=_number(config, "attn_logit_softcapping", 0),
        last_cap=_number(config, "final_logit_softcapping", 0),
    )


def _differences(config: Any, model: Any) -> Iterator[str]:
    """Yield what a config asks for beyond the graph of its family, as the subject of a sentence."""
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        yield "config.json asks for attention both ways (is_causal, use_bidirectional_attention)"
    if getattr(config, "is_heterogeneous", False):
        yield "config.json asks for blocks that differ (per_layer_config)"
    if not _number(config, "logits_scaling", 1):
        yield "config.json, logits_scaling: 0"
    first = model.model.layers[0]
    for i, block in enumerate(model.model.layers):
        if _activation(block.mlp) is None:
            yield f"config.json asks for the activation {printable(repr(config.hidden_act), 80)}"
        if block.self_attn.scaling != first.self_attn.scaling:
            yield f"block {i} with a scale of attention of its own"
    for name, module in _norms(model):
        if gain(module, config.rms_norm_eps) is None:
            yield f"{name}, a {type(module).__name__} that is no RMSNorm that adds {config.rms_norm_eps}"


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if is_norm(module))


def _activation(mlp: Any) -> str | None:
    """Return the name of an MLP's activation by what it does, None for one that has no name here."""
    act, probe = getattr(mlp, "act_fn", None) or mlp.activation_fn, torch.linspace(-4, 4, 33)
    with torch.no_grad():
        found = act(probe)
    return next((n for n, f in _ACTIVATIONS.items() if torch.allclose(found, f(probe), rtol=0, atol=1e-6)), None)


def _number(config: Any, key: str, default: float) -> float:
    value = getattr(config, key, None)
    return float(default if value is None else value)


def _embedding_scale(model: Any) -> float:
    return float(getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0))


def _window(config: Any, family: Family, block: Any) -> int:
    own = config.sliding_window if family.windowed else getattr(block.self_attn, "sliding_window", None)
    return int(own or 0)


def _kinds(config: Any) -> tuple[str, ...]:
    """Return the type of each block where a config turns blocks by their type, nothing where all are turned alike."""
    nested = all(isinstance(value, dict) for value in config.rope_parameters.values())
    return tuple(config.layer_types) if nested else ()


def _table(config: Any, model: Any, name: str, positions: int | None) -> Table:
    """Fill a rotary table. Raises LlmqError where the angles depend on more than the position."""
    kind = () if name == "rotary" else (name,)
    length = min(positions or config.max_position_embeddings, config.max_position_embeddings)
    said = f"rope_parameters {printable(repr(dict(config.rope_parameters)), 200)}"
    with foreign("config.json, rope_parameters"):
        embedding = type(model.model.rotary_emb)(config)
        cos, sin = embedding(torch.zeros(1), torch.arange(min(length, 2))[None], *kind)
        if length * cos.shape[-1] * 4 > _TABLE_BYTES:
            raise LlmqError(f"config.json asks for {length:,} positions; give fewer, --to onnx:context=32768")
        _refuse_length(embedding, config, kind, said)
        cos, sin = (t[0].float() for t in embedding(torch.zeros(1), torch.arange(length)[None], *kind))
    half = cos.shape[1] // 2
    if not (torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:])):
        raise LlmqError(f"{said} turn the channels of a pair by different angles; {_REMEDY}")
    if not (torch.isfinite(cos).all() and torch.isfinite(sin).all()):
        raise LlmqError(f"{said} do not turn by finite numbers; correct config.json")
    return Table(cos[:, :half].contiguous(), sin[:, :half].contiguous())


def _refuse_length(embedding: Any, config: Any, kind: tuple[str, ...], said: str) -> None:
    """Raise LlmqError where position 1 is turned otherwise in a longer text; lengths that kinds look at are tried."""
    own = config.rope_parameters[kind[0]] if kind else config.rope_parameters
    trained = int(own.get("original_max_position_embeddings") or config.max_position_embeddings)
    seen = []
    for last in (1, trained - 1, trained, 2 * config.max_position_embeddings):
        cos, _ = embedding(torch.zeros(1), torch.tensor([[1, last]]), *kind)
        seen.append(cos[0, 0].clone())
    if any(not torch.equal(seen[0], cos) for cos in seen):
        raise LlmqError(f"{said} turn by the length of the text, of which an ONNX graph has no table; {_REMEDY}")
