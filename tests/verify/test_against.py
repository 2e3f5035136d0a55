"""Against the source: recorded transforms give the recorded errors and the stored floats again; nothing else does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.checkpoint.digest import digest, file_digest, sealed
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.verify import verify

FLOAT = Path(__file__).parents[1] / "golden" / "float"
INT4 = {"group_size": 32}


@pytest.fixture
def made(tmp_path, prose):
    """`made(recipe, adapter=None)`: OUT of the golden float model, or of that with an adapter."""
    (tmp_path / "text.txt").write_text(prose(800))

    def out(options, adapter=None, source=FLOAT):
        calibration = {"calib": str(tmp_path / "text.txt"), "samples": 3, "seq_len": 32}
        recipe = Recipe.load(None, options | (calibration if options["method"] != "rtn" else {}))
        where = tmp_path / ("out.gguf" if recipe.gguf else "out")
        quantize(prepare(str(source), recipe, adapter=adapter), where)
        return where

    return out


RECIPES = {
    "folds into norms and linears": INT4 | {"method": "awq,rtn", "format": "awq", "sym": False},
    "two folds, static activations": {
        "method": "smoothquant,migrate,rtn", "format": "compressed-tensors", "bits": 8, "act_bits": 8, "act": "tensor",
        "group_size": "channel",
    },
    "heads turned": INT4 | {"method": "rotate,gptq", "format": "gptq"},
    "the residual stream turned": INT4 | {"method": "rotate:residual=true,gptq", "format": "gptq"},
    "weights moved before rounding": INT4 | {"method": "qep,gptq", "format": "gptq"},
    "rounding tuned": INT4 | {"method": "rtn,signround:steps=3", "format": "gptq"},
    "scales and norms tuned": INT4 | {"method": "rtn,distill:epochs=1", "format": "gptq"},
    "a head of its own": INT4 | {"method": "rtn", "lm_head": True, "format": "compressed-tensors"},
    "mixed types": {"method": "rtn", "format": "gguf:pre=gpt-2", "type": "Q4_K_M"},
}  # fmt: skip


@pytest.mark.parametrize("what", RECIPES)
def test_the_recorded_errors_are_found_again(made, what):
    report = verify(made(RECIPES[what]), FLOAT)
    assert report.passed, report.failures
    packed = report.checked["packed linears"]
    assert (
        packed >= 14 and report.checked["errors measured again"] == report.checked["solved weights compared"] == packed
    )
    assert 0 < report.figures["weight_error"] < 0.1 and report.figures["kl"] < 0.5


def test_a_dequantized_one_is_measured_beside_the_float_one_and_judged_beside_what_it_was_decoded_from(made, tmp_path):
    packed = made(INT4 | {"method": "rtn", "format": "gptq"}).rename(tmp_path / "packed")
    llmq.dequantize(packed, tmp_path / "float", warn=str)
    error = verify(packed, FLOAT).figures["weight_error"]
    report = verify(tmp_path / "float", FLOAT)
    assert report.passed, report.failures
    assert report.figures["weight_error"] == pytest.approx(error, rel=0.02)  # rounded to 16 bits again
    assert any("14 float tensors are not the source's" in n and "quantized in between" in n for n in report.notes)
    assert verify(tmp_path / "float", packed).passed
    other = made(INT4 | {"method": "rtn", "format": "gptq", "bits": 8})
    assert "neither the source's" in verify(tmp_path / "float", other).failures[0]


def test_another_source_is_not_taken_for_it(made, tiny_checkpoint, tmp_path):
    out = made(INT4 | {"method": "rtn", "format": "gptq"})
    other = tmp_path / "other"
    other.mkdir()
    for file in FLOAT.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(FLOAT / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 0.5
    weights["model.norm.weight"][3] += 0.25
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    said = verify(out, other).failures
    assert len(said) == 2 and "model.layers.1.mlp.up_proj: weight_error is" in said[0]
    assert said[1].startswith("model.norm.weight is neither the source's nor")
    assert not verify(out, tiny_checkpoint()).passed  # of other shapes


def test_a_fold_that_is_not_recorded_is_found(made):
    """A norm's gain rewritten with all its checksums put right: only the source can tell."""
    out = made(INT4 | {"method": "awq,rtn", "format": "awq", "sym": False})
    name = "model.layers.0.input_layernorm.weight"
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name] * 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    record = json.loads((out / "quantization.json").read_text())
    record["tensors"][name] = digest(tensors[name])
    record["files"]["model.safetensors"] = file_digest(out / "model.safetensors")
    del record["sha256"]
    (out / "quantization.json").write_text(json.dumps(sealed(record), indent=2) + "\n")
    assert verify(out).passed
    assert [f for f in verify(out, FLOAT).failures if f.startswith(f"{name} is neither")]


@pytest.mark.parametrize("error", ["y", [1], True, float("nan")])
def test_a_recorded_error_that_is_no_number_is_told(made, error):
    out, name = made(INT4 | {"method": "rtn", "format": "gptq"}), "model.layers.0.mlp.up_proj"
    record = json.loads((out / "quantization.json").read_text())
    record["linears"][name]["weight_error"] = error
    del record["sha256"]
    (out / "quantization.json").write_text(json.dumps(sealed(record), indent=2) + "\n")
    (said,) = verify(out, FLOAT).failures
    assert said.startswith(f"{name}: the recorded weight_error is {error!r}, which is no number")


def test_an_adapter_is_added_again(made, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft (pip install -e '.[test]')")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(FLOAT)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    out = made(INT4 | {"method": "rtn", "format": "gptq"}, adapter=tmp_path / "adapter")
    assert verify(out, FLOAT, tmp_path / "adapter").passed
    assert "give it with --adapter" in verify(out, FLOAT).failures[0]


def test_an_export_is_held_against_what_was_exported(made, tmp_path):
    from llmq.export._run import export

    packed = made(INT4 | {"method": "rtn", "format": "gptq"})
    export(str(packed), tmp_path / "out.gguf", pre="gpt-2")
    report = verify(tmp_path / "out.gguf", packed)
    assert report.passed, report.failures
    assert report.figures["worst_weight_error"] == 0 and report.figures["kl"] < 1e-6


@pytest.mark.parametrize(("key", "value"), [("tuned", 5), ("tuned", [[1]]), ("tensors", [1])])
def test_a_record_of_another_form_is_told(made, key, value):
    out = made(INT4 | {"method": "rtn", "format": "gptq"})
    record = json.loads((out / "quantization.json").read_text()) | {key: value}
    del record["sha256"]
    (out / "quantization.json").write_text(json.dumps(sealed(record), indent=2) + "\n")
    assert any(f"quantization.json: {key} is no" in said for said in verify(out, FLOAT).failures)
