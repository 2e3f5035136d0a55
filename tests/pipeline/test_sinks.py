"""Commands and their OUT: what is refused before any work, and finished work that is never done twice."""

import dataclasses
import json

import pytest

from llmq.checkpoint import Sink, disk
from llmq.cli import app
from llmq.export._run import export
from llmq.gguf.sink import GgufSink
from llmq.pipeline import run as module
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.pipeline.sinks import refuse, sink_of
from llmq.recipe import Recipe
from llmq.types import LlmqError

RTN = {"method": "rtn", "group_size": 32}
GGUF = {"format": "gguf", "method": "rtn", "type": "Q8_0"}


def fails(*_):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("options", [RTN, GGUF], ids=["folder", "gguf"])
def test_a_finished_result_that_could_not_be_put_in_place_is_not_made_again(
    tiny_checkpoint, tmp_path, monkeypatch, options
):
    folder, out = tiny_checkpoint(), tmp_path / ("out.gguf" if "type" in options else "out")
    made = quantize(prepare(str(folder), Recipe(**options), "cpu"), out)
    before = (out if out.is_file() else out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(GgufSink if "type" in options else Sink, "put", fails)
        with pytest.raises(LlmqError, match="Input/output error.*the finished result stays in .*the same command"):
            quantize(prepare(str(folder), Recipe(**options), "cpu"), out, overwrite=True)
    (stage,) = tmp_path.glob("*.llmq-partial")

    def never(*_):
        raise AssertionError("the work is done twice")

    with monkeypatch.context() as patch:
        patch.setattr(module, "quantize_block", never)
        assert quantize(prepare(str(folder), Recipe(**options), "cpu"), out, overwrite=True) == made
    assert (out if out.is_file() else out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [out.name] and not stage.exists()


def test_an_export_that_could_not_be_put_in_place_is_not_made_again(tiny_checkpoint, tmp_path, monkeypatch):
    quantize(prepare(str(tiny_checkpoint()), Recipe(**RTN), "cpu"), tmp_path / "int4")
    with monkeypatch.context() as patch:
        patch.setattr(GgufSink, "put", fails)
        with pytest.raises(LlmqError, match="Input/output error.*the finished result stays in"):
            export(str(tmp_path / "int4"), tmp_path / "out.gguf")
    with pytest.raises(LlmqError, match=r"whole, of another command \(to 'gguf', not 'gguf:embeddings=Q8_0'\)"):
        export(str(tmp_path / "int4"), tmp_path / "out.gguf", embeddings="Q8_0")
    done = export(str(tmp_path / "int4"), tmp_path / "out.gguf")
    assert done["files"] == [str(tmp_path / "out.gguf")] and done["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int4", "out.gguf"]


def test_the_same_command_is_known_by_recipe_source_and_files(tiny_checkpoint, tmp_path, prose):
    folder, text = tiny_checkpoint(), tmp_path / "text.txt"
    text.write_text(prose(50))
    plan = prepare(str(folder), Recipe(method="gptq", group_size=32, calib=str(text)), "cpu")

    def run(plan):
        return sink_of(plan, tmp_path / "out", overwrite=False)._run

    first = run(plan)
    assert run(prepare(str(folder), Recipe(method="gptq", group_size=32, calib=str(text)), "cpu")) == first
    text.write_text(prose(500))
    assert run(plan) != first
    text.unlink()
    other = dataclasses.replace(plan.method.recipe, bits=3)
    assert run(prepare(str(folder), other, "cpu"))["bits"] == 3
    before = run(plan)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert run(plan) != before


def test_out_is_refused_before_src_is_read(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    for src in (str(folder), "no-such-org/nothing"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(LlmqError, match="is a file; name a folder"):
            refuse(Recipe(**RTN), src, None, tmp_path / "file", overwrite=True)
    with pytest.raises(LlmqError, match="is SRC itself"):
        refuse(Recipe(**RTN), str(folder), None, folder, overwrite=True)
    with pytest.raises(LlmqError, match="holds --adapter"):
        (tmp_path / "a/adapter").mkdir(parents=True)
        refuse(Recipe(**RTN), str(folder), str(tmp_path / "a/adapter"), tmp_path / "a", overwrite=True)
    with pytest.raises(LlmqError, match="--imatrix-out .*exists"):
        wanted = Recipe(**GGUF, imatrix_out=str(tmp_path / "file"))
        refuse(wanted, "org/name", None, tmp_path / "o.gguf", overwrite=False)


def command(*arguments):
    app([str(a) for a in arguments], standalone_mode=False)


def test_figures_go_where_they_can_and_never_over_others(tiny_checkpoint, tmp_path, prose, monkeypatch):
    folder, text, figures = tiny_checkpoint(), tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text(prose(400))
    options = ["eval", folder, "--text", text, "--window", 32, "--windows", 1, "--json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    command(*options, "~/figures.json")
    first = figures.read_text()
    assert "perplexity" in first
    with monkeypatch.context() as patch:
        patch.setattr("llmq.api.evaluate", fails)  # nothing is measured before
        with pytest.raises(LlmqError, match="--json .*exists; give another name or --overwrite"):
            command(*options, figures)
        with pytest.raises(LlmqError, match="--json .*no folder that exists"):
            command(*options, tmp_path / "no/such.json")
    figures.write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", fails)
        with pytest.raises(LlmqError, match="cannot write .*figures.json"):
            command(*options, figures, "--overwrite")
    assert figures.read_text() == "{}" and sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "text.txt"]
    command(*options, figures, "--overwrite")
    assert json.loads(figures.read_text()).keys() == json.loads(first).keys()
