"""Whether transformers computes of a config what a program of llama.cpp does, read from the modules it makes of it.

A config can ask for another function under the same model_type: another activation, a cap, a window, attention both
ways. Keys prove nothing, so what decides the function is tried out on the modules, on a few numbers: it is the
program's, or the first thing that is not is named.
Not here: rotary frequencies, which the file says by value (rope.py); what the programs compute (programs.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from llmq.gguf import delta_net, latent, varied
from llmq.gguf.programs import Program, period_of
from llmq.model.config import head_dim, kv_heads
from llmq.model.norms import gain, is_norm

_CLAMPED = (1.702, 7.0)  # gpt-oss's gate: x sigmoid(1.702 x) of x of at most 7
_CAUSAL = (None, False, "vision")  # the last: but between tokens of one image, of which the language model has none


def differences(whole: Any, model: Any, program: Program, windows: Sequence[int]) -> Iterator[str]:
    """Yield what transformers computes otherwise than a program of llama.cpp, as the subject of a sentence.

    whole: the config, of a language model or of a larger model around one. model: the language model that transformers
    makes of it, without weights. windows: how far back attention sees in every block, 0 for all the way.
    """
    config = whole.get_text_config()
    d, heads = head_dim(config), config.num_attention_heads
    if not 0 < config.max_position_embeddings < 2**32:
        yield f"config.json asks for {config.max_position_embeddings:,} positions"
    if not 0 <= config.rms_norm_eps < 1e30:
        yield f"norms add {config.rms_norm_eps}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) not in _CAUSAL:
        yield "config.json asks for attention both ways (is_causal, use_bidirectional_attention)"
    if d % 2 or (program.square and d * heads != config.hidden_size):
        yield f"{heads} heads of {d} channels for a residual stream of {config.hidden_size}"
    if program.paired and kv_heads(config) != heads:
        yield f"{kv_heads(config)} key-value heads for {heads} query heads"
    if program.activation is None and not config.attention_bias:
        yield "attention without biases (attention_bias false)"
    if program.untied and whole.tie_word_embeddings:
        yield "a head that is the embedding (tie_word_embeddings)"
    yield from delta_net.differences(config) if program.delta else ()
    yield from latent.differences(config) if program.latent else ()
    yield from _numbers(config, program)
    yield from _blocks(config, model, program)
    yield from varied.differences(config, varied.varied(config, model, windows)) if program.varied else ()
    told = program.varied or not program.period or period_of([not w for w in windows], program.period) > 0
    if program.period and (len({*windows} - {0}) > 1 or not told):
        yield f"config.json asks for windows of {', '.join(map(str, windows))} tokens in its blocks"
    alone = config is whole or program.within  # most language models are capped by transformers where they stand alone
    for key in () if alone else program.caps:
        if getattr(config, key):
            yield f"config.json, {key}: {getattr(config, key)}, passed over within a {whole.model_type}"


def _numbers(config: Any, program: Program) -> Iterator[str]:
    """Yield caps and multipliers that no key says, or that the program does not do without."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, key, None)
        if (value is not None and key not in program.caps) or (program.capped and not value):
            yield f"config.json, {key}: {value}"
    if (groups := getattr(config, "n_group", None) or 1) > 1 and "n_group" not in program.counts:
        yield f"experts in {groups} groups (n_group)"
    if (limit := getattr(config, "clip_qkv", None)) is not None:
        yield f"config.json, clip_qkv: {limit}"
    for key in program.multipliers:
        if not 0 < abs(getattr(config, key)) < 1e30:
            yield f"config.json, {key}: {getattr(config, key)}"


def _blocks(config: Any, model: Any, program: Program) -> Iterator[str]:
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
    if abs(scale - (config.hidden_size**0.5 if program.scaled else 1)) > 1e-6 * scale:
        yield f"embeddings are multiplied by {scale}"
    for i, block in enumerate(model.model.layers):
        yield from _attention(config, block, i, program) if hasattr(block, "self_attn") else ()
        yield from _mlp(config, block, i, program)
    for name, module in _first_norms(model):
        if gain(module, config.rms_norm_eps) is None:
            yield f"{name}, a {type(module).__name__} that is no RMSNorm that adds {config.rms_norm_eps}"


def _attention(config: Any, block: Any, i: int, program: Program) -> Iterator[str]:
    scaling = block.self_attn.scaling
    if program.scale and abs(scaling - program.scale(config)) > 1e-6 * abs(scaling):
        yield f"attention is scaled by {scaling}"
    if bool(getattr(block.self_attn, "use_rope", True)) != _turned(i, program):
        yield f"block {i} {'without' if _turned(i, program) else 'with'} rotary embedding"


def _mlp(config: Any, block: Any, i: int, program: Program) -> Iterator[str]:
    mlp = next(getattr(block, n) for n in ("block_sparse_moe", "mlp") if hasattr(block, n))
    mlp = block if hasattr(block, "experts") else mlp  # Gemma 4 has them beside its MLP
    dense = config.first_k_dense_replace if "first_k_dense_replace" in program.counts else 0
    if program.counts and hasattr(mlp, "experts") != (i >= dense):
        yield f"block {i} {'with' if i < dense else 'without'} experts"
        return
    normed = getattr(getattr(mlp, "gate", None), "norm_topk_prob", True)
    if program.counts and program.normed not in (normed, None):
        yield f"experts whose weights {'' if normed else 'do not '}add up to 1 (norm_topk_prob {str(normed).lower()})"
    mlp, probe = getattr(mlp, "experts", mlp), torch.linspace(-4, 4, 33)
    if program.activation is None:
        if (mlp.alpha, mlp.limit) != _CLAMPED:
            yield f"a gate of {mlp.alpha}, clamped at {mlp.limit}"
        return
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    if not torch.allclose(act(probe), program.activation(probe), atol=1e-6):
        yield f"config.json asks for the activation {getattr(config, 'hidden_activation', None) or config.hidden_act!r}"


def _turned(block: int, program: Program) -> bool:
    """Say whether a program turns q and k in a block."""
    return not program.nope or (block + 1) % program.nope != 0


def _first_norms(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield one norm of each class, with its name."""
    seen = set()
    for name, module in model.named_modules():
        if is_norm(module) and type(module) not in seen:
            seen.add(type(module))
            yield name, module
