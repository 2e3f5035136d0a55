"""Written part by part, moved into place whole: what OUT was stays until the new one is there."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import Sink, disk
from llmq.types import LlmqError


def test_parts_are_joined_into_shards_that_hold_the_same_tensors(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(10, 7, generator=g),
        "b": torch.randint(0, 9, (5,), dtype=torch.int8),
        "c": torch.randn(100, generator=g).bfloat16(),
        "d": torch.randint(0, 9, (33,), dtype=torch.int32),
        "e": torch.zeros(0, 4),
    }
    for limit in (10**9, 300):
        with Sink(tmp_path / f"out{limit}") as sink:
            for name, tensor in tensors.items():
                sink.add({name: tensor})
            assert sink.join(limit) == sum(t.nbytes for t in tensors.values())
            sink.commit()
        files = sorted((tmp_path / f"out{limit}").glob("*.safetensors"))
        assert (len(files) > 1) == (limit == 300)
        read = {k: v for f in files for k, v in load_file(f).items()}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
        if len(files) > 1:
            index = json.loads((tmp_path / "out300/model.safetensors.index.json").read_text())
            assert {k: (tmp_path / "out300" / f).name for k, f in index["weight_map"].items()}.keys() == tensors.keys()
            assert {f.name for f in files} == set(index["weight_map"].values())


def test_only_folders_that_are_not_there_are_made(tmp_path, monkeypatch):
    (tmp_path / "src/additional_chat_templates").mkdir(parents=True)
    later = ("timings.json", "evaluation.json")  # of a source that is quantized, and not of what is made of it
    for name in ("tokenizer.json", "additional_chat_templates/a.jinja", "additional_chat_templates/b.jinja", *later):
        (tmp_path / "src" / name).write_text("{}")
    made, mkdir = [], os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: (made.append(Path(path).name), mkdir(path, *mode)))
    with Sink(tmp_path / "out") as sink:
        sink.copy_files(tmp_path / "src")
        sink.commit()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tokenizer.json", "additional_chat_templates"}
    assert made == ["out.llmq-partial", "new", "additional_chat_templates"]
    made.clear()
    with Sink(tmp_path / "a/b/out"):
        pass
    assert {"a", "b"} <= set(made) and not (tmp_path / "a").exists()


def test_replaced_tensors_keep_dtype_neighbours_and_the_mode_of_the_file(tmp_path):
    tensors = {"a": torch.randn(4, 3).bfloat16(), "b": torch.arange(5), "c": torch.tensor(2.5)}
    before = os.umask(0o022)
    try:
        with Sink(tmp_path / "out") as sink:
            for name, tensor in tensors.items():
                sink.add({name: tensor})
            sink.join()
            sink.replace({"a": torch.full((4, 3), 0.5), "c": torch.tensor(7.0)}.items())
            sink.text("config.json", "{}")
            sink.commit()
    finally:
        os.umask(before)
    read = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(read["a"], torch.full((4, 3), 0.5).bfloat16()) and read["c"] == 7
    assert torch.equal(read["b"], tensors["b"]) and read.keys() == tensors.keys()
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {
        "config.json": 0o644,
        "model.safetensors": 0o644,
    }
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_an_error_that_loses_nothing_leaves_nothing(tmp_path, quantized, content):
    out = quantized(tmp_path / "out")
    old = content(out)
    with pytest.raises(KeyboardInterrupt), Sink(out, overwrite=True):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and content(out) == old
    with pytest.raises(ZeroDivisionError), Sink(tmp_path / "new/deeper/out") as sink:
        sink.add({"a": torch.ones(3)})
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, LlmqError("it broke"), ValueError])
def test_what_is_finished_and_would_be_missed_stays_and_the_error_says_where(tmp_path, quantized, content, kind):
    out = quantized(tmp_path / "out")
    old = content(out)
    with pytest.raises((KeyboardInterrupt, LlmqError, ValueError)) as caught, Sink(out, overwrite=True) as sink:
        sink.promise = lambda: "the same command goes on"
        sink.add({"a": torch.ones(3)})
        raise kind
    stage = tmp_path / "out.llmq-partial"
    (note,) = caught.value.__notes__
    assert (
        f"stays in {stage} (" in note
        and note.endswith("; the same command goes on")
        and stage.is_dir()
        and content(out) == old
    )
    if isinstance(caught.value, LlmqError):
        assert str(caught.value) == f"it broke; {note}"


def test_the_old_one_is_replaced_when_the_new_one_is_whole(tmp_path, quantized):
    out = quantized(tmp_path / "out")
    with Sink(out, overwrite=True) as sink:
        sink.add({"a": torch.ones(3)})
        sink.text("config.json", "new")
        sink.join()
        sink.seal({"size": 3})
        assert "quantization_config" in (out / "config.json").read_text()
        sink.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_text() == "new"


def without_exchange(monkeypatch):
    monkeypatch.setattr(disk, "exchange", lambda a, b: False)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_commit_that_fails_keeps_both_and_the_same_command_commits(
    tmp_path, quantized, content, monkeypatch, exchange
):
    out = quantized(tmp_path / "out")
    old, run = content(out), {"bits": 4}
    rename, calls = Path.rename, []

    def failing(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    def refused(a, b):
        raise OSError(errno.EIO, "Input/output error")

    message = r"Input/output error.*finished result stays in .*same command"
    with pytest.raises(LlmqError, match=message), Sink(out, overwrite=True, run=run) as sink:
        sink.add({"a": torch.ones(3)})
        sink.join()
        sink.seal({"answer": 42})
        with monkeypatch.context() as patch:
            patch.setattr(disk, "exchange", refused if exchange else lambda a, b: False)
            patch.setattr(Path, "rename", failing)
            sink.commit()
    assert content(out) == old
    with Sink(out, overwrite=True, run=run) as sink:
        assert sink.earlier == {"answer": 42}
        sink.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(load_file(out / "model.safetensors")["a"], torch.ones(3))


def test_without_an_exchange_the_old_one_is_moved_aside_and_removed(tmp_path, quantized, monkeypatch):
    out = quantized(tmp_path / "out")
    without_exchange(monkeypatch)
    with Sink(out, overwrite=True) as sink:
        sink.text("config.json", "new")
        sink.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "config.json").read_text() == "new"


def test_out_that_became_a_project_while_the_run_went_on_is_not_replaced(tmp_path, quantized):
    out = tmp_path / "out"
    with pytest.raises(LlmqError, match="exists; .*finished result stays"), Sink(out) as sink:
        sink.add({"a": torch.ones(3)})
        sink.join()
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        sink.commit()
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmq.checkpoint.shards.write", full)
    with pytest.raises(LlmqError, match="No space left.*make room"), Sink(tmp_path / "out") as sink:
        sink.add({"a": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_further_file_goes_to_its_place_at_the_commit(tmp_path, monkeypatch):
    target = tmp_path / "sums.gguf"
    with Sink(tmp_path / "out", beside={"sums": target}) as sink:
        sink.text("config.json", "{}")
        sink.staged_beside("sums").write_text("GGUF sums")
        assert not target.exists()
        sink.commit()
    assert target.read_text() == "GGUF sums" and sorted(p.name for p in tmp_path.iterdir()) == ["out", "sums.gguf"]
    with pytest.raises(LlmqError, match="is OUT itself"):
        Sink(tmp_path / "new", beside={"sums": tmp_path / "new"})
    with pytest.raises(LlmqError, match=r"--imatrix-out .*sums.gguf exists"):
        Sink(tmp_path / "other", beside={"sums": target})

    def elsewhere(path, to):  # on another disk
        if path.name == "beside-sums":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return os.replace(path, to)  # noqa: PTH105

    monkeypatch.setattr(Path, "replace", elsewhere)
    with Sink(tmp_path / "other", overwrite=True, beside={"sums": target}) as sink:
        sink.staged_beside("sums").write_text("new sums")
        sink.commit()
    assert target.read_text() == "new sums"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out", "sums.gguf"]


def test_all_is_on_the_disk_before_a_name_counts_and_the_old_one_goes_last(tmp_path, quantized, monkeypatch):
    out, events = quantized(tmp_path / "out"), []
    fsync, exchange, unlink = os.fsync, disk.exchange, os.unlink

    def note(what, path):
        events.append((what, Path(path).relative_to(tmp_path).as_posix()))

    monkeypatch.setattr(os, "fsync", lambda at: (note("sync", Path(f"/proc/self/fd/{at}").readlink()), fsync(at)))
    monkeypatch.setattr(disk, "exchange", lambda a, b: (note("exchange", b), exchange(a, b))[1])
    monkeypatch.setattr(os, "unlink", lambda path, **at: (events.append(("unlink", str(path))), unlink(path, **at)))
    with Sink(out, overwrite=True) as sink:
        sink.add({"a": torch.ones(3)})
        sink.text("config.json", "{}")
        sink.join()
        events.clear()
        sink.commit()
    exchanged = events.index(("exchange", "out"))
    whole = next(i for i, (_, path) in enumerate(events) if "whole.json" in path)
    new = {f"out.llmq-partial/new{name}" for name in ("", "/config.json", "/model.safetensors")}
    assert new <= {path for what, path in events[:whole] if what == "sync"}
    assert ("sync", "out.llmq-partial") in events[whole:exchanged]  # the mark that the stage is whole
    after = events[exchanged + 1 :]
    removed = next(i for i, (what, _) in enumerate(after) if what == "unlink")
    assert {("sync", "."), ("sync", "out.llmq-partial")} <= set(after[:removed])
