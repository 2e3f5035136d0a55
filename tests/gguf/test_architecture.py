"""What llama.cpp calls a model: names, row order, rotary scaling, and models that it cannot hold."""

import gguf
import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmq.gguf.architecture import architecture
from llmq.types import LlmqError

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


def described(config, tmp_path):
    arch = architecture(config)
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", arch.name)
    arch.describe(writer)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def test_llama_31_divides_frequencies_as_transformers_does():
    config = LlamaConfig(head_dim=128, rope_parameters=LLAMA31, max_position_embeddings=131072)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    factors = architecture(config).extra()["rope_freqs.weight"]
    torch.testing.assert_close((plain / factors).float(), wanted, rtol=1e-5, atol=0)
    assert factors.dtype == torch.float32 and factors[0] == 1 and factors[-1] == 8
    assert architecture(LlamaConfig()).extra() == {}


def test_yarn_and_linear_scaling_are_keys(tmp_path):
    keys = described(Qwen3Config(rope_parameters=YARN, max_position_embeddings=131072), tmp_path)
    scaling = {k.removeprefix("qwen3.rope."): v for k, v in keys.items() if "rope" in k}
    assert scaling["scaling.type"] == "yarn" and scaling["scaling.factor"] == 4.0 and scaling["freq_base"] == 1e6
    assert scaling["scaling.original_context_length"] == 32768
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    keys = described(LlamaConfig(rope_parameters=linear), tmp_path)
    assert keys["llama.rope.scaling.type"] == "linear" and keys["llama.rope.scaling.factor"] == 2.0
    assert not any("scaling" in k for k in described(LlamaConfig(), tmp_path))


def test_q_and_k_rows_are_interleaved_for_llama_alone():
    llama = architecture(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2))
    assert llama.rows("model.layers.0.self_attn.q_proj.weight").tolist()[:10] == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12]
    assert len(llama.rows("model.layers.3.self_attn.k_proj.bias")) == 16
    for name in ("self_attn.v_proj.weight", "self_attn.o_proj.weight", "self_attn.q_norm.weight", "mlp.up_proj.weight"):
        assert llama.rows(f"model.layers.0.{name}") is None
    assert architecture(Qwen3Config()).rows("model.layers.0.self_attn.q_proj.weight") is None


def test_names_and_what_is_left_out():
    tied = architecture(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True))
    assert tied.tensor("lm_head.weight") is None and tied.tensor("model.embed_tokens.weight") == "token_embd.weight"
    assert tied.tensor("model.layers.1.self_attn.rotary_emb.inv_freq") is None
    assert tied.tensor("model.layers.1.self_attn.o_proj.bias") == "blk.1.attn_output.bias"
    with pytest.raises(LlmqError, match=r"model\.layers\.1\.adapter\.weight has no place"):
        tied.tensor("model.layers.1.adapter.weight")


def test_a_window_that_llama_cpp_ignores_is_said():
    config = MistralConfig(sliding_window=4096, max_position_embeddings=32768)
    arch = architecture(config)
    assert arch.name == "llama" and "4096 tokens" in arch.warnings()[0]
    assert architecture(MistralConfig(sliding_window=None)).warnings() == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GemmaConfig(), "'gemma' is not among"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (Qwen3Config(rope_parameters=LLAMA31, max_position_embeddings=131072), "'llama3' cannot be expressed"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config, message):
    with pytest.raises(LlmqError, match=message):
        architecture(config)
