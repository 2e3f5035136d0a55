"""`llmq compare`: rows as quantize and eval give them, shared solves, the front, what is beyond, and going on."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

import llmq
from llmq import api
from llmq.cli import app
from llmq.commands import compare as command
from llmq.comparing import _run, results
from llmq.comparing.results import Comparison, Row, advice, mark
from llmq.types import LlmqError

EVAL = {"window": 48, "windows": 4, "device": "cpu"}


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose(800))
    return tmp_path / "t.txt"


def test_four_schemes_one_solve_shared_and_going_on(tiny_checkpoint, tmp_path, text, monkeypatch):
    src, keep = tiny_checkpoint(hidden_size=256, intermediate_size=256), tmp_path / "keep"
    schemes = {
        "a": {"method": "rtn", "group_size": 32},
        "b": {"method": "rtn", "group_size": 32, "format": "compressed-tensors"},
        "c": {"format": "gguf", "type": "Q8_0", "quality": "fast"},
        "d": {"scheme": "w8a8", "method": "rtn"},
    }
    made, quantize, options = [], api.quantize, {"text": text, "keep": keep, "warn": str, **EVAL}
    monkeypatch.setattr(api, "quantize", lambda src, out, **o: made.append(out.name) or quantize(src, out, **o))
    monkeypatch.setattr("llmq.comparing._run.tokens_per_second", lambda out, device: 7.0)
    monkeypatch.setattr("llmq.comparing.results.mark", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # all is done but the end
        llmq.compare(src, schemes, budget="1GB", on="T4", **options)
    assert made == ["a", "c.gguf", "d"]
    monkeypatch.undo()
    monkeypatch.setattr(api, "quantize", lambda *_, **__: 1 / 0)
    monkeypatch.setattr("llmq.evaluation.scores.Predictor.each", lambda *_: 1 / 0)
    found = llmq.compare(src, schemes, budget="1GB", on="T4", **options)  # neither quantized nor scored again
    rows = {r.name: r for r in found.rows}
    assert list(rows) == ["a", "b", "c", "d"] and rows["b"].shares == "a" and rows["a"].kl == rows["b"].kl
    assert rows["a"].speed == rows["c"].speed == 7.0
    assert rows["d"].runs is False and "Turing does not multiply int" in rows["d"].note and rows["a"].runs
    assert "vLLM" in rows["d"].readers and "llama.cpp" in rows["c"].readers
    monkeypatch.undo()
    alone = llmq.evaluate(keep / "a", baseline=src, text=text, **EVAL).to_json()
    assert rows["a"].evaluation | {"seconds": 0} == alone | {"seconds": 0}
    assert rows["a"].bytes == json.loads((keep / "a/quantization.json").read_text())["size"]["bytes"]
    console = Console(width=100, record=True, file=(tmp_path / "shown").open("w"))
    console.print(command.table(found))
    shown = console.export_text()
    assert "* " in shown and f"{rows['c'].kl:.4f} ±" in shown
    said = " | ".join(command.lines(found, "T4"))
    assert "b has the codes of a" in said and "d does not run on T4" in said and "closest to the float model" in said
    with pytest.raises(LlmqError, match="holds a comparison of another model"):
        llmq.compare(tiny_checkpoint(seed=3), schemes, **options)


def test_what_quantize_refuses_is_refused_before_any_work(tiny_checkpoint, tmp_path, text):
    src, options = tiny_checkpoint(), {"text": text, "keep": tmp_path / "keep", **EVAL}
    with pytest.raises(LlmqError, match="group size 128 does not divide K = 64") as refused:
        llmq.compare(src, "q8_0,w4a16", **options)
    with pytest.raises(LlmqError) as of_quantize:
        llmq.plan(src, scheme="w4a16")
    assert str(refused.value) == str(of_quantize.value) and not (tmp_path / "keep").exists()
    for given, said in (
        ({"on": "z80"}, "no such GPU"),
        ({"budget": "many"}, "--budget takes a size"),
        ({"text": tmp_path / "none"}, "is not there"),
        ({"keep": text}, "is a file"),
        ({"keep": tmp_path}, "holds other things"),
    ):
        with pytest.raises(LlmqError, match=said):
            llmq.compare(src, "rtn", group_size=32, **options | given)


@pytest.mark.parametrize("rows", [None, 5, [5], [{"name": "a"}], [{"name": "a", "options": {}, "out": "a", "new": 1}]])
def test_a_folder_of_another_llmq_is_one_line(tmp_path, rows):
    (tmp_path / "compare.json").write_text(json.dumps({"run": {}} if rows is None else {"run": {}, "rows": rows}))
    with pytest.raises(LlmqError, match="is not as this llmq writes it"):
        results.kept(tmp_path, {})


def test_a_link_to_nothing_among_the_texts_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert [f for f, *_ in _run._text_seen(tmp_path)["files"]] == [str(tmp_path / "a.txt")]


def row(name, size, kl, half=0.01, **more):
    return Row(name, {}, name, size, evaluation={"kl_mean": kl, "kl_interval": [kl - half, kl + half]}, **more)


def test_the_front_and_the_advice():
    rows = [row("small", 4, 0.3), row("worse", 5, 0.4), row("mid", 6, 0.11), row("large", 9, 0.1)]
    mark(rows, 8)
    assert [r.name for r in rows if r.front] == ["small", "mid", "large"]
    assert [r.name for r in rows if r.beyond] == ["large"]
    found = Comparison("src", rows)
    assert "closest to the float model within 0.00 GB: mid" in advice(found, 8, None)[0]
    assert "smallest: small" in advice(found, 8, None)[1]
    mark(rows, None)
    found.pairs = [
        {"a": "mid", "b": "large", "interval": [-0.02, 0.04]},
        {"a": "small", "b": "large", "interval": [0.1, 0.3]},
    ]
    assert "mid is smaller" in advice(found, None, None)[1] and "no difference" in advice(found, None, None)[1]
    for r in rows:
        r.runs = False
    assert advice(found, None, "t4") == ["none of them runs on t4: give a larger budget, or schemes of fewer bits"]
    assert results._differ([], "a", "b")


def test_the_command(tiny_checkpoint, tmp_path, text):
    src, file = tiny_checkpoint(), tmp_path / "c.json"
    args = ["compare", src, "--schemes", "rtn", "--schemes", "three=--method rtn --bits 3", "--group-size", "32"]
    args += ["--text", text, "--window", "48", "--windows", "2", "--json", file, "--budget", "1MB", "--device", "cpu"]
    args += ["--html", tmp_path / "report.html"]
    said = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
    assert said.exit_code == 0 and "closest to the float model within 0.00 GB: rtn" in said.output
    rows = json.loads(file.read_text())["rows"]
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "three" in page
    kl = [r["evaluation"]["kl_mean"] for r in rows]
    assert [r["name"] for r in rows] == ["rtn", "three"] and kl[1] > kl[0] > 0
    assert rows[1]["options"] == {"method": "rtn", "bits": 3, "group_size": "32"}
    assert all(r["speed"] is None or r["speed"] > 0 for r in rows)  # None: a random model may end at once


def test_candidates_are_added_to_those_that_are_there(tiny_checkpoint, tmp_path, text, monkeypatch):
    src, keep = tiny_checkpoint(), tmp_path / "keep"
    made, quantize, options = [], api.quantize, {"text": text, "keep": keep, "warn": str, **EVAL}
    a, b = ({"method": "rtn", "group_size": 32, "bits": n} for n in (4, 8))
    monkeypatch.setattr("llmq.comparing._run.tokens_per_second", lambda out, device: 7.0)
    monkeypatch.setattr(api, "quantize", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llmq.compare(src, {"a": a}, **options)
    monkeypatch.setattr(api, "quantize", lambda src, out, **o: made.append(out.name) or quantize(src, out, **o))
    (keep / "a.llmq-partial").mkdir()  # what an interrupted run leaves, of the first candidate too
    llmq.compare(src, {"a": a}, **options)
    assert [r.name for r in llmq.compare(src, {"b": b}, **options).rows] == ["b"]
    rows = json.loads((keep / "compare.json").read_text())["rows"]
    assert [(r["name"], r["bytes"] > 0, r["speed"]) for r in rows] == [("a", True, 7.0), ("b", True, 7.0)]
    assert [r.name for r in llmq.compare(src, {"b": b, "a": a}, **options).rows] == ["b", "a"] and made == ["a", "b"]
    before = (keep / "a" / "quantization.json").stat()
    (keep / "c").mkdir()
    for name in ("a", "c"):  # of other options, and of no comparison
        with pytest.raises(LlmqError, match=f"keep/{name} is there .* give another name or another --keep, or remove "):
            llmq.compare(src, {"new": a, name: b}, **options)
    assert (keep / "a" / "quantization.json").stat() == before and made == ["a", "b"]
