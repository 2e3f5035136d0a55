"""`llmq quantize --format gptq,mlx,gguf:Q4_0`: one solve in several forms, with identical codes."""

import json

import pytest
import torch

import llmq
from llmq import api
from llmq.errors import notes
from llmq.export import _several as several
from llmq.formats.mlx import MLX
from llmq.gguf.reader import GgufFile
from llmq.grids._biased import as_integers
from llmq.pipeline.plan import prepare
from llmq.recipe import Recipe
from llmq.types import LlmqError
from llmq.verify import verify
from llmq.verify.ggml import open_gguf
from llmq.verify.report import Report

QUICK = {"method": "rtn", "group_size": 32, "device": "cpu", "dtype": "float32"}


def test_one_solve_is_written_in_each_with_the_same_codes(tiny_checkpoint, tmp_path):
    src, out = tiny_checkpoint(), tmp_path / "out"
    record = llmq.quantize(src, out, format="gptq,mlx,gguf:Q4_0", range="mse", warn=print, **QUICK)
    assert {p.name for p in out.iterdir()} == {"gptq", "mlx", "out.gguf"}
    assert record["also"] == [str(out / "mlx"), str(out / "out.gguf")] and record["recipe"]["format"] == "gptq"
    packed = llmq.load(out / "gptq", device="cpu", backend="reference")
    again = llmq.load(out / "mlx", device="cpu", backend="reference")
    seen, report = 0, Report()
    file, _ = open_gguf(out / "out.gguf", report)
    for name, module in packed.named_modules():
        if hasattr(module, "unpack"):
            q, other = module.unpack(), again.get_submodule(name).unpack()
            zero = as_integers(other.params, 4).zero
            assert torch.equal(q.codes, other.codes) and torch.equal(q.params.zero, zero)
            assert torch.equal(q.dequantize(), torch.as_tensor(file.read(f"{name}.weight", report)))
            seen += 1
    assert seen == 14 and not report.failures
    assert verify(out / "mlx", src).passed  # whose record is that of the solve
    assert json.loads((out / "mlx" / "quantization.json").read_text())["recipe"] == record["recipe"]
    assert "Q4_0" in {t.tensor_type.name for t in GgufFile(out / "out.gguf").tensors.values()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "gguf:Q4_0,mlx"}, "the solve is written in the first, which is to be a folder"),
        ({"format": "gptq,gptq_v2:desc_act=true,gptq"}, "names one format twice"),
        ({"format": "gptq,modelopt"}, "modelopt has no name for"),
        ({"format": "gptq,awq", "bits": 8}, "awq holds 4 bits, not 8"),
        ({"format": "compressed-tensors,mlx", "bits": 7}, "mlx holds 2, 3, 4, 5, 6 and 8 bits .*; say --bits 8, or"),
        ({"format": "gptq,gguf:Q4_0", "group_size": 16}, "cannot be kept in GGUF: group size 16"),
        ({"format": "gptq,float"}, "it holds no codes"),
        ({"format": "gptq,"}, "--format '' is no target"),
        ({"format": "gptq,onyx"}, "--format 'onyx' is no target"),
        ({"format": "gptq,mlx", "method": "gptq:desc_act=true"}, "no weights in activation order"),
    ],
)
def test_what_cannot_share_codes_is_refused_when_it_is_planned(tiny_checkpoint, tmp_path, options, said):
    with pytest.raises(LlmqError, match=said):
        llmq.quantize(tiny_checkpoint(), tmp_path / "out", **(QUICK | options))
    assert not (tmp_path / "out").exists()


def test_what_an_export_would_refuse_after_the_solve_is_refused_before(tiny_checkpoint, tmp_path, monkeypatch):
    src, out = tiny_checkpoint(), tmp_path / "out"
    monkeypatch.setattr("llmq.extras.find_spec", lambda _name: None)
    with pytest.raises(LlmqError, match=r"not installed: pip install 'llmq-quant\[executorch\]'"):
        llmq.quantize(src, out, format="compressed-tensors,executorch", **QUICK)
    assert not out.exists()
    (out / "mlx").mkdir(parents=True)
    (out / "mlx" / "notes.txt").write_text("mine")
    for overwrite, said in ((False, "mlx exists"), (True, "mlx is not a quantized checkpoint folder")):
        with pytest.raises(LlmqError, match=said):
            llmq.quantize(src, out, format="gptq,mlx", overwrite=overwrite, **QUICK)
    assert not (out / "gptq").exists()
    with pytest.raises(LlmqError, match=r"leave \.gguf out of its name"):
        llmq.quantize(src, tmp_path / "out.gguf", format="gptq,mlx", **QUICK)
    before = sorted(src.iterdir())
    with pytest.raises(LlmqError, match="is a checkpoint itself; name another folder"):
        llmq.quantize(tiny_checkpoint(), src, format="gptq,mlx", overwrite=True, **QUICK)
    assert sorted(src.iterdir()) == before


