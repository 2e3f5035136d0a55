"""The type of every tensor, against what llama-quantize chose (scripts/make_golden_mixtures.py made the lists)."""

import importlib.util
import json
from pathlib import Path

import pytest

from llmq.gguf import mixture
from llmq.gguf.architecture import architecture
from llmq.guard.patterns import Pattern
from llmq.types import LlmqError

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "gguf_mixtures.json").read_text())


def maker():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "scripts" / "make_golden_mixtures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = maker()


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_gets_the_type_that_llama_quantize_gives_it(name):
    config = MAKER.config_of(name)
    arch, shapes = architecture(config), MAKER.shapes_of(config)
    assert len(GOLDEN[name]) == 2 * len(MAKER.MIXTURES)
    for label, wanted in GOLDEN[name].items():
        mix, _, with_imatrix = label.partition(" with ")
        gqa = config.num_attention_heads // config.num_key_value_heads
        tied = "output.weight" not in shapes
        model = mixture.Model(arch.blocks, gqa, tied, arch.large, bool(with_imatrix), arch.experts)
        types = mixture.assign(shapes, mix, model)
        assert MAKER.runs(types) == wanted, label
        assert {types[n] for n, s in shapes.items() if len(s) == 1} == {"F32"}


def test_names_are_llama_cpps_own():
    assert mixture.mixture("q4_k") == "Q4_K_M" and mixture.mixture("Q3_K") == "Q3_K_M"
    assert mixture.file_type("Q4_K_M") == 15 and mixture.file_type("F32") == 0
    with pytest.raises(LlmqError, match="no GGUF type 'Q7'"):
        mixture.mixture("Q7")


def test_embeddings_of_single_blocks_are_as_the_embedding_and_their_projection_stays_float():
    shapes = {"per_layer_token_embd.weight": (8, 512), "per_layer_model_proj.weight": (512, 256)}
    for tied, kind in ((True, "Q6_K"), (False, "Q4_K")):
        found = mixture.assign(shapes, "Q4_K_M", mixture.Model(1, 1, tied, False, False))
        assert found == {"per_layer_token_embd.weight": kind, "per_layer_model_proj.weight": "F16"}


def test_the_last_override_wins_and_vectors_stay_float():
    shapes = {"blk.0.ffn_down.weight": (4, 256), "blk.0.ffn_norm.weight": (256,)}
    model = mixture.Model(1, 1, True, False, False)
    rules = [(Pattern("ffn", "--override"), "Q8_0"), (Pattern("down", "--override"), "Q5_K")]
    assert mixture.assign(shapes, "Q4_0", model, rules) == {
        "blk.0.ffn_down.weight": "Q5_K",
        "blk.0.ffn_norm.weight": "F32",
    }
    with pytest.raises(LlmqError, match="--skip 'ffn_norm' matches no matrix"):
        mixture.assign(shapes, "Q4_0", model, [(Pattern("ffn_norm", "--skip 'ffn_norm'"), "F16")])
