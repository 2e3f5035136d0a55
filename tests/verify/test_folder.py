"""Folders of other tools: right ones pass, and each kind of fault is named, though no checksum was recorded."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.errors import LlmqError
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))
def test_peers_checkpoints_pass(folder):
    report = verify(GOLDEN / folder)
    assert report.passed, report.failures
    assert report.checked["packed linears"] == (0 if folder == "float" else 14)
    assert report.checked["states of a forward"] == 3


def test_against_its_source_a_peers_checkpoint_tells_how_far_it_is():
    report = verify(GOLDEN / "gptq_v1_w4g32_sym", GOLDEN / "float")
    assert report.passed and 0.005 < report.figures["weight_error"] < 0.02 and 0 < report.figures["kl"] < 0.2


def test_a_folder_that_is_not_there_is_no_report(tmp_path):
    with pytest.raises(LlmqError, match="not a folder"):
        verify(tmp_path / "none")


@pytest.fixture
def copy(tmp_path):
    """`copy(golden folder, change of its tensors, change of its quantization_config)`: what verify says of it."""

    def made(folder, tensors=None, config=None):
        for file in (GOLDEN / folder).iterdir():
            if file.name != "logits.safetensors":
                shutil.copyfile(file, tmp_path / file.name)
        if tensors:
            found = load_file(tmp_path / "model.safetensors")
            tensors(found)
            save_file(found, tmp_path / "model.safetensors")
        if config:
            whole = json.loads((tmp_path / "config.json").read_text())
            config(whole)
            (tmp_path / "config.json").write_text(json.dumps(whole))
        return " | ".join(verify(tmp_path).failures)

    return made


def change(name, value, at=0):
    """Return a function that writes a value into a tensor."""

    def do(tensors):
        tensors[name].view(-1)[at] = value

    return do


def drop(name):
    return lambda tensors: tensors.pop(name)


TENSORS = {
    "a packed tensor is missing": ("gptq_v1_w4g32_sym", drop(f"{UP}.qzeros"), "qzeros is missing"),
    "a float tensor is missing": ("awq_w4g32", drop("model.norm.weight"), "model.norm.weight is missing"),
    "no packed tensor is left": (
        "ct_pack_w4g32_sym",
        lambda t: [t.pop(f"{UP}.weight_{k}") for k in ("packed", "scale", "shape")],
        "up_proj.weight is missing",
    ),
    "a tensor of nothing": (
        "awq_w4g32",
        lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}),
        "model.layers.7.mlp.up_proj.weight has no place",
    ),
    "a float weight beside the packed one": (
        "gptq_v1_w4g32_sym",
        lambda t: t.update({f"{UP}.weight": torch.ones(128, 64)}),
        f"nothing reads {UP}: weight",
    ),
    "another shape": (
        "ct_pack_w4g32_sym",
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].T.contiguous()}),
        "weight_scale is BF16 [2, 128], not float [128, 2]",
    ),
    "another dtype": (
        "gptq_v1_w4g32_sym",
        lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"].to(torch.int64)}),
        "qzeros is I64",
    ),
    "a scale that is Inf": ("gptq_v1_w4g32_sym", change(f"{UP}.scales", torch.inf), "1 of 256 are NaN or Inf"),
    "a scale that is zero": ("awq_w4g32", change(f"{UP}.scales", 0), "1 of 256 are zero"),
    "a denormal scale": ("ct_int_w8a8_dynamic", change(f"{UP}.weight_scale", 1e-40), "1 of 128 are denormal"),
    "a float that is NaN": ("awq_w4g32", change("model.norm.weight", torch.nan), "model.norm.weight holds NaN"),
    "symmetric zeros that are not": ("gptq_v1_w4g32_sym", change(f"{UP}.qzeros", 0), "8 of 256 zeros are not 8"),
    "a group that is none": ("gptq_v1_w4g32_desc_act", change(f"{UP}.g_idx", 9), "outside 0 .. 1: [9]"),
    "uneven groups": ("gptq_v1_w4g32_desc_act", lambda t: t[f"{UP}.g_idx"].zero_(), "[0, 64] columns, not 32"),
    "groups that readers pass over": (
        "gptq_v1_w4g32_sym",
        lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0)}),
        "does not say desc_act",
    ),
    "a shape that is another's": ("ct_pack_w3g32", change(f"{UP}.weight_shape", 64), "weight_shape is [64, 64]"),
    "an embedding of other rows": (
        "awq_w4g32",
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:100].clone()}),
        "lm_head.weight is [100, 64], not [128, 64]",
    ),
    "all positions alike": (
        "float",
        lambda t: t["model.embed_tokens.weight"].copy_(t["model.embed_tokens.weight"][:1].expand(128, 64)),
        "are the same at every position",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_wrong_tensors_are_named(copy, what):
    folder, wrong, said = TENSORS[what]
    assert said in copy(folder, tensors=wrong)


def quantization(**changes):
    return lambda config: config["quantization_config"].update(changes)


CONFIGS = {
    "v1 that says v2": (
        "gptq_v1_w4g32_sym",
        quantization(checkpoint_format="gptq_v2", format="gptq_v2"),
        "256 of 256 zeros are not 8",
    ),
    "v2 that says v1": (
        "gptq_v2_w4g32_sym",
        quantization(checkpoint_format="gptq", format="gptq"),
        "quantize_config.json says checkpoint_format 'gptq_v2', config.json 'gptq'",
    ),
    "other bits": ("gptq_v1_w4g32_asym", quantization(bits=8), "qweight is I32 [8, 128], not I32 [16, 128]"),
    "other groups": ("awq_w4g32", quantization(group_size=64), "scales is F16 [2, 128], not float [1, 128]"),
    "a linear left float that is packed": (
        "ct_pack_w4g32_sym",
        quantization(ignore=["lm_head", UP]),
        f"{UP}: the file holds it packed, but the config leaves it float",
    ),
    "zeros where none are stored": (
        "ct_pack_w4g32_sym",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "weight_zero_point is missing",
    ),
    "fewer blocks": (
        "awq_w4g32",
        lambda c: c.update(num_hidden_layers=1),
        "model.layers.1.input_layernorm.weight has no place",
    ),
    "a packing that is not known": ("gptq_v1_w4g32_sym", quantization(pack_dtype="int64"), "pack_dtype is 'int64'"),
    "a method that is not known": ("awq_w4g32", quantization(quant_method="hqq"), "quant_method is 'hqq'"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_not_the_tensors_own_is_named(copy, what):
    folder, wrong, said = CONFIGS[what]
    assert said in copy(folder, config=wrong)


def test_what_a_config_does_not_say_a_peers_tensors_may(copy, tmp_path):
    """No g_idx, null for what is missing, a float head under a config that packs all: read, and noted."""

    def without(tensors):
        for name in [n for n in tensors if n.endswith("g_idx")]:
            del tensors[name]

    assert copy("awq_w4g32", config=quantization(lm_head=True)) == ""
    assert any("lm_head: the config says 4-bit awq" in note for note in verify(tmp_path).notes)
    assert copy("gptq_v1_w4g32_sym", without, quantization(dynamic=None, desc_act=None)) == ""


def test_a_pattern_that_takes_forever_is_named(copy):
    bomb = quantization(dynamic={r"-:^(?:(\w)|(\w\w)|(\W|\w{3}))*[^\w.]": {}})
    start = time.monotonic()
    assert "takes more than 1 second" in copy("gptq_v1_w4g32_sym", config=bomb)
    assert time.monotonic() - start < 10


def test_index_and_shards_must_agree(tmp_path, tiny_checkpoint):
    folder = tiny_checkpoint(shard="100KB")
    assert verify(folder).passed
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = shards[0]
    content["metadata"]["total_size"] += 4
    index.write_text(json.dumps(content))
    said = " | ".join(verify(folder).failures)
    assert "tensor model.norm.weight is in" in said and "bytes in all, there are" in said
    twice = load_file(folder / shards[0]) | {"model.norm.weight": torch.ones(64)}
    save_file(twice, folder / shards[0])
    assert "tensor model.norm.weight is in both" in " | ".join(verify(folder).failures)
