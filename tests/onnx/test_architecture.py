"""What a model computes is read from its modules: windows, tables, multipliers; what no graph computes is named."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.onnx.architecture import FAMILIES, architecture
from llmq.types import LlmqError

SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "factor": 2.0}


def found(kind, positions=None, **changes):
    config = AutoConfig.for_model(kind, **(SMALL | changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return architecture(config, model, positions)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_read(kind):
    model = found(kind)
    assert (model.blocks == 2 and (model.heads, model.kv_heads, model.head_dim) == (4, 2, 32)) or kind == "phi3"
    assert model.positions == 64 and model.activation in ("silu", "gelu_tanh")


def test_values_are_those_of_the_modules():
    model = found("granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=4.0)
    assert (model.embedding, model.residual, model.logits, model.scale) == (3.0, 0.5, 0.25, 1.0)
    gemma = found("gemma2", sliding_window=5)
    assert gemma.windows == (5, 0) and gemma.embedding == 8.0 and (gemma.cap, gemma.last_cap) == (50.0, 30.0)
    assert "model.norm.weight" in gemma.shifted and not model.shifted
    assert found("mistral", sliding_window=7).windows == (7, 7)
    assert found("smollm3", no_rope_layers=[1, 0]).turns == ("rotary", "")


def test_blocks_that_turn_by_their_type_have_a_table_each():
    model = found("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    assert model.turns == ("sliding_attention", "full_attention") and len(model.tables) == 2
    one, other = (model.tables[name].cos for name in model.turns)
    assert one.shape == other.shape == (64, 16) and not torch.equal(one, other)


def test_part_of_a_head_is_turned_and_fewer_positions_are_written():
    model = found("glm4", positions=10, partial_rotary_factor=0.5)
    assert model.tables["rotary"].channels == 16 and model.positions == 10


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "turn by the length of the text"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu', which llmq does not write"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention both ways"),
        ("granite", {"logits_scaling": 0}, "logits_scaling: 0"),
        ("llama", {"max_position_embeddings": 2**26}, "67,108,864 positions; give fewer, --to onnx:context"),
        ("mixtral", {}, "'mixtral' is not among those written as ONNX"),
        ("nemotron", {}, "'nemotron' is not among those"),
    ],
)
def test_what_no_graph_computes_is_refused_by_name(kind, changes, said):
    with pytest.raises(LlmqError, match=said):
        found(kind, **changes)


def test_frequencies_of_long_texts_are_refused():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    rope = ROPE | factors | {"rope_type": "longrope", "partial_rotary_factor": 1.0}
    with pytest.raises(LlmqError, match="length of the text"):
        found("phi3", head_dim=16, rope_parameters=rope)
