"""Experts that were packed one by one come back in the tensor that transformers loads, and compute the same there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    Qwen3MoeConfig,
)

import llmq
from llmq.errors import LlmqError

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "interleaved rows, biases": lambda: GptOssConfig(num_local_experts=3, head_dim=16, **SIZES),
    "rows one below the other": lambda: GraniteMoeConfig(num_local_experts=3, **SIZES),
    "transposed, every token": lambda: Llama4TextConfig(
        num_local_experts=3, head_dim=16, intermediate_size_mlp=64, attention_chunk_size=64,
        **(SIZES | {"num_experts_per_tok": 1}),
    ),
    "joined by transformers": lambda: Qwen3MoeConfig(num_experts=3, moe_intermediate_size=32, head_dim=16, **SIZES),
}  # fmt: skip
OPTIONS = {"method": "rtn", "bits": 4, "group_size": 32, "format": "compressed-tensors", "device": "cpu", "warn": print}


@pytest.fixture
def packed(tmp_path, tokenizer_bos):
    """`packed(kind)`: a tiny model of experts in float32, quantized."""

    def make(kind: str) -> Path:
        AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(tmp_path / "m")
        tokenizer_bos.save_pretrained(tmp_path / "m")
        llmq.quantize(tmp_path / "m", tmp_path / "q", **OPTIONS)
        return tmp_path / "q"

    return make


@pytest.mark.parametrize("kind", CONFIGS)
def test_plain_transformers_computes_what_the_packed_experts_do(kind, packed, tmp_path):
    src, ids = packed(kind), torch.arange(12)[None]
    llmq.dequantize(src, tmp_path / "f", dtype="float32", warn=print)
    with torch.no_grad():
        want = llmq.load(src, device="cpu", backend="reference")(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    names = " ".join(load_file(tmp_path / "f" / "model.safetensors"))
    assert ("experts.0." in names) == (kind == "joined by transformers")


def test_an_expert_that_is_missing_or_misshapen_is_named(packed, tmp_path):
    src, file = packed("rows one below the other"), tmp_path / "q" / "model.safetensors"
    tensors = load_file(file)
    one = "model.layers.0.block_sparse_moe.experts.2.up_proj"
    save_file({n: t for n, t in tensors.items() if not n.startswith(one)}, file)
    with pytest.raises(LlmqError, match=re.escape(f"tensor {one}.weight is missing")):
        llmq.dequantize(str(src), tmp_path / "f")
    save_file({n: t for n, t in tensors.items() if not n.startswith(one)} | {f"{one}.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(LlmqError, match=re.escape(f"{one}.weight is F32 [4, 4], not BF16 [64, 64]")):
        llmq.dequantize(str(src), tmp_path / "f")


def test_experts_of_a_model_that_is_not_known_keep_their_names_with_a_word(packed, tmp_path):
    src = packed("rows one below the other")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"model_type": "of the future"}))
    record = llmq.dequantize(str(src), tmp_path / "f")
    assert "experts are written as they are stored" in record["warnings"][-1]
    assert "model.layers.0.block_sparse_moe.experts.2.up_proj.weight" in record["tensors"]
