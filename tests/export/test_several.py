"""`llmq quantize --format gptq,mlx,gguf:Q4_0`: one solve in several forms, with identical codes."""

import json
import shutil

import pytest
import torch

import llmq
from llmq.errors import notes
from llmq.export import _several as several
from llmq.export._as_format import AsFormat
from llmq.export._outputs import Outputs
from llmq.export.gguf import Gguf
from llmq.formats.mlx import MLX
from llmq.gguf.reader import GgufFile
from llmq.grids._biased import as_integers
from llmq.pipeline import run as pipeline
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


def test_a_home_folder_is_where_the_user_has_it(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    record = llmq.quantize(tiny_checkpoint(), "~/two", format="gptq,mlx", **QUICK)
    assert record["also"] == [str(tmp_path / "home/two/mlx")]
    assert not (tmp_path / "~").exists()


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


def files(out):
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_run_that_was_ended_goes_on_with_the_rest_to_the_same_bytes(tiny_checkpoint, tmp_path, monkeypatch):
    """Ended while it solves, exports, has exported, and in the check of what was exported, which leaves a stage."""
    src, out = tiny_checkpoint(), tmp_path / "out"
    three = QUICK | {"format": "gptq,mlx,gguf:Q4_0", "range": "mse"}
    llmq.quantize(src, out, warn=print, **three)
    want = files(out)
    shutil.rmtree(out)

    def ended(*_args, **_options):
        raise KeyboardInterrupt

    for owner, name, there in (
        (pipeline, "quantize", set()),
        (AsFormat, "verify", {"gptq", "mlx.llmq-partial"}),
        (AsFormat, "write", {"gptq"}),
        (Gguf, "write", {"gptq", "mlx"}),
        (Outputs, "done", {"gptq", "mlx"}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, ended)
            with pytest.raises(KeyboardInterrupt) as found:
                llmq.quantize(src, out, warn=print, **three)
        assert {p.name for p in out.glob("[!.]*")} == there and (out / ".llmq-outputs.json").exists() == bool(there)
        if there:
            assert name == "done" or "goes on with the rest" in notes(found.value)[-1]
    with pytest.raises(LlmqError, match=r"unfinished, of another command \(range 'mse', not 'minmax'\); move it"):
        llmq.quantize(src, out, **three | {"range": "minmax"})
    monkeypatch.setattr(pipeline, "quantize", ended)  # the solve is not done again
    record = llmq.quantize(src, out, warn=print, **three)
    assert files(out) == want and record["recipe"]["format"] == "gptq"
    assert record["also"] == [str(out / "mlx"), str(out / "out.gguf")]
    with pytest.raises(LlmqError, match="exists; give another"):
        llmq.quantize(src, out, **three)


def test_a_target_without_negative_scales_has_the_grid_fitted_without(tiny_checkpoint, tmp_path):
    """As ExecuTorch's XNNPACK; a range that the user names in full stays, and is refused where it falls."""
    forms = ["compressed-tensors", "executorch"]
    scaled = {"format": "compressed-tensors:scales=bfloat16"}
    assert several.risen({"bits": 4}, forms) == {"bits": 4, "range": "mse:shift=false"} | scaled
    assert several.risen({"range": "mse:norm=2"}, forms)["range"] == "mse:norm=2:shift=false"
    assert several.risen({"range": "minmax"}, forms) == {"range": "minmax"} | scaled
    assert several.risen({"range": "mse"}, ["gptq", "mlx"]) == {"range": "mse", "format": "gptq"}
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


def test_a_runtime_that_reads_exports_has_the_solve_made_for_it(tiny_checkpoint, tmp_path, monkeypatch):
    src, said = tiny_checkpoint(), []
    given = QUICK | {"bits": 4, "range": "mse"}
    record = llmq.quantize(src, tmp_path / "q", runtime="executorch", warn=said.append, **given)
    assert record["recipe"]["format"] == "compressed-tensors:scales=bfloat16"
    assert (
        f"with --range mse:shift=false, --format compressed-tensors:scales=bfloat16; `llmq export {tmp_path}/q "
        in said[0]
    )
    model = llmq.load(tmp_path / "q", device="cpu", backend="reference")
    params = [m.unpack().params.scale for m in model.modules() if hasattr(m, "unpack")]
    assert len(params) == 14 and all(s.dtype == torch.bfloat16 and bool((s > 0).all()) for s in params)
    ahead = llmq.plan(src, runtime="tensorrt", seconds=0.1, **given)
    assert any("--range mse:shift=false; `llmq export OUT OUT-onnx --to onnx:qdq`" in w for w in ahead.warnings)
    ahead = llmq.plan(src, runtime="ort", seconds=0.1, **given)
    assert any("`llmq export OUT OUT-onnx --to onnx` makes what it reads" in w for w in ahead.warnings)
    for options, name, why in (
        ({"bits": 8}, "executorch", "computes with symmetric integers of 4 bits"),
        ({"format": "gptq"}, "mlx", f"`llmq export {tmp_path}/o {tmp_path}/o-mlx --to mlx` keeps"),
    ):
        with pytest.raises(LlmqError, match=why):
            llmq.quantize(src, tmp_path / "o", runtime=name, **given | options)
    assert not (tmp_path / "o").exists()


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
