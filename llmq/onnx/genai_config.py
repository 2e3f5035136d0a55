"""genai_config.json: how onnxruntime-genai runs a graph, and how it samples where nobody says otherwise.

Source: onnxruntime-genai's `src/config.cpp` (the keys) and `src/models/model_type.h` (the types).
Not here: the graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmq.onnx.architecture import Architecture

_TYPES = {"gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"}
_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def genai_config(model: Architecture, generation: Mapping[str, Any], inputs: list[str], *, shared: bool) -> str:
    """Return the text of the file.

    generation: generation_config.json, whose ids end a text and whose sampling is taken. inputs: of the graph, beside
    the cache. shared: whether the cache is one buffer that keeps its place.
    """
    config = model.config
    ends = generation.get("eos_token_id", config.eos_token_id)
    pad = generation.get("pad_token_id", config.pad_token_id)
    first = ends[0] if isinstance(ends, list) else ends
    past = {f"past_{p}_names": f"past_key_values.%d.{p}" for p in ("key", "value")}
    present = {f"present_{p}_names": f"present.%d.{p}" for p in ("key", "value")}
    said = {
        "model": {
            "type": config.model_type if config.model_type in _TYPES else "decoder",
            "vocab_size": config.vocab_size,
            "context_length": model.positions,
            "bos_token_id": generation.get("bos_token_id", config.bos_token_id),
            "eos_token_id": ends,
            "pad_token_id": first if pad is None else pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": model.head_dim,
                "num_attention_heads": model.heads,
                "num_key_value_heads": model.kv_heads,
                "num_hidden_layers": model.blocks,
                "inputs": {name: name for name in inputs} | past,
                "outputs": {"logits": "logits"} | present,
            },
        },
        "search": {key: generation.get(key, usual) for key, usual in _SAMPLING.items()}
        | {"max_length": model.positions, "past_present_share_buffer": shared},
    }
    return json.dumps(_without_none(said), indent=2) + "\n"


def _without_none(value: Any) -> Any:
    """Leave out what is not known, which the reader refuses to see as null."""
    if not isinstance(value, dict):
        return value
    return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
