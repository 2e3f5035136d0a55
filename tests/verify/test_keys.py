"""What a file's keys say, as transformers' config; test_programs.py reads whole files back."""

import gguf
import numpy as np
import pytest

from llmq.errors import LlmqError
from llmq.gguf.programs import PROGRAMS
from llmq.gguf.reader import GgufFile
from llmq.verify.keys import DEEPSEEK_V2, MIXTRAL, READINGS, Keys, reading


@pytest.fixture
def keys(tmp_path):
    def make(arch, **values):
        writer = gguf.GGUFWriter(tmp_path / "keys.gguf", arch)
        for key, value in values.items():
            add = {int: writer.add_uint32, list: writer.add_array, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return Keys(GgufFile(tmp_path / "keys.gguf"))

    return make


def test_every_program_that_is_written_is_read_under_its_model_type():
    assert {p.name for p in PROGRAMS.values()} == READINGS.keys()
    assert {r.model_type for r in (*READINGS.values(), MIXTRAL, DEEPSEEK_V2)} == PROGRAMS.keys() - {"mistral"}


def test_windows_are_those_of_the_period(keys):
    said = {"block_count": 5, "embedding_length": 64, "attention.head_count": 2, "attention.key_length": 16}
    found = keys("gemma3", **said, **{"attention.sliding_window": 8, "attention.sliding_window_pattern": 2})
    config = reading(found).config(found)
    assert [kind.partition("_")[0] for kind in config["layer_types"]] == ["sliding", "full"] * 2 + ["sliding"]
    assert config["sliding_window"] == 8 and config["query_pre_attn_scalar"] == 16


def test_a_key_that_is_missing_or_no_number_is_named(keys):
    found = keys("phi3", **{"rope.dimension_count": 0, "attention.key_length": "many"})
    for key, said in (("block_count", "is missing"), ("rope.dimension_count", "no number above 0"),
                      ("attention.key_length", "no number above 0")):  # fmt: skip
        with pytest.raises(LlmqError, match=rf"key phi3\.{key} (is )?{said}"):
            found.number(key)
    odd = {"ssm.time_step_rank": 3, "ssm.group_count": 2, "rope.dimension_count": 4, "attention.key_length": 8}
    with pytest.raises(LlmqError, match="the heads of linear attention do not read"):
        READINGS["qwen35"].config(keys("qwen35", **odd, **{"rope.dimension_sections": "many"}))
    few = {"block_count": 2, "attention.sliding_window_pattern": [1, 0], "attention.head_count_kv": [1, 1, 1]}
    with pytest.raises(LlmqError, match=r"gemma4\.attention\.head_count_kv is no whole number for each of 2 blocks"):
        READINGS["gemma4"].config(keys("gemma4", **few))
    with pytest.raises(LlmqError, match="verify knows the keys of llama, .* not of 'mpt'"):
        reading(keys("mpt"))


def test_names_rows_and_norms_are_turned_back(keys):
    gemma, llama = READINGS["gemma3"], READINGS["llama"]
    assert gemma.name("blk.3.ffn_norm.weight") == "model.layers.3.pre_feedforward_layernorm.weight"
    assert READINGS["glm4"].name("blk.0.ffn_up.weight") == "model.layers.0.mlp.gate_up_proj.weight"
    assert gemma.name("output_norm.weight") == "model.norm.weight" and llama.name("odd.bias") == "odd.bias"
    norm = np.array([1.5, 3.0], np.float32)
    assert gemma.in_order("model.norm.weight", norm, keys("gemma3")).tolist() == [0.5, 2]
    rows = np.arange(8, dtype=np.float32)
    heads = keys("llama", **{"attention.head_count": 2})
    assert llama.in_order("m.q_proj.bias", rows, heads).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
