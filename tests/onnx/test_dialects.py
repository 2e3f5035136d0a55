"""Both dialects compute what llmq's reference decode does: whole prompts, step by step, batches with padding."""

import pytest
import torch
from _measure import decibels
from _onnxruntime import OnnxModel

from llmq.types import LlmqError

SAME = 110  # dB; both sides compute in float32
DIALECTS = pytest.mark.parametrize("to", ["onnx", "onnx:qdq"])
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = PLAIN | {"rope_type": "linear", "factor": 2.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.1}
FAMILIES = {
    "llama": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True, "rope_parameters": YARN},
    "granite": GRANITE | {"rope_parameters": LINEAR},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "phi3": {
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {},
}
GOLDEN = [
    "gptq_v1_w2g32", "gptq_v1_w3g32", "gptq_v1_w4g32_asym", "gptq_v1_w4g32_desc_act", "gptq_v1_w4_perchannel",
    "gptq_v1_w8g32_sym", "gptq_v2_w4g32_asym", "awq_gptqmodel_w4g32", "ct_mixed", "ct_pack_w3g32", "ct_int_w8a8_static",
    "auto_round_w4g32_asym",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_peers_codes_compute_the_same(name, golden, exported, reference, ids):
    folder = golden(name)
    want = reference(folder)(ids[:1])
    for to in ("onnx", "onnx:qdq"):
        made = exported(folder, to)
        assert made.done["outcomes"] == {"values exact": 14}
        assert decibels(made.model(ids[:1])[0], want) > SAME
        assert decibels(made.model.by_steps(ids[:1]), want) > SAME


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_computes_the_same_in_a_padded_batch(kind, family, exported, reference, ids):
    folder = family(kind, **FAMILIES[kind])
    want = reference(folder)
    for to, padded in (("onnx", slice(13, None)), ("onnx:qdq", slice(0, 7))):
        made, mask = exported(folder, to), torch.ones_like(ids)
        assert decibels(made.model.by_steps(ids[:1]), want(ids[:1])) > SAME
        mask[1, padded] = 0
        assert decibels(made.model(ids, mask)[0][mask > 0], want(ids, mask)[mask > 0]) > SAME


def test_a_batch_padded_on_the_left_goes_on_step_by_step(family, exported, reference, ids):
    folder = family("llama")
    made, mask = exported(folder, "onnx:qdq"), torch.ones_like(ids)
    mask[1, :7] = 0
    _, past = made.model(ids[:, :-1], mask[:, :-1])
    last, _ = made.model(ids[:, -1:], mask, past)
    assert decibels(last[:, 0], reference(folder)(ids, mask)[:, -1]) > SAME


@DIALECTS
def test_inputs_of_8_bits_per_token_differ_by_codes_that_lie_between_two(to, golden, exported, reference, ids):
    """max|x| / 127.5 puts the largest number of a token half-way between two codes: the last bit of a sum decides."""
    folder = golden("ct_int_w8a8_dynamic")
    assert decibels(exported(folder, to).model(ids[:1])[0], reference(folder)(ids[:1])) > 40


@DIALECTS
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_8_bits(to, tied, family, exported, reference, ids):
    folder = family("llama", tie_word_embeddings=tied)
    made, want = exported(folder, f"{to.replace(':', ':dialect=')}:head=int8"), reference(folder)(ids)
    assert made.done["outcomes"] == {"rounded to 8 bits": 1, "values exact": 14}
    assert decibels(made.model(ids)[0], want) > 35
    assert exported(folder, to).done["bytes"] > made.done["bytes"] + 30_000


@DIALECTS
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_packed_keeps_its_codes(to, tied, family, exported, reference, ids):
    folder = family("llama", {"embeddings": 8}, tie_word_embeddings=tied)
    made = exported(folder, to)
    assert made.done["outcomes"] == {"values exact": 14 + 1 + (not tied)}
    assert decibels(made.model(ids)[0], reference(folder)(ids)) > SAME


@pytest.mark.parametrize("io", ["float16", "bfloat16"])
@pytest.mark.parametrize("to", ["onnx", "onnx:dialect=qdq"])
def test_narrow_floats_keep_codes_and_say_that_scales_are_rounded(io, to, golden, family, tmp_path, reference, ids):
    from llmq.export._run import export

    rounded = export(str(family("llama")), tmp_path / "ours", f"{to}:io={io}")
    assert rounded["outcomes"] == {"codes exact, scales rounded": 14}
    folder = golden("awq_w4g32" if io == "float16" else "awq_gptqmodel_w4g32")
    kept = export(str(folder), tmp_path / "kept", f"{to}:io={io}")
    assert kept["outcomes"] == {"values exact": 14}
    if io == "float16":  # onnxruntime's CPU has no kernels of bfloat16
        assert decibels(OnnxModel(tmp_path / "kept")(ids)[0], reference(folder)(ids)) > 45


def test_codes_of_mlx_are_integers_with_zeros(family, exported, reference, ids):
    folder = family("llama", {"format": "mlx", "sym": False})
    made = exported(folder, "onnx:qdq")
    outcomes = made.done["outcomes"]
    assert sum(outcomes.values()) == 14 and outcomes.keys() <= {"values exact", "codes exact, minimum rounded"}
    assert decibels(made.model(ids)[0], reference(folder)(ids)) > SAME


def test_accuracy_level_4_rounds_inputs_and_is_only_made_where_it_is_asked_for(golden, exported, reference, ids):
    folder = golden("gptq_v1_w4g32_asym")
    want = reference(folder)(ids)
    assert 30 < decibels(exported(folder, "onnx:accuracy_level=4").model(ids)[0], want) < 45


def test_onnxruntime_rounds_inputs_of_plain_4_bit_weights_unless_it_is_told_not_to(golden, exported, reference, ids):
    folder = golden("gptq_v1_w4g32_asym")
    made, want = exported(folder, "onnx:qdq"), reference(folder)(ids)
    as_it_comes = OnnxModel(made.folder, {})
    assert decibels(as_it_comes(ids)[0], want) < 45


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (
            "llama",
            {"rope_parameters": DYNAMIC},
            "length of the text",
        ),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention both ways"),
        ("mixtral", {}, "'mixtral' is not among those written as ONNX"),
        ("nemotron", {}, "'nemotron' is not among"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(kind, changes, said, family, tmp_path):
    from llmq.export._run import export

    with pytest.raises(LlmqError, match=said):
        export(str(family(kind, **changes)), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
