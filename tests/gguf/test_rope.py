"""Rotary embedding by value: the keys give transformers' frequencies and magnitude, by formula and in llama.cpp."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llmq.gguf.rope import Reads, rotary
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
KEYED = {  # what every architecture can say
    "default": PLAIN,
    "linear": LINEAR,
    "yarn": YARN,
    "attention_factor": YARN | {"attention_factor": 0.9},
    "mscale and mscale_all_dim": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    "one mscale has no effect": YARN | {"mscale": 0.7},
    "factor from the lengths": YARN | {"factor": None},
    "linear by another name": PLAIN | {"rope_type": "proportional", "factor": 3.0},
}
TABLED = {  # what takes rope_freqs.weight
    "truncate": YARN | {"truncate": False},
    "betas": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "llama3": LLAMA3,
    "still pairs": PLAIN | {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "longrope of one factor": LONG | {"short_factor": [1.0, 1.5] * 16, "long_factor": [1.0, 1.5] * 16},
}
REFUSED = {
    "dynamic": (PLAIN | {"rope_type": "dynamic", "factor": 2.0}, "by the length of the text"),
    "longrope": (LONG | {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}, "by the length of the text"),
    "half a head": (LINEAR | {"partial_rotary_factor": 0.5}, "do not rotate the 64 channels"),
}


def found(parameters, divisors, **options):
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=dict(parameters), **options)
    return config, rotary(LlamaRotaryEmbedding(config), config, 64, Reads(divisors))


@pytest.mark.parametrize("name", [*KEYED, *TABLED])
@pytest.mark.parametrize("limit", [1024, 131072])
def test_the_formula_of_llama_cpp_with_these_keys_gives_transformers_values(name, limit):
    config, keys = found((KEYED | TABLED)[name], divisors=True, max_position_embeddings=limit)
    kind = config.rope_parameters["rope_type"]
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    wanted, magnitude = ROPE_INIT_FUNCTIONS.get(kind, default)(config)
    torch.testing.assert_close(keys.frequencies(), wanted.double(), rtol=1e-5, atol=1e-29)
    assert keys.magnitude() == pytest.approx(magnitude, rel=1e-5)
    assert (keys.divisors is None) == (name in KEYED)


def test_llama_31_is_written_as_llama_cpp_writes_it():
    _, keys = found(LLAMA3, divisors=True)
    assert keys.kind == "none" and keys.attn_factor == 1 and keys.divisors[0] == 1 and keys.divisors[-1] == 8
    assert keys.divisors.dtype == torch.float32 and len(keys.divisors) == 32


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_keys_say_is_refused(name):
    parameters, reason = REFUSED[name]
    with pytest.raises(LlmqError, match=reason):
        found(parameters, divisors=True)


@pytest.mark.parametrize("name", TABLED)
def test_an_architecture_without_the_table_refuses_what_needs_it(name):
    with pytest.raises(LlmqError, match=r"no keys that rotate as rope_parameters \{.*write another format"):
        found(TABLED[name], divisors=False)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", n) for n in (*KEYED, *TABLED)]
    + [(k, n) for k in ("qwen2", "qwen3") for n in ("linear", "attention_factor")],
)
def test_llama_cpp_rotates_as_transformers_far_beyond_the_trained_context(
    kind, name, tmp_path, tokenizer_plain, llama_cpp
):
    sizes = {"vocab_size": 328, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    parameters = dict((KEYED | TABLED)[name])
    config = AutoConfig.for_model(kind, **sizes, rope_parameters=parameters, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    folder, out = tmp_path / "model", tmp_path / "out.gguf"
    model.save_pretrained(folder)
    tokenizer_plain.save_pretrained(folder)
    recipe = Recipe(format="gguf", method="rtn", type="F32", dtype="float32")
    quantize(prepare(str(folder), recipe, "cpu"), out)
    ids = torch.randint(2, 320, (700,)).tolist()
    running = llama_cpp(out, 1024)
    for n in (50, 700):
        with torch.no_grad():
            wanted = model(torch.tensor([ids[:n]])).logits[0, -1].log_softmax(-1)
        answer = running.log_probabilities(ids[:n], 328)
        assert max(abs(wanted[i].item() - p) for i, p in answer.items()) < 0.05, n
