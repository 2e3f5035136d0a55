"""A GGUF file as a float checkpoint: the tensors that it was written from, to the last bit where it holds floats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from _rewriting import rewrite_gguf
from _tiny import make_tokenizer
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.errors import LlmqError
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
    assert config["rms_norm_eps"] == 1e-6


def test_it_computes_what_verify_finds_in_the_file(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    llmq.dequantize(file, tmp_path / "out", dtype="float32", warn=print)
    found, _ = open_gguf(file, report := Report())
    want = found.skeleton.filled(torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, want(IDS).logits, rtol=1e-5, atol=1e-5)
    assert report.passed


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5, 1.2, 2.0], "long_factor": [2.0, 4.0, 9.0, 30.0],
        "original_max_position_embeddings": 256}  # fmt: skip
FAMILIES = {
    "gemma3_text": {
        "head_dim": 32, "sliding_window": 6, "num_hidden_layers": 7, "query_pre_attn_scalar": 32,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {"attention_multiplier": 0.4, "embedding_multiplier": 1.7, "residual_multiplier": 0.6},
    "smollm3": {"num_hidden_layers": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip


def family(folder, kind, **options):
    """Write a tiny random model of a type, with its tokenizer; return its logits."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(kind, **(sizes | heads | {"bos_token_id": 0, "initializer_range": 0.2} | options))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 0.5 if "norm" in name else 0, 0.3)
    model.save_pretrained(folder)
    make_tokenizer(bos=False).save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_architectures_compute_the_same_from_their_floats(kind, tmp_path):
    want = family(tmp_path / "m", kind, **FAMILIES[kind])
    llmq.dequantize(quantized(tmp_path / "m", tmp_path / "x.gguf", "F32"), tmp_path / "f", dtype="float32", warn=print)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rotations_that_transformers_cannot_say_are_refused(tmp_path):
    sizes = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    family(tmp_path / "m", "phi3", rope_parameters=LONG, **sizes)
    file = quantized(tmp_path / "m", tmp_path / "x.gguf", "F32")
    with pytest.raises(LlmqError, match=r"no rope_parameters of transformers turn as its keys say \(phi3\.rope\."):
        llmq.dequantize(str(file), tmp_path / "f")


def test_a_split_file_and_its_own_output_are_read(tiny_checkpoint, tmp_path):
    src = tiny_checkpoint()
    llmq.quantize(src, tmp_path / "s.gguf", type="F16", method="rtn", split_max_size="1M", warn=print)
    first = sorted(tmp_path.glob("s*.gguf"))[0]
    llmq.dequantize(str(first), tmp_path / "a")
    llmq.quantize(tmp_path / "a", tmp_path / "b.gguf", type="F16", method="rtn", warn=print)
    llmq.dequantize(str(tmp_path / "b.gguf"), tmp_path / "c")
    a, c = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert a.keys() == c.keys() and all(torch.equal(a[n], c[n]) for n in a)


def test_a_tokenizer_that_cannot_be_made_is_told_and_recorded(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    other = tmp_path / "y.gguf"
    rewrite_gguf([file], other, {"tokenizer.ggml.pre": "of the future"})
    warned = []
    record = llmq.dequantize(other, tmp_path / "out", warn=warned.append)
    assert "OUT has no tokenizer" in warned[-1] and "of the future" in warned[-1] and warned == record["warnings"]
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_not_known_is_refused_in_one_line(tiny_checkpoint, tmp_path):
    file = quantized(tiny_checkpoint(), tmp_path / "x.gguf", "Q8_0")
    other = tmp_path / "y.gguf"
    rewrite_gguf([file], other, {"general.architecture": "of the future"})
    (tmp_path / "z.gguf").write_bytes(file.read_bytes()[:-40])
    for path, said in (
        (other, "'of the future'"),
        (tmp_path / "z.gguf", "is truncated or damaged"),
        (tmp_path / "none.gguf", "is not a file"),
    ):
        done = CliRunner().invoke(cli.app, ["dequantize", str(path), str(tmp_path / "out")])
        assert isinstance(done.exception, LlmqError) and said in str(done.exception), done.exception
        assert "\n" not in str(done.exception) and not (tmp_path / "out").exists()
