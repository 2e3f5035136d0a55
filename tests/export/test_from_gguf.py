"""A GGUF file as a float checkpoint: the tensors that it was written from, to the last bit where it holds floats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _readers import rewrite_gguf
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.errors import LlmqError
from llmq.export import floats
from llmq.verify.ggml import open_gguf
from llmq.verify.report import Report

IDS = torch.arange(3, 35)[None]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "plain": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        },
    },
    "llama3": {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 16384,
    },
}  # fmt: skip


def quantized(src, out, kind):
    llmq.quantize(src, out, type=kind, method="rtn", warn=print)
    return out


@pytest.mark.parametrize("rope", ROPES)
def test_floats_come_back_as_they_were_and_compute_the_same(rope, tiny_checkpoint, tmp_path):
    src, out = tiny_checkpoint(**ROPES[rope]), tmp_path / "out"
    llmq.dequantize(quantized(src, tmp_path / "x.gguf", "F32"), out, dtype="float32", warn=print)
    want, got = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (src, out)]
    with torch.no_grad():
        a, b = (m(IDS).logits for m in models)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert models[1].config.eos_token_id == models[0].config.eos_token_id
    text = "the first city </s> 12"
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(src)(text).input_ids


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_packed_weights_are_what_gguf_py_decodes(kind, tiny_checkpoint, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    file = quantized(tiny_checkpoint(dtype=torch.bfloat16, **sizes), tmp_path / "x.gguf", kind)
    record = llmq.dequantize(file, tmp_path / "out", warn=print)
    got = load_file(tmp_path / "out" / "model.safetensors")
    stored = {t.name: t for t in GGUFReader(file).tensors}
    for ggml, name in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        t = stored[f"blk.1.{ggml}.weight"]
        want = torch.from_numpy(np.array(quants.dequantize(t.data, t.tensor_type)))
        assert torch.equal(got[f"model.layers.1.{name}.weight"], want.bfloat16())
    assert record["decoded"]["quant_method"] == "gguf" and sum(record["decoded"]["weights"].values()) >= 14
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"


def test_it_computes_what_verify_finds_in_the_file(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    llmq.dequantize(file, tmp_path / "out", dtype="float32", warn=print)
    found, _ = open_gguf(file, report := Report())
    want = found.skeleton.filled(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want(IDS).logits, rtol=1e-5, atol=1e-5)
    assert report.passed


def test_a_split_file_and_its_own_output_are_read(tiny_checkpoint, tmp_path):
    src = tiny_checkpoint()
    llmq.quantize(src, tmp_path / "s.gguf", type="F16", method="rtn", split_max_size="1M", warn=print)
    first = sorted(tmp_path.glob("s*.gguf"))[0]
    floats.dequantize(str(first), tmp_path / "a")
    llmq.quantize(tmp_path / "a", tmp_path / "b.gguf", type="F16", method="rtn", warn=print)
    floats.dequantize(str(tmp_path / "b.gguf"), tmp_path / "c")
    a, c = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert a.keys() == c.keys() and all(torch.equal(a[n], c[n]) for n in a)


def test_a_tokenizer_that_cannot_be_made_is_told_and_recorded(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    other = tmp_path / "y.gguf"
    rewrite_gguf(file, other, {"tokenizer.ggml.pre": "of the future"})
    warned = []
    record = llmq.dequantize(other, tmp_path / "out", warn=warned.append)
    assert "OUT has no tokenizer" in warned[-1] and "of the future" in warned[-1] and warned == record["warnings"]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_not_known_is_refused_in_one_line(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    other = tmp_path / "y.gguf"
    rewrite_gguf(file, other, {"general.architecture": "of the future"})
    (tmp_path / "z.gguf").write_bytes(file.read_bytes()[:-40])
    for path, said in (
        (other, "'of the future'"),
        (tmp_path / "z.gguf", "is truncated or damaged"),
        (tmp_path / "none.gguf", "is not a file"),
    ):
        done = CliRunner().invoke(cli.app, ["dequantize", str(path), str(tmp_path / "out")])
        assert isinstance(done.exception, LlmqError) and said in str(done.exception), done.exception
        assert "\n" not in str(done.exception) and not (tmp_path / "out").exists()
