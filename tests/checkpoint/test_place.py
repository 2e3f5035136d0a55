"""OUT that cannot be, or that is something of the user's, is refused before any work, by one line that names it."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llmq.checkpoint import Sink
from llmq.checkpoint.place import AFTERWARDS, beside, check_file, user_path
from llmq.gguf.sink import GgufSink
from llmq.types import LlmqError


def refused(out, match, sink=Sink, **options):
    with pytest.raises(LlmqError, match=match) as caught:
        sink(out, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    return folder


def test_out_that_is_src_holds_it_or_lies_in_it(tmp_path, source):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "linked-parent").symlink_to(tmp_path)
    for out, match in (
        (source, "is SRC itself"),
        (tmp_path / "linked-parent/source", "is SRC itself"),
        (source / "../source", "is SRC itself"),
        (tmp_path, "holds SRC"),
        (source / "int4", "lies in SRC"),
        (tmp_path / "link/int4", "lies in SRC"),
    ):
        refused(out, match, overwrite=True, reads={"SRC": source})
        refused(out, match, overwrite=True, reads={"SRC": tmp_path / "link"})
    refused(source / "m.gguf", "lies in SRC", GgufSink, reads={"SRC": source})
    refused(source, "is --adapter itself", reads={"--adapter": source})
    refused(tmp_path / "i.gguf", "is --imatrix itself", GgufSink, reads={"--imatrix": tmp_path / "i.gguf"})


def test_out_that_holds_what_src_links_to(tmp_path, source, quantized):
    out = quantized(tmp_path / "out")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(out / "model.safetensors")
    refused(out, "holds model.safetensors, to which SRC links", overwrite=True, reads={"SRC": source})


def test_names_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    deep = tmp_path.joinpath(*["x" * 200] * 20)
    monkeypatch.chdir(tmp_path)
    for out, match in (
        (".", "names no folder or file"),
        ("..", "names no folder or file"),
        ("/", "names no folder or file"),
        ("a/..", "names no folder or file"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/out", "(?i)not a directory|is a file"),
        (tmp_path / "dangling", "is a symbolic link"),
        (tmp_path / "loop/out", "(?i)loop|too many levels|cannot be written"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "new" / ("x" * 300), "at most"),
        (tmp_path / ("x" * 240), "at most"),
        (deep / "out", "too long"),
        ("a\0b", "NUL|null"),
        ("a\udcffb", "no path"),
        ("~no-such-user/out", "no path"),
    ):
        for sink in (Sink, GgufSink):
            kind = match if sink is Sink or match != "is a file" else r"is no GGUF|does not end in \.gguf"
            refused(out, kind, sink, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop"]


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Sink("~/new/out").out == tmp_path / "new/out" and user_path("~/t.txt") == tmp_path / "t.txt"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours_to_write_to(tmp_path):
    tmp_path.chmod(0o500)
    refused(tmp_path / "out", "not yours to write to")


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(tmp_path / "out", "not yours to write to")


def project(folder):
    (folder / ".git").mkdir()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: (f / ".git").mkdir(), "not a quantized checkpoint"),
        (lambda f: (f / "model.safetensors").unlink(), "not a quantized checkpoint"),
        (lambda f: (f / "config.json").unlink(), "not a quantized checkpoint"),
        (lambda f: (f / "config.json").write_text('{"name": "my web app"}'), "not a quantized checkpoint"),
        (lambda f: (f / "config.json").write_text("{"), "not a quantized checkpoint"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "not a quantized checkpoint"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama", "quantization_config": null}'),
         "not a quantized checkpoint"),
        (lambda f: (f / "thesis.txt").write_text("years of work"), "holds thesis.txt"),
        (lambda f: (f / "results.json").write_text("{}"), "holds results.json"),
        (lambda f: (f / "optimizer.pt").write_text(""), "holds optimizer.pt"),
        (lambda f: (f / "runs").mkdir(), "holds runs"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").write_text(""), "holds adapter_model.safetensors"),
        (lambda f: shutil.copytree(f, f / "original"), "holds original"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_quantized_checkpoint_is_never_overwritten(tmp_path, quantized, content, change, match):
    out = quantized(tmp_path / "out")
    change(out)
    before = content(out)
    refused(out, match, overwrite=True)
    refused(out, "exists")
    assert content(out) == before


def test_a_quantized_checkpoint_of_a_peer_and_an_empty_folder_are_overwritten(tmp_path, quantized, source):
    out = quantized(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer.model", "quant_log.csv", "LICENSE.txt", "README.md", ".gitattributes"):
        (out / name).write_text("")
    (out / "additional_chat_templates").mkdir()
    (out / "additional_chat_templates/tool.jinja").write_text("")
    Sink(out, overwrite=True)
    (source / "own_names.json").write_text("{}")  # copied from SRC, so OUT has it too
    (out / "own_names.json").write_text("{}")
    refused(out, "holds own_names.json", overwrite=True)
    Sink(out, overwrite=True, reads={"SRC": source})
    for name in ("notes.md", "adapter_model.safetensors"):  # SRC has them, but nothing hands them on
        (source / name).write_text("")
        (out / name).write_text("mine")
        refused(out, f"holds {name}", overwrite=True, reads={"SRC": source})
        (out / name).unlink()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "exists")
    Sink(tmp_path / "empty", overwrite=True)


def test_weights_beside_those_that_its_record_lists_are_not_overwritten(tmp_path, quantized):
    out = quantized(tmp_path / "out")
    (out / "quantization.json").write_text(json.dumps({"files": {"model.safetensors": "0", "results.json": "1"}}))
    (out / "results.json").write_text("{}")
    Sink(out, overwrite=True)
    (out / "trained.safetensors").write_text("")
    refused(out, "holds trained.safetensors", overwrite=True)


def test_what_llmq_adds_to_it_later_goes_with_it(tmp_path, quantized):
    out = quantized(tmp_path / "out")
    for name in AFTERWARDS:
        assert beside(out, name) == out / name
        beside(out, name).write_text("{}")
    Sink(out, overwrite=True)
    assert beside(tmp_path / "m.v1.gguf", "report.html") == tmp_path / "m.v1.report.html"


def test_files_that_options_name(tmp_path):
    (tmp_path / "figures.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "figures.json")
    for path, match in (
        (tmp_path, "is a folder"),
        (tmp_path / "no/x.json", "is no folder that exists"),
        (tmp_path / "figures.json", "exists"),
        (tmp_path / "link", "symbolic link"),
        (tmp_path / "figures.json/x", "no folder that exists"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "config.json", "like a file of a checkpoint"),
        (tmp_path / "tokenizer.json", "like a file of a checkpoint"),
    ):
        with pytest.raises(LlmqError, match=match):
            check_file(path, "--json", b"{", overwrite=False)
    check_file(tmp_path / "figures.json", "--json", b"{", overwrite=True)
    check_file(tmp_path / "new.json", "--json", b"{", overwrite=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LlmqError, match="holds something else"):
        check_file(tmp_path / "thesis.txt", "--json", b"{", overwrite=True)
    assert json.loads((tmp_path / "figures.json").read_text()) == {}
