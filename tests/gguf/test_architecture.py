"""What llama.cpp calls a model: names, row order, rotary scaling, and models that it cannot hold."""

import gguf
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmq.gguf.architecture import architecture
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}


def described(config, tmp_path):
    arch = architecture(config)
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", arch.name)
    arch.describe(writer)
    return {key: value.value for key, value in writer.kv_data[0].items()}


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
    tied = architecture(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, attention_bias=True))
    assert tied.tensor("lm_head.weight") is None and tied.tensor("model.embed_tokens.weight") == "token_embd.weight"
    assert tied.tensor("model.layers.1.self_attn.rotary_emb.inv_freq") is None
    assert tied.tensor("model.layers.1.self_attn.o_proj.bias") == "blk.1.attn_output.bias"
    own = architecture(LlamaConfig(num_hidden_layers=2))
    assert own.tensor("lm_head.weight") == "output.weight"


@pytest.mark.parametrize(
    "name", ["layers.1.adapter.weight", "layers.2.mlp.up_proj.weight", "layers.1.mlp.up_proj.bias"]
)
def test_a_tensor_that_transformers_would_pass_over_is_refused(name):
    with pytest.raises(LlmqError, match=rf"model\.{name} has no place in the model"):
        architecture(LlamaConfig(num_hidden_layers=2)).tensor(f"model.{name}")


def test_a_bias_that_llama_cpp_does_not_read_is_refused():
    qwen3 = architecture(Qwen3Config(num_hidden_layers=1, attention_bias=True))
    assert qwen3.tensor("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    with pytest.raises(LlmqError, match=r"'qwen3' has no tensor model\.layers\.0\.self_attn\.o_proj\.bias"):
        qwen3.tensor("model.layers.0.self_attn.o_proj.bias")


def test_ggufs_map_of_names_is_built_once(monkeypatch):
    built = []
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *a: built.append(a) or gguf.TensorNameMap(*a))
    arch = architecture(LlamaConfig(num_hidden_layers=2))
    for i in (0, 1):
        arch.tensor(f"model.layers.{i}.mlp.up_proj.weight")
    assert len(built) == 1


@pytest.mark.parametrize(
    "config",
    [MistralConfig(sliding_window=4096, max_position_embeddings=32768),
     Qwen2Config(sliding_window=4096, use_sliding_window=True, max_window_layers=30),
     Qwen3Config(sliding_window=4096, use_sliding_window=True, max_window_layers=30)],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_the_context_of_a_model_with_a_window_is_where_llama_cpp_computes_the_same(config, tmp_path):
    arch = architecture(config)
    assert "context is 4096 tokens" in arch.warnings()[0]
    assert described(config, tmp_path)[f"{arch.name}.context_length"] == 4096


@pytest.mark.parametrize(
    "config",
    [MistralConfig(sliding_window=None), Qwen2Config(sliding_window=4096), LlamaConfig(sliding_window=64),
     Qwen3Config(sliding_window=4096, use_sliding_window=True, max_window_layers=99)],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_a_window_that_transformers_does_not_apply_changes_nothing(config):
    arch = architecture(config)
    assert arch.warnings() == [] and arch.context == config.max_position_embeddings


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 48}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 48}),
        ("mistral", {"head_dim": 48, "sliding_window": 26}),
    ],
)
def test_llama_cpp_computes_what_transformers_does(kind, options, tmp_path, tokenizer_plain, llama_cpp):
    sizes = {"vocab_size": 328, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | options))).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):  # transformers starts them at 0
            torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path / "model")
    tokenizer_plain.save_pretrained(tmp_path / "model")
    recipe = Recipe(format="gguf", method="rtn", type="F32", dtype="float32")
    quantize(prepare(str(tmp_path / "model"), recipe, "cpu"), tmp_path / "out.gguf")
    ids = torch.randint(2, 320, (24,)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = llama_cpp(tmp_path / "out.gguf").log_probabilities(ids, 328)
    assert max(abs(wanted[i].item() - p) for i, p in found.items()) < 0.05
