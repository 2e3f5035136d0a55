"""Quantizing what is quantized already: the same codes as from the decoded floats, and never in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import _narrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Mxfp4Config,
    PixtralVisionConfig,
)
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.checkpoint import Source
from llmq.checkpoint.decoding import as_floats
from llmq.errors import LlmqError
from llmq.evaluation.scores import evaluate
from llmq.evaluation.windows import find_convention
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
RTN = {"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu"}
GPTQ = RTN | {"method": "gptq", "samples": 4, "seq_len": 64}


def written_out(folder: Path, out: Path) -> Path:
    """Write the float checkpoint that a quantized one stands for, by hand."""
    source = Source(folder)
    as_floats(source)
    shutil.copytree(folder, out)
    save_file({n: source.get(n) for n in source.names()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(source.config))
    return out


@pytest.fixture
def fp8(tiny_checkpoint) -> Path:
    folder = tiny_checkpoint(dtype=torch.bfloat16)
    _narrow.rewrite(folder, "fp8-block")
    return folder


def test_fp8_gives_the_codes_of_its_floats_and_the_record_says_so(fp8, tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose(1000))
    floats, warned = written_out(fp8, tmp_path / "floats"), []
    options = GPTQ | {"calib": str(tmp_path / "t.txt")}
    llmq.quantize(floats, tmp_path / "a", **options)
    record = llmq.quantize(fp8, tmp_path / "b", warn=warned.append, **options)
    want, got = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)
    kinds = {"FP8, blocks of 48 x 40": 14}
    said = {"quant_method": "fp8", "dtype": "bfloat16", "weights": kinds, "scales_left_out": 0}
    assert record["decoded"] == said and json.loads((tmp_path / "b" / "quantization.json").read_text()) == record
    assert warned[0] in record["warnings"] and "14 weights as FP8, blocks of 48 x 40" in warned[0]
    assert record["size"]["float_bytes"] == sum(Source(floats).sizes().values())
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def test_what_was_made_of_it_is_verified_against_it_and_measured_beside_it(fp8, tmp_path, prose):
    llmq.quantize(fp8, tmp_path / "out", warn=print, **RTN)
    report = verify(tmp_path / "out", against=fp8)
    assert report.passed and report.checked["errors measured again"] == 14, report.failures
    model, truth = llmq.load(tmp_path / "out", device="cpu"), llmq.load(fp8, device="cpu")
    found = evaluate(model, llmq.load_tokenizer(fp8), prose(200), find_convention("gptq", 64), truth, 1)
    assert 0 < found.kl_mean < 1


def test_it_loads_as_the_float_model_that_it_stands_for(fp8, tmp_path):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want = llmq.load(written_out(fp8, tmp_path / "floats"), device="cpu")(ids).logits
        model = llmq.load(fp8, device="cpu")
        assert torch.equal(model(ids).logits, want)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 1


def test_transformers_own_decoding_gives_the_same_logits(tiny_checkpoint, monkeypatch, tmp_path):
    """Of even blocks of FP8, all that its own decoder takes, and of gpt-oss's experts: bit for bit."""
    ids, folder = torch.arange(12)[None], tiny_checkpoint(dtype=torch.bfloat16)
    monkeypatch.setattr(_narrow, "BLOCK", (32, 32))
    _narrow.rewrite(folder, "fp8-block")
    fp8 = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32))
    for place, how in ((folder, fp8), (tiny_gpt_oss(tmp_path / "oss"), Mxfp4Config(dequantize=True))):
        model = AutoModelForCausalLM.from_pretrained(place, quantization_config=how, dtype="auto")
        with torch.no_grad():
            assert torch.equal(llmq.load(place, device="cpu")(ids).logits, model(ids).logits)


def tiny_gpt_oss(folder: Path) -> Path:
    """Write a gpt-oss of 4 experts a block, whose matrices are MXFP4."""
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        W_EKN = stored.pop(name)
        stored |= {f"{name}{end}": t for end, t in _narrow.gpt_oss(W_EKN.transpose(1, 2).contiguous())}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": _narrow.config("gpt-oss")}))
    return folder


def test_a_wrapper_in_fp8_is_quantized_verified_and_dequantized_by_its_own_names(tmp_path, tokenizer_bos):
    """Mistral 3 as it ships: one scale a matrix, static scales of activations, a vision tower in bfloat16."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = MistralConfig(vocab_size=320, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, **sizes)
    vision = PixtralVisionConfig(**sizes, image_size=28, patch_size=14)
    config, src = Mistral3Config(text_config=text, vision_config=vision, image_token_index=10), tmp_path / "src"
    Mistral3ForConditionalGeneration(config).bfloat16().save_pretrained(src)
    tokenizer_bos.save_pretrained(src)
    _narrow.rewrite(src, "fp8-tensor", start="language_model.")
    record = llmq.quantize(src, tmp_path / "out", warn=print, format="compressed-tensors", **RTN)
    assert record["decoded"]["weights"] == {"FP8, one scale": 14} and record["decoded"]["scales_left_out"] == 14
    assert (report := verify(tmp_path / "out", against=src)).passed, report.failures
    llmq.dequantize(src, tmp_path / "floats", warn=print)
    ids, model = torch.arange(12, 24)[None], AutoModelForImageTextToText.from_pretrained(tmp_path / "floats")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llmq.load(src, device="cpu")(ids).logits)


def test_gguf_takes_it_too(fp8, tmp_path):
    llmq.quantize(written_out(fp8, tmp_path / "floats"), tmp_path / "a.gguf", type="Q8_0", method="rtn", warn=print)
    llmq.quantize(fp8, tmp_path / "b.gguf", type="Q8_0", method="rtn", warn=print)
    assert verify(tmp_path / "b.gguf", against=tmp_path / "floats").passed
    assert verify(tmp_path / "b.gguf", against=fp8).passed


@pytest.mark.parametrize("name", ["gptq_v1_w4g32_sym", "awq_w4g32"])
def test_integers_are_rounded_again_with_a_warning(name, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(GOLDEN / "float", src)
    shutil.copytree(GOLDEN / name, src, dirs_exist_ok=True)
    done = CliRunner().invoke(
        cli.app, ["quantize", str(src), str(tmp_path / "out"), "--method", "rtn", "--group-size", "32", "--bits", "8"]
    )
    assert done.exit_code == 0, done.exception
    assert "rounding what was rounded" in " ".join(done.output.split())
    report = verify(tmp_path / "out", against=src)
    assert report.passed, report.failures


def test_the_configs_of_its_own_format_are_not_copied(fp8, tmp_path):
    for name in ("hf_quant_config.json", "quant_config.json", "quantize_config.json"):
        (fp8 / name).write_text("{}")
    llmq.quantize(fp8, tmp_path / "out", format="compressed-tensors", warn=print, **RTN)
    assert not [p for p in (tmp_path / "out").iterdir() if "quant" in p.name and p.name != "quantization.json"]


def test_a_scale_that_is_damaged_is_refused_before_any_work(fp8, tmp_path):
    file = fp8 / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(LlmqError, match=r"up_proj\.weight_scale_inv: the scale at \[0, 0\] is nan"):
        llmq.quantize(fp8, tmp_path / "out", warn=print, **RTN)
    assert not (tmp_path / "out").exists()
