"""Tiny random models of the families that people have, each saved as its real checkpoints are.

    family = FAMILIES["qwen3_moe"]
    family.save(folder)                     config, weights under the names on disk, tokenizer
    family.model()                          the same model in memory, in eval mode

Two blocks or few more, hidden 64, so that a run takes a second; what makes a family its own is there: a sliding window
shorter than `SEQ_LEN`, a dense block before those of experts, a state space or a convolution beside attention, a tower
for images, tensors that transformers never builds (`mtp.*`). Weights are drawn from the family's name: the same bytes
each time. Not here: what llmq makes of them (tests/test_families.py, model_types.py).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from _tiny import VOCAB, make_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

SEQ_LEN = 48
WINDOW = 16
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB + 8,  # some tokenizers add tokens of their own
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_ALTERNATE = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]
_WINDOWED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": _ALTERNATE}
_DELTA: dict[str, Any] = {  # gated delta nets
    "layer_types": _LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_DENSE_FIRST: dict[str, Any] = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
_MTP: dict[str, tuple[int, ...]] = {
    "mtp.fc.weight": (64, 128),
    "mtp.norm.weight": (64,),
    "mtp.layers.0.self_attn.q_proj.weight": (128, 64),
}
_LAST: dict[int, dict[str, tuple[int, ...]]] = {  # the same, as one block more, by the number of the largest model's
    n: {f"model.layers.{n}.eh_proj.weight": (64, 128), f"model.layers.{n}.enorm.weight": (64,)} for n in (46, 61)
}


@dataclass(frozen=True)
class Family:
    """A tiny model of one model_type.

    changes: of its config; of its `text_config`, where `vision` is the other half of a wrapper's.
    dtype: in which it is saved. beside: tensors of its checkpoints that transformers never builds, by shape.
    wrapper: changes of the wrapper's own config.
    older: a prefix that transformers writes today, and the one that the Hub's checkpoints have in its place.
    experts: how its checkpoints hold those of a layer: each "apart", or all in one tensor, as "rows" [E, N, K], as
        "columns" [E, K, N], or in "turns", the same with a column of gate after each of up.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    vision: Mapping[str, Any] | None = None
    wrapper: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    older: tuple[str, str] = ("", "")
    experts: Literal["apart", "rows", "columns", "turns"] = "apart"

    def config(self) -> Any:
        """Return transformers' config."""
        text = {k: v for k, v in (_SIZES | dict(self.changes)).items() if v is not ...}
        if self.vision is None:
            return AutoConfig.for_model(self.model_type, **text)
        tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
        return AutoConfig.for_model(
            self.model_type, text_config=text, vision_config=dict(self.vision), **tied, **self.wrapper
        )

    def model(self) -> PreTrainedModel:
        """Return the model with random weights, in eval mode."""
        kind = AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.model_type.encode()))
            model = kind.from_config(self.config())
            for module in model.modules():
                _draw(module)
        return model.to(self.dtype).eval()

    def save(self, folder: Path) -> None:
        """Save the model as its real checkpoints are, and a tokenizer."""
        self.model().save_pretrained(folder)
        make_tokenizer(bos=True).save_pretrained(folder)
        file, draw = folder / "model.safetensors", torch.Generator().manual_seed(0)
        saved = {re.sub(f"^{self.older[0]}", self.older[1], n): tensor for n, tensor in load_file(file).items()}
        more = {n: torch.randn(shape, generator=draw).to(self.dtype) for n, shape in self.beside.items()}
        saved = _joined(saved) if self.experts == "rows" else saved
        if self.model_type == "qwen3_vl_moe":  # which transformers writes as rows
            saved = {n: t.mT.contiguous() if ".experts." in n else t for n, t in saved.items()}
        save_file(saved | more, file, {"format": "pt"})