def test_what_ends_an_export_is_told_with_the_command_that_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    out, convert = tmp_path / "out", api.convert

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "convert", killed)
    with pytest.raises(KeyboardInterrupt) as found:
        llmq.quantize(tiny_checkpoint(), out, format="gptq,mlx", **QUICK)
    said = f"{out}/gptq is whole: `llmq export {out}/gptq {out}/mlx --to mlx` goes on"
    assert notes(found.value) == [said]
    convert(out / "gptq", out / "mlx", "mlx")
    assert verify(out / "mlx").passed


def test_a_target_without_negative_scales_has_the_grid_fitted_without(tiny_checkpoint, tmp_path):
    """As ExecuTorch's XNNPACK; a range that the user names in full stays, and is refused where it falls."""
    forms = ["compressed-tensors", "executorch"]
    assert several.risen({"bits": 4}, forms) == {"bits": 4, "range": "mse:shift=false"}
    assert several.risen({"range": "mse:norm=2"}, forms)["range"] == "mse:norm=2:shift=false"
    assert several.risen({"range": "minmax"}, forms) == {"range": "minmax"}
    assert several.risen({"range": "mse"}, ["gptq", "mlx"]) == {"range": "mse"}
    src = tiny_checkpoint(dtype=torch.bfloat16)
    options = QUICK | {"format": "compressed-tensors"}
    for range_, negative in (("mse", True), ("mse:shift=false", False)):
        llmq.quantize(src, out := tmp_path / f"out{negative}", range=range_, **options)
        model = llmq.load(out, device="cpu", backend="reference")
        scales = [m.unpack().params.scale for m in model.modules() if hasattr(m, "unpack")]
        assert any(bool((s < 0).any()) for s in scales) == negative
        recipe = Recipe(range=range_, **{k: v for k, v in options.items() if k != "device"})
        planned = prepare(str(src), recipe, "cpu")
        if negative:
            with pytest.raises(LlmqError, match="XNNPACK holds no negative scales.*shift=false"):
                several.foresee(planned, "executorch")
        else:
            assert "W4A8" in several.foresee(planned, "executorch")[0]


def test_commas_in_brackets_part_nothing():
    assert several.parted("gptq, gguf:Q4_0,onnx") == ["gptq", "gguf:Q4_0", "onnx"]
    assert several.parted("a:x=[b,c],d") == ["a:x=[b,c]", "d"] and several.parted(None) == [""]


def test_the_type_of_gguf_stands_in_its_format():
    recipe = Recipe(format="gguf:Q8_0:pre=llama-bpe")
    assert recipe.type == "Q8_0" and recipe.format == "gguf:pre=llama-bpe" and recipe.gguf
    assert Recipe(format="gguf:type=q4_0", type="Q4_0").type.upper() == "Q4_0"
    with pytest.raises(LlmqError, match="--format gguf:Q8_0 and --type Q4_0 disagree"):
        Recipe(format="gguf:Q8_0", type="Q4_0")


@pytest.mark.parametrize("options", [{"bits": 4, "sym": False}, {"weights": "mxfp4"}, {"bits": 6, "group_size": 64}])
def test_a_solve_is_written_as_mlx_at_once(tiny_checkpoint, tmp_path, options):
    src, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out"
    given = QUICK | options
    if "weights" in options:
        del given["group_size"]
    llmq.quantize(src, out, format="mlx", **given)
    report = verify(out, src)
    assert report.passed and report.checked["solved weights compared"] == 14, report.failures
    assert not any("not all readers" in note for note in report.notes)  # mlx-lm packs what has scales, not the head
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] and "quant_method" not in config["quantization"]
    assert config["rope_theta"] == 10000.0 and MLX.read(config["quantization"])
