import io
import json
import re
import shutil
from pathlib import Path

import _narrow
import pytest
from _families import FAMILIES
from rich.console import Console
from safetensors.torch import load_file, save_file

from llmq.errors import LlmqError
from llmq.inspection import inspect


def shown(folder, **options):
    out = io.StringIO()
    for table in inspect(str(folder), **options):
        Console(file=out, width=300).print(table)
    return out.getvalue()


GOLDEN = Path(__file__).parent / "golden"
LINE = {"bits": 4, "method": "rtn", "weight_error": 0.0123}


@pytest.mark.parametrize(
    "record",
    ["{", "[1]", "null", '{"recipe": {}}', '{"size": {"bits_per_weight": 4}}', '{"size": 4, "recipe": {}}',
     '{"size": {}, "recipe": {}, "linears": {"a": 4}}', '{"size": {}, "recipe": {}, "linears": []}',
     '{"size": {}, "recipe": {}, "linears": {"a": {"output_error": "x"}}}'],
)  # fmt: skip
def test_a_record_of_another_shape_is_one_line(tiny_checkpoint, record):
    folder = tiny_checkpoint()
    (folder / "quantization.json").write_text(record)
    with pytest.raises(LlmqError, match=r"quantization\.json"):
        shown(folder, linears=True)


def test_a_record_is_shown_with_its_errors(tiny_checkpoint):
    folder = tiny_checkpoint()
    record = {"size": {"bits_per_weight": 4.25}, "recipe": {"bits": 4}, "linears": {"model.x": LINE}}
    (folder / "quantization.json").write_text(json.dumps(record))
    said = shown(folder, linears=True)
    assert "4.25" in said and "1.230e-02" in said and "bits=4" in said


def test_quantization_config_null_is_float_and_a_string_is_refused(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert "none (float)" in shown(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    with pytest.raises(LlmqError, match="quantization_config"):
        shown(folder)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gptq_v1_w3g32", {"0.self_attn.k_proj": "[64, 64] 3 32 yes float"}),
        ("awq_w4g64", {"1.mlp.down_proj": "[64, 128] 4 64 no float"}),
        ("auto_round_w4g32_asym", {"1.mlp.up_proj": "[128, 64] 4 32 no float"}),
        ("ct_mixed", {"0.mlp.down_proj": "[64, 128] 8 channel yes float", "0.mlp.up_proj": "[128, 64] 4 32 yes float"}),
        ("ct_int_w8a8_dynamic", {"1.self_attn.q_proj": "[128, 64] 8 channel yes 8 bits, dynamic"}),
        ("ct_int_w8a8_static", {"1.self_attn.q_proj": "[128, 64] 8 channel yes 8 bits, static"}),
    ],
)
def test_a_peers_linears_are_shown_with_their_schemes(name, rows):
    said = [" ".join(line.replace("\u2502", " ").split()) for line in shown(GOLDEN / name, linears=True).splitlines()]
    assert sum(line.startswith("model.layers.") for line in said) == 14
    for linear, row in rows.items():
        assert f"model.layers.{linear} {row}" in said


def test_a_packed_checkpoint_that_does_not_load_is_shown_with_the_reason(tmp_path):
    folder = shutil.copytree(GOLDEN / "gptq_v1_w3g32", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales_2"] = tensors.pop("model.layers.1.mlp.up_proj.scales")
    save_file(tensors, folder / "model.safetensors")
    said = shown(folder, linears=True)
    assert "not loaded by llmq" in said and "up_proj.scales is missing" in said
    assert "model.layers.1.mlp.up_proj.scales_2" in said and "F16" in said


def test_what_llmq_recorded_is_shown_in_place_of_headers(tmp_path):
    folder = shutil.copytree(GOLDEN / "gptq_v1_w3g32", tmp_path / "copy")
    record = {"size": {}, "recipe": {}, "linears": {"model.x": LINE}}
    (folder / "quantization.json").write_text(json.dumps(record))
    said = shown(folder, linears=True)
    assert "1.230e-02" in said and "group size" not in said


def test_narrow_floats_are_shown_with_what_they_are_decoded_from(tiny_checkpoint):
    folder = tiny_checkpoint()
    _narrow.rewrite(folder, "fp8-block")
    said = " ".join(shown(folder, linears=True).split())
    assert "decoded as they are read 14 FP8, blocks of" in said.replace("\u2502 ", "")
    assert "not loaded" not in said and "model.layers.1.mlp.up_proj.weight" in said


def test_narrow_floats_that_load_packed_are_linears_like_others(tiny_checkpoint):
    folder = tiny_checkpoint()
    _narrow.rewrite(folder, "ct-nvfp4")
    said = " ".join(shown(folder, linears=True).replace("\u2502", "").split())
    assert "decoded as" not in said and "not loaded" not in said
    assert re.search(r"layers\.1\.mlp\.up_proj \[\d+, 64\] 4 16 yes", said)


def test_the_size_of_a_wrappers_language_model_is_shown(tmp_path):
    FAMILIES["gemma3"].save(tmp_path)
    assert re.search(r"blocks, hidden size │ 2, 64 ", shown(tmp_path))