def _joined(saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with the experts of a layer in one, as Qwen3.5's checkpoints have them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in saved.items():
        parent, apart, rest = name.partition(".experts.0.")
        if apart and rest.startswith(("gate_proj", "down_proj")):
            each = [t for n, t in saved.items() if re.fullmatch(rf"{re.escape(parent)}\.experts\.\d+\.{rest}", n)]
            if rest.startswith("gate_proj"):
                ups = [saved[f"{parent}.experts.{e}.up_proj.weight"] for e in range(len(each))]
                each = [torch.cat(pair) for pair in zip(each, ups, strict=True)]
            found[f"{parent}.experts.{'gate_up' if 'gate' in rest else 'down'}_proj"] = torch.stack(each)
        elif not re.search(r"\.experts\.\d+\.", name):
            found[name] = tensor
    return found


def _draw(module: nn.Module) -> None:
    """Draw weights at which every part of a block counts: as wide as keeps a signal's size, gains and biases uneven."""
    for name, p in module.named_parameters(recurse=False):
        if p.dim() >= 2 and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            p.data.normal_(0, 1 if isinstance(module, nn.Embedding) else p.shape[-1] ** -0.5)
        elif "bias" in name and name != "dt_bias":
            p.data.normal_(0, 0.1)
        elif "norm" in type(module).__name__.lower():
            p.data.add_(torch.randn_like(p) * 0.2)


def _of(model_type: str, *parts: Mapping[str, Any], **rest: Any) -> Family:
    changes: dict[str, Any] = {}
    for part in parts:
        changes |= part
    return Family(model_type, changes, **rest)


_TIED = {"tie_word_embeddings": True}
_BF16: dict[str, Any] = {"dtype": torch.bfloat16}

_PIXELS: dict[str, Any] = {  # Qwen's tower
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": _ALTERNATE * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB + 8,
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}

_TABLE = (
    # Llama's block, and what differs from it by multipliers, norms, biases and rotary tables alone
    _of("llama", _TIED, **_BF16),
    _of("mistral", {"sliding_window": WINDOW}, **_BF16),
    _of("qwen2", _TIED, {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}),
    _of("qwen3", _TIED, **_BF16),
    _of("ministral3", **_BF16),
    _of("ministral", _WINDOWED),
    _of("smollm3", _TIED, {"num_hidden_layers": 4}, **_BF16),  # the fourth without rotary tables
    _of("granite", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 2.0}, **_BF16),
    _of("seed_oss", {"attention_bias": True, "attention_out_bias": False}, **_BF16),
    _of("hunyuan_v1_dense", _TIED),
    _of("ernie4_5", _TIED, **_BF16),
    _of("helium"),
    # norms that store 1 + w, norms behind the linears, or none before them
    _of("gemma", _TIED, **_BF16),
    _of("gemma2", _TIED, {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}, **_BF16),
    _of("gemma3_text", _TIED, _WINDOWED, {"query_pre_attn_scalar": 16}, **_BF16),
    _of("gemma4_text", _TIED, _GEMMA4, **_BF16),
    _of("olmo"),
    _of("olmo2"),
    _of("olmo3", _WINDOWED, **_BF16),
    _of("exaone4", _WINDOWED, **_BF16),
    # fused linears
    _of("phi3", {"sliding_window": WINDOW, "head_dim": ...}, **_BF16),
    _of("glm", **_BF16),
    _of("glm4", **_BF16),
    _of("gpt_neox", {"head_dim": ...}),
    _of("falcon", {"head_dim": ..., "num_ln_in_parallel_attn": 1}, **_BF16),
    _of("persimmon", {"head_dim": ...}),
    # blocks in parallel, layer norms with biases, activations without a gate
    _of("phi", {"head_dim": ...}),
    _of("cohere", _TIED, {"logit_scale": 1.0}, **_BF16),
    _of("cohere2", _TIED, _WINDOWED, {"logit_scale": 1.0}, **_BF16),
    _of("stablelm", {"head_dim": ...}),
    _of("starcoder2", _TIED, {"sliding_window": WINDOW}),
    _of("nemotron", **_BF16),
    _of("arcee", _TIED),
    _of("apertus", **_BF16),
    # a convolution, a state space or linear attention beside attention
    _of("qwen3_5_text", _DELTA, _TIED, {"rope_parameters": _PARTIAL}, beside=_MTP, **_BF16),
    _of("qwen3_next", _DELTA, _EXPERTS, {"shared_expert_intermediate_size": 32}, beside=_MTP, **_BF16),
    _of("lfm2", _TIED, {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, **_BF16),
    _of("falcon_h1", _MAMBA, {"mamba_d_ssm": 128}, **_BF16),
    _of("nemotron_h", {
        "layer_types": ["linear_attention", "mlp", "full_attention", "mlp"], "num_hidden_layers": 4,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    }, **_BF16),
    _of("granitemoehybrid", _MAMBA, _TIED, {
        "layer_types": _LINEAR, "num_local_experts": 4, "intermediate_size": 32, "shared_intermediate_size": 64,
    }, experts="rows", **_BF16),
    # experts
    _of("qwen2_moe", _EXPERTS, {"shared_expert_intermediate_size": 64}),
    _of("qwen3_moe", _EXPERTS, {"mlp_only_layers": [0]}, **_BF16),
    _of("qwen3_5_moe_text", _DELTA, _EXPERTS, {
        "shared_expert_intermediate_size": 32, "rope_parameters": _PARTIAL,
    }, beside=_MTP, **_BF16),
    _of("mixtral", {"num_local_experts": 4, "intermediate_size": 32}, **_BF16),
    _of("olmoe", {"num_key_value_heads": 4}, _EXPERTS, {"intermediate_size": 32}),
    _of("deepseek_v2", _LATENT, _EXPERTS, _DENSE_FIRST, {"topk_group": 1}, **_BF16),
    _of("deepseek_v3", _LATENT, _EXPERTS, _DENSE_FIRST, {"topk_group": 1}, beside=_LAST[61], **_BF16),
    _of("glm4_moe", _EXPERTS, _DENSE_FIRST, beside=_LAST[46], **_BF16),
    _of("granitemoe", {"num_local_experts": 4, "intermediate_size": 32}, experts="rows"),
    _of("minimax_m2", {"num_local_experts": 4, "intermediate_size": 32, "num_experts_per_tok": 2}, **_BF16),
    _of("gpt_oss", _WINDOWED, {
        "num_local_experts": 4, "intermediate_size": 32, "num_experts_per_tok": 2,
    }, experts="turns", **_BF16),
    _of("llama4_text", {
        "num_local_experts": 4, "intermediate_size": 32, "intermediate_size_mlp": 64, "moe_layers": [1],
        "attention_chunk_size": WINDOW,
    }, experts="columns", **_BF16),
    # a tower for images around a text model
    _of("gemma3", _TIED, _WINDOWED, {"query_pre_attn_scalar": 16}, vision=_SIGLIP, wrapper={
        "mm_tokens_per_image": 4, "image_token_index": VOCAB + 7,
    }, older=("vision_tower.", "vision_tower.vision_model."), **_BF16),
    _of("gemma4", _TIED, _GEMMA4, vision={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64,
    }, wrapper={"image_token_id": VOCAB + 7}, **_BF16),
    _of("qwen3_5", _DELTA, {"rope_parameters": _PARTIAL}, vision=_PIXELS, beside=_MTP, wrapper={
        "image_token_id": VOCAB + 7,
    }, **_BF16),
    _of("mistral3", {"model_type": "ministral3"}, vision=_SIGLIP | {"model_type": "pixtral", "head_dim": 16}, **_BF16),
    _of("qwen3_vl", _TIED, vision=_PIXELS | {"deepstack_visual_indexes": [0]}, **_BF16),
    _of("qwen3_5_moe", _DELTA, _EXPERTS, {
        "shared_expert_intermediate_size": 32, "rope_parameters": _PARTIAL,
    }, vision=_PIXELS, wrapper={"image_token_id": VOCAB + 7}, beside=_MTP, experts="rows", **_BF16),
    _of("qwen3_vl_moe", _EXPERTS, {"moe_intermediate_size": 96}, vision=_PIXELS | {
        "deepstack_visual_indexes": [0],
    }, experts="columns", **_BF16),
    _of("qwen2_5_vl", {"head_dim": ..., "rope_parameters": _MROPE}, vision=_PIXELS | {
        "fullatt_block_indexes": [0],
    }, **_BF16),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}
"""The families, by model_type."""


def load_float(folder: Path, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Return the model whose config lies in a folder, with the `tensors` of a checkpoint of it, in float32."""
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32).eval()
