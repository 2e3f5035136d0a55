"""What a file's keys say, as transformers' config; test_programs.py reads whole files back."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from _rewriting import rewrite_gguf

import llmq
from llmq.errors import LlmqError
from llmq.gguf.programs import PROGRAMS
from llmq.gguf.reader import GgufFile
from llmq.verify import verify
from llmq.verify.ggml import shards
from llmq.verify.keys import DEEPSEEK_V2, MIXTRAL, READINGS, Keys, reading

FLOAT = Path(__file__).parents[1] / "golden" / "float"


@pytest.fixture
def keys(tmp_path):
    def make(arch, **values):
        writer = gguf.GGUFWriter(tmp_path / "keys.gguf", arch)
        for key, value in values.items():
            name = key if key.startswith("split.") else f"{arch}.{key}"
            kind = (
                gguf.GGUFValueType.UINT32 if type(value) is int and value >= 0 else gguf.GGUFValueType.get_type(value)
            )
            writer.add_key_value(name, value, kind)
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


ODD = {"number": ["many", [2, 2], ["a"], True, 2.0, 0, -1], "flag": [1, "many", [True]], "text": [1, ["many"], True],
       "real": ["many", [2, 2], True, float("nan"), float("inf"), -0.5, 0], "blocks": [513], "first": [[1, 2], "x"],
       "each": [[1, 1, 1], [1, -1], [1, 0], [0.5, 0.5], ["a", "b"], "many", True, -1]}  # fmt: skip


@pytest.mark.parametrize(("method", "value"), [(method, value) for method, values in ODD.items() for value in values])
def test_a_value_of_another_kind_is_named(keys, method, value):
    key, said = "block_count" if method == "blocks" else "x", {"block_count": 2}
    found = keys("phi3", **(said | {key: value}))
    with pytest.raises(LlmqError, match=rf"keys\.gguf: key phi3\.{key} is no .*; download or write the file again"):
        getattr(found, method)(*{"blocks": (), "first": ("x", 3)}.get(method, ("x",)))


def test_values_of_their_kind_and_what_is_missing_are_told_apart(keys):
    found = keys("phi3", **{"block_count": 2, "n": 3, "f": 0.5, "b": True, "t": "yarn", "a": [4, 5], "z": 0})
    assert (found.number("n"), found.real("n"), found.real("f"), found.flag("b"), found.text("t")) == (
        3, 3, 0.5, True, "yarn",
    )  # fmt: skip
    assert (found.each("n"), found.each("a"), found.each("b", zero=True), found.first("a", 1)) == (
        [3, 3], [4, 5], [1, 1], [4],
    )  # fmt: skip
    assert found.number("z", zero=True) == found.real("z", zero=True) == 0 and found.number("no", None) is None
    with pytest.raises(LlmqError, match=r"key phi3\.no is missing"):
        found.real("no")


@pytest.mark.parametrize("count", ["many", [2, 2], -1, 0.5])
def test_a_count_of_shards_that_is_none_is_named(keys, count):
    with pytest.raises(LlmqError, match=r"key split\.count is no whole number from 0"):
        shards(keys("llama", **{"split.count": count}).file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    llmq.quantize(
        FLOAT, out := tmp_path_factory.mktemp("whole") / "f16.gguf", type="F16", method="rtn", format="gguf:pre=gpt-2"
    )
    return out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", "two"),
        ("attention.head_count", [2, 2]),
        ("embedding_length", "many"),
        ("expert_count", [2, 2]),
        ("expert_count", "two"),
        ("feed_forward_length", [0.5, 0.5]),
        ("rope.freq_base", [1e4, 1e4]),
        ("rope.dimension_count", [2, 2]),
        ("rope.dimension_count", 6),
        ("rope.scaling.type", [2, 2]),
        ("rope.scaling.factor", [2.0, 2.0]),
        ("rope.scaling.original_context_length", [2, 2]),
        ("rope.scaling.attn_factor", [2.0, 2.0]),
    ],
)
def test_a_file_with_a_key_of_another_type_fails_in_one_line(whole, tmp_path, key, value):
    file = rewrite_gguf([whole], tmp_path / "odd.gguf", {f"llama.{key}": value})
    report = verify(file)
    assert len(report.failures) == 1 and key in report.failures[0] and "\n" not in report.failures[0]


def test_what_says_the_same_by_block_and_a_factor_of_0_are_read(whole, tmp_path):
    same = {"feed_forward_length": [GgufFile(whole).value("llama.feed_forward_length")] * 2, "rope.scaling.factor": 0.0}
    file = rewrite_gguf([whole], tmp_path / "same.gguf", {f"llama.{key}": value for key, value in same.items()})
    assert verify(file).passed, verify(file).failures


def test_keys_that_do_not_go_together_are_named(keys):
    odd = {"ssm.time_step_rank": 3, "ssm.group_count": 2, "rope.dimension_count": 4, "attention.key_length": 8}
    with pytest.raises(LlmqError, match="the heads of linear attention do not read"):
        READINGS["qwen35"].config(keys("qwen35", **odd, **{"rope.dimension_sections": "many"}))
    few = {"block_count": 2, "attention.sliding_window_pattern": [1, 0], "attention.head_count_kv": [1, 1, 1]}
    with pytest.raises(LlmqError, match=r"gemma4\.attention\.head_count_kv is no whole number .* for each of 2 blocks"):
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
