"""A quantized checkpoint as a float one: plain transformers computes from it what llmq computes from the packed one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import _narrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.checkpoint import Source
from llmq.checkpoint.digest import digest, holds
from llmq.errors import LlmqError
from llmq.export import float as floats
from llmq.runtime.linear import QuantLinear
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = torch.arange(3, 35)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.fixture
def packed(tmp_path):
    """`packed(name)`: a golden checkpoint with its tokenizer."""

    def make(name: str) -> Path:
        shutil.copytree(GOLDEN / "float", tmp_path / name)
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name, dirs_exist_ok=True))

    return make


@pytest.mark.parametrize("name", ["gptq_v1_w4g32_desc_act", "awq_w4g32", "ct_mixed", "auto_round_w4g32_asym"])
def test_transformers_computes_what_the_packed_weights_do(name, packed, tmp_path):
    src, out = packed(name), tmp_path / "out"
    llmq.dequantize(src, out, dtype="float32", warn=print)
    want = logits(llmq.load(src, dtype=torch.float32, device="cpu", backend="reference"))
    got = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_modelopts_files_load_packed_and_are_decoded_to_the_same_weights(tiny_checkpoint, tmp_path):
    """Two ways to the weights: llmq/formats/modelopt.py, and checkpoint/decoding.py, which shares nothing with it."""
    options = {"method": "rtn", "format": "modelopt", "weights": "nvfp4"}
    llmq.quantize(tiny_checkpoint(), tmp_path / "packed", **options)
    said = json.loads((tmp_path / "packed" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "W4A16_NVFP4" and "lm_head" in said["exclude_modules"]
    llmq.dequantize(tmp_path / "packed", tmp_path / "floats", dtype="float32", warn=print)
    packed = llmq.load(tmp_path / "packed", device="cpu", dtype=torch.float32, backend="reference")
    want = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32))
    assert any(isinstance(m, QuantLinear) for m in packed.modules())
    torch.testing.assert_close(logits(packed), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp8-block", "ct-nvfp4"])
def test_narrow_floats_are_written_bit_for_bit_with_a_record_that_seals_them(kind, tiny_checkpoint, tmp_path):
    src, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    _narrow.rewrite(src, kind)
    before, steps, warned = load_file(src / "model.safetensors"), [], []
    record = llmq.dequantize(src, out, warn=warned.append, progress=lambda *step: steps.append(step))
    config, written = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert all(t.dtype == torch.bfloat16 for t in written.values())
    kept = [n for n in written if "_proj" not in n]
    assert len(kept) == 7 and all(torch.equal(written[n], before[n]) for n in kept)
    with torch.no_grad():
        want = llmq.load(src, device="cpu", backend="reference")(IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype="auto")(IDS).logits, want)
    assert AutoTokenizer.from_pretrained(out)("the city").input_ids == llmq.load_tokenizer(src)("the city").input_ids
    assert json.loads((out / "dequantization.json").read_text()) == record and holds(record)
    assert record["tensors"] == {n: digest(t) for n, t in written.items()} and steps[-1][:2] == (21, 21)
    assert record["files"].keys() == {p.name for p in out.iterdir()} - {"dequantization.json"}
    assert record["decoded"] == Source(src).decoded or sum(record["decoded"]["weights"].values()) == 14
    assert warned == record["warnings"] and "14 weights as" in warned[0]


def test_experts_and_what_no_model_is_made_of_are_written_by_their_names(tmp_path):
    W, fused = torch.randn(3, 64, 64), {}
    for name in ("gate_up_proj", "down_proj"):
        fused |= {f"model.layers.0.mlp.experts.{name}{end}": t for end, t in _narrow.gpt_oss(W)}
    fused |= {"mtp.router.weight": torch.randn(3, 64), "visual.bias": torch.zeros(3).half()}
    (tmp_path / "m").mkdir()
    save_file(fused, tmp_path / "m" / "model.safetensors")
    config = {"model_type": "of the future", "quantization_config": {"quant_method": "mxfp4"}, "torch_dtype": "float32"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"text_config": {"dtype": "float32"}}))
    llmq.dequantize(str(tmp_path / "m"), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.dtype, list(t.shape)) for n, t in written.items()} == {
        "model.layers.0.mlp.experts.gate_up_proj": (torch.bfloat16, [3, 64, 64]),
        "model.layers.0.mlp.experts.down_proj": (torch.bfloat16, [3, 64, 64]),
        "mtp.router.weight": (torch.float32, [3, 64]),
        "visual.bias": (torch.float16, [3]),
    }
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said == {"model_type": "of the future", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}


def test_many_parts_and_shards_are_one_checkpoint(tiny_checkpoint, tmp_path, monkeypatch):
    src = tiny_checkpoint(dtype=torch.bfloat16)
    _narrow.rewrite(src, "fp8-block")
    llmq.dequantize(str(src), tmp_path / "a")
    monkeypatch.setattr(floats, "_PART", 20_000)
    monkeypatch.setattr(floats.Sink, "join", lambda sink, join=floats.Sink.join: join(sink, 50_000))
    llmq.dequantize(str(src), tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    one, many = Source(tmp_path / "a"), Source(tmp_path / "b")
    assert set(one.names()) == set(many.names())
    assert all(torch.equal(one.get(n), many.get(n)) for n in one.names())


def test_out_is_replaced_only_if_llmq_made_it(tiny_checkpoint, packed, tmp_path):
    src, out = packed("awq_w4g32"), tmp_path / "out"
    llmq.dequantize(str(src), out)
    with pytest.raises(LlmqError, match="exists"):
        llmq.dequantize(str(src), out)
    llmq.dequantize(str(src), out, overwrite=True, dtype="float16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(LlmqError, match="not overwritten"):
        llmq.dequantize(str(src), tiny_checkpoint(), overwrite=True)


def test_what_is_wrong_with_what_was_written_is_found(packed, tmp_path, monkeypatch):
    src, copy = packed("awq_w4g32"), floats.Sink.copy_files

    def damaged(sink, source):
        copy(sink, source)
        (part,) = sink.room.glob("part-*")
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)

    monkeypatch.setattr(floats.Sink, "copy_files", damaged)
    with pytest.raises(LlmqError, match=r"not right: tensor .* differs"):
        llmq.dequantize(str(src), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused_before_any_work(tiny_checkpoint, packed, tmp_path):
    for src, options, said in (
        (tiny_checkpoint(), {}, "is a float checkpoint already"),
        (packed("awq_w4g32"), {"dtype": "int8"}, "--dtype 'int8' is not one of bfloat16, float16, float32"),
    ):
        done = CliRunner().invoke(
            cli.app, ["dequantize", str(src), str(tmp_path / "out"), *(f"--{k}={v}" for k, v in options.items())]
        )
        with pytest.raises(LlmqError, match=re.escape(said)) as e:
            llmq.dequantize(src, tmp_path / "out", **options)
        assert str(done.exception) == str(e.value) and not (tmp_path / "out").exists()


def test_values_beyond_the_dtype_are_refused_by_name(tiny_checkpoint, tmp_path):
    src = tiny_checkpoint(dtype=torch.bfloat16)
    _narrow.rewrite(src, "fbgemm")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][:] = 1000
    save_file(tensors, src / "model.safetensors")
    with pytest.raises(LlmqError, match=r"up_proj\.weight holds NaN or Inf in float16.*--dtype bfloat16"):
        llmq.dequantize(str(src), tmp_path / "out", dtype="float16")
    assert llmq.dequantize(str(src), tmp_path / "out")["bytes"] > 0


def test_the_command_line_says_what_it_wrote(packed, tmp_path):
    done = CliRunner().invoke(cli.app, ["dequantize", str(packed("gptq_v1_w4g32_sym")), str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    said = " ".join(done.output.split())
    assert "14 weights, integers of 4 bits (gptq)" in said and "decoded to bfloat16" in said


def test_verify_finds_what_has_changed_since_and_that_it_is_the_sources(tiny_checkpoint, tmp_path):
    src, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    _narrow.rewrite(src, "ct-fp8-channel")
    llmq.dequantize(str(src), out, dtype="float16")
    report = verify(out, against=src)
    assert report.passed and report.checked["tensors"] == 21, report.failures
    assert report.checked["floats compared with the source"] == 21
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    said = " ".join(verify(out, against=src).failures)
    assert "up_proj.weight is not as it was solved" in said and "up_proj.weight is neither the source's" in said
