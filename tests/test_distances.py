"""The distance of two checkpoints: what packing recorded, whatever the format, worst first, one matrix at a time."""

import json

import pytest
from typer.testing import CliRunner

import llmq
from llmq.cli import app
from llmq.distances import distances
from llmq.types import LlmqError

QUICK = {"group_size": 32, "device": "cpu", "verify": False, "warn": str}


def recorded(out):
    lines = json.loads((out / "quantization.json").read_text())["linears"]
    return {f"{name}.weight": line["weight_error"] for name, line in lines.items()}


@pytest.mark.parametrize("method", ["rtn", "rotate,rtn", "awq,rtn"])
def test_errors_are_those_that_the_run_recorded(method, tiny_checkpoint, tmp_path, prose):
    """Rotations and scalings are repeated on the baseline, so that rounding alone is left."""
    src, out = tiny_checkpoint(), tmp_path / "out"
    (tmp_path / "t.txt").write_text(prose(400))
    calib = {} if method.endswith("e,rtn") else {"calib": tmp_path / "t.txt", "samples": 2, "seq_len": 32}
    llmq.quantize(src, out, method=method, **calib, **QUICK)
    found = distances(str(out), str(src))
    errors = {d.name: d.error for d in found.found}
    for name, error in recorded(out).items():
        assert errors[name] == pytest.approx(error, rel=1e-5)
    assert found.as_recorded == (method != "rtn") and not found.only_a and not found.only_b
    first, *rest = found.worst()
    assert all(first.error >= d.error for d in rest) and first.decibels < 30 and first.largest > 0
    assert {d.name: d for d in found.found}["model.embed_tokens.weight"].error < 1e-5


def test_of_two_formats_and_of_gguf(tiny_checkpoint, tmp_path):
    src = tiny_checkpoint(hidden_size=256, intermediate_size=256)
    for out, options in ((tmp_path / "a", {"format": "gptq"}), (tmp_path / "b", {"format": "awq"})):
        llmq.quantize(src, out, method="rtn", sym=options["format"] == "gptq", format=options["format"], **QUICK)
    llmq.quantize(src, tmp_path / "c.gguf", type="Q8_0", quality="fast", device="cpu", warn=str, verify=False)
    between = distances(str(tmp_path / "a"), str(tmp_path / "b"))
    of_a, of_b = (distances(str(tmp_path / n), str(src)) for n in "ab")
    name = "model.layers.0.mlp.up_proj.weight"
    a, b, both = ({d.name: d for d in f.found}[name].error for f in (of_a, of_b, between))
    assert abs(a**0.5 - b**0.5) <= both**0.5 <= a**0.5 + b**0.5 + 1e-3  # the triangle inequality
    gguf = distances(str(tmp_path / "c.gguf"), str(src))
    assert {d.name for d in gguf.found} == {d.name for d in of_a.found}
    assert max(d.error for d in gguf.found) < 1e-3 < min(d.error for d in of_a.found if "layers" in d.name)
    assert [d.error for d in distances(str(src), str(src)).found] == [0.0] * len(of_a.found)


def test_the_command(tiny_checkpoint, tmp_path):
    src, out, file = tiny_checkpoint(), tmp_path / "out", tmp_path / "d.json"
    other = tiny_checkpoint(num_hidden_layers=1)
    llmq.quantize(src, out, method="rtn", **QUICK)
    said = CliRunner().invoke(
        app, ["inspect", str(out), "--baseline", str(src), "--json", str(file)], env={"COLUMNS": "200"}
    )
    assert said.exit_code == 0 and "mlp.down_proj" in said.output
    found = json.loads(file.read_text())["found"]
    assert len(found) == 2 * 7 + 2 and found[0].keys() == {"name", "shape", "error", "largest", "decibels"}
    said = CliRunner().invoke(app, ["inspect", str(out), "--baseline", str(other), "--linears"], env={"COLUMNS": "200"})
    assert "model.layers.1.mlp" in said.output.split("alone:")[1]
    with pytest.raises(LlmqError, match="give --baseline"):
        CliRunner().invoke(app, ["inspect", str(out), "--json", str(file)], catch_exceptions=False)
    with pytest.raises(LlmqError, match="no matrix of the same name"):
        CliRunner().invoke(app, ["inspect", str(out), "--baseline", str(_gpt_neox(tmp_path))], catch_exceptions=False)


def _gpt_neox(tmp_path):
    from _families import FAMILIES

    FAMILIES["gpt_neox"].save(tmp_path / "other")
    return tmp_path / "other"
