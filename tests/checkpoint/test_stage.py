"""What runs leave beside OUT, and what the next run makes of it; nobody else's folder is touched."""

import fcntl
import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import Sink
from llmq.checkpoint.stage import MARKER, Stage
from llmq.gguf.sink import GgufSink
from llmq.types import LlmqError

CONFIG = '{"model_type": "llama", "quantization_config": {"bits": 4}}'
RUN = {"command": "quantize", "bits": 4}


def killed(sink, *, whole=False, add=True):
    """Leave a sink's stage as a kill would: nothing is cleaned up, the lock is free."""
    sink.__enter__()
    if add:
        sink.add({"a": torch.ones(3)})
        sink.text("config.json", CONFIG)
        sink.join()
    if whole:
        sink.seal({"answer": 42})
    sink._stage.close()
    return sink.room


@pytest.mark.parametrize("name", ["out.llmq-partial", "out.llmq-partial-2", "out.partial", "out.old", "out.new"])
def test_a_folder_of_the_user_is_never_touched(tmp_path, quantized, name):
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    for _ in range(2):
        with Sink(tmp_path / "out", overwrite=True) as sink:
            sink.add({"a": torch.ones(3)})
            sink.text("config.json", CONFIG)
            sink.join()
            sink.commit()
    assert (theirs / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", name])


def test_a_second_run_says_which_process_has_out(tmp_path):
    with Sink(tmp_path / "out") as sink:
        sink.add({"a": torch.ones(3)})
        for overwrite in (False, True):
            with pytest.raises(LlmqError, match=f"being written by process {os.getpid()} on .* \\(since"):
                Sink(tmp_path / "out", overwrite=overwrite)
        sink.join()
        sink.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_of_two_runs_that_begin_at_once_one_goes_on(tmp_path):
    first, second = Sink(tmp_path / "out"), Sink(tmp_path / "out")
    with first:
        with pytest.raises(LlmqError, match=f"being written by process {os.getpid()}"):
            second.__enter__()
        assert first.room.is_dir()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(LlmqError, match="Function not implemented"), Sink(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_unfinished_stage_of_another_command_is_named_and_removed_by_overwrite_only(tmp_path, caplog):
    left, other = killed(Sink(tmp_path / "out", run=RUN)), RUN | {"bits": 3}
    with pytest.raises(LlmqError, match=rf"left {left} \(0\.00 GB\), unfinished, .*\(bits 4, not 3\); .*--overwrite"):
        Sink(tmp_path / "out", run=other)
    assert left.is_dir()
    with caplog.at_level(logging.WARNING), Sink(tmp_path / "out", overwrite=True, run=other) as sink:
        assert sink.earlier is None and not sink.goes_on
        assert not list(sink.room.glob("part-*"))
    assert f"left {left} (0.00 GB), unfinished, of another command (bits 4, not 3); it is removed" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("began", "again", "goes_on"), [(0, 0, True), (1, 1, True), (1, 0, True), (0, 1, False)])
def test_the_same_command_goes_on_and_overwrite_added_to_it_begins_anew(tmp_path, began, again, goes_on):
    left = killed(Sink(tmp_path / "out", run=RUN, overwrite=bool(began)))
    Sink(tmp_path / "out")  # before the run is known, it is in nobody's way
    (left / "new/half-written").write_text("")
    with pytest.raises(ValueError, match="it broke"), Sink(tmp_path / "out", run=RUN, overwrite=bool(again)) as sink:
        assert sink.goes_on == goes_on and (left / "part-00000").exists() == goes_on and not sink.files()
        raise ValueError("it broke")
    assert left.exists() == goes_on  # of what goes on, nothing is lost by an error that comes at once


def test_who_goes_on_holds_the_lock_and_says_where_the_machine_differs(tmp_path, caplog):
    left = killed(Sink(tmp_path / "out", run=RUN))
    said = json.loads((left / MARKER).read_text())
    (left / MARKER).write_text(json.dumps(said | {"pid": 1, "threads": said["threads"] + 1}))
    with caplog.at_level(logging.WARNING), Sink(tmp_path / "out", run=RUN) as sink:
        with pytest.raises(LlmqError, match=f"being written by process {os.getpid()} on"):
            Sink(tmp_path / "out", run=RUN)
        with pytest.raises(LlmqError, match="being written by"):
            Stage.open(left)
        assert sink.goes_on and f"threads {said['threads'] + 1}, not {said['threads']}" in caplog.text
        assert "host" not in caplog.text and "cpu" not in caplog.text


def test_going_back_drops_the_parts_that_do_not_count(tmp_path):
    with Sink(tmp_path / "out", run=RUN) as sink:
        for n in range(4):
            sink.add({f"t{n}": torch.full((3,), float(n))})
        digests = sink.digests
        (sink.room / "part-00004").write_bytes(b"torn")
        sink.go_back(2)
        assert [p.name for p in sink.parts] == sorted(p.name for p in sink.room.glob("part-*"))
        assert list(sink.digests.items()) == list(digests.items())[:2]
        for n in (2, 3):
            sink.add({f"t{n}": torch.full((3,), float(n))})
        assert sink.digests == digests and sink.join() == 48
        sink.commit()
    assert [float(t[0]) for _, t in sorted(load_file(tmp_path / "out/model.safetensors").items())] == [0, 1, 2, 3]


def test_an_empty_stage_is_in_nobodys_way(tmp_path, caplog):
    left = killed(Sink(tmp_path / "out"), add=False)
    with caplog.at_level(logging.WARNING), Sink(tmp_path / "out"):
        assert f"left {left} (0.00 GB), empty; it is removed" in caplog.text
    left = killed(Sink(tmp_path / "m.gguf"), add=False)
    (left / "new").rmdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with GgufSink(tmp_path / "m.gguf", overwrite=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_damaged_marker_is_an_unfinished_stage(tmp_path):
    left = killed(Sink(tmp_path / "out"))
    (left / ".llmq-stage.json").write_text("")
    with pytest.raises(LlmqError, match="unfinished"):
        Sink(tmp_path / "out", run=RUN)
    with Sink(tmp_path / "out", overwrite=True):
        pass
    assert not list(tmp_path.iterdir())


def test_a_whole_stage_is_committed_by_the_same_command(tmp_path, caplog):
    left = killed(Sink(tmp_path / "out", run=RUN), whole=True)
    Sink(tmp_path / "out")  # before the run is known, it is in nobody's way
    with caplog.at_level(logging.WARNING), Sink(tmp_path / "out", run=RUN) as sink:
        assert sink.earlier == {"answer": 42}
        sink.commit()
    assert f"left {left}" in caplog.text and "put in place" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/model.safetensors").is_file()


def test_a_whole_stage_of_another_command_stays(tmp_path, caplog):
    left = killed(Sink(tmp_path / "out", run=RUN), whole=True)
    other = RUN | {"bits": 3}
    with pytest.raises(LlmqError, match=rf"left {left} .*whole, of another command \(bits 4, not 3\)"):
        Sink(tmp_path / "out", run=other)
    with caplog.at_level(logging.WARNING), Sink(tmp_path / "out", overwrite=True, run=other) as sink:
        assert sink.earlier is None and sink.room.name == "out.llmq-partial-2"
        sink.add({"b": torch.ones(3)})
        sink.join()
        sink.commit()
    assert "it stays there" in caplog.text and (left / "new/model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.llmq-partial"]


def test_a_whole_stage_whose_files_were_changed_is_unfinished(tmp_path):
    left = killed(Sink(tmp_path / "out", run=RUN), whole=True)
    (left / "new/model.safetensors").write_bytes(b"shorter")
    with pytest.raises(LlmqError, match="unfinished"):
        Sink(tmp_path / "out", run=RUN)


def test_what_a_kill_after_the_exchange_left_is_the_old_one_and_is_removed(tmp_path, quantized, caplog):
    out = quantized(tmp_path / "out")
    left = killed(Sink(out, overwrite=True, run=RUN), whole=True)
    os.rename(out, left / "aside")  # noqa: PTH104  (the exchange by hand)
    os.rename(left / "new", out)  # noqa: PTH104
    os.rename(left / "aside", left / "new")  # noqa: PTH104
    with caplog.at_level(logging.WARNING), Sink(out, overwrite=True, run=RUN | {"bits": 3}) as sink:
        assert sink.earlier is None
    assert "committed" in caplog.text and [p.name for p in tmp_path.iterdir()] == ["out"]
    left = killed(Sink(tmp_path / "new", run=RUN), whole=True)
    os.rename(left / "new", tmp_path / "new")  # noqa: PTH104
    with Sink(tmp_path / "new", run=RUN) as sink:  # the very command: it has done its work
        assert sink.earlier == {"answer": 42}
        sink.commit()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_an_out_that_was_moved_aside_is_put_back_by_the_next_look(tmp_path, quantized, content):
    out = quantized(tmp_path / "out")
    old = content(out)
    left = killed(Sink(out, overwrite=True, run=RUN), whole=True)
    os.rename(out, left / "old")  # noqa: PTH104  (killed between two renames)
    with pytest.raises(LlmqError, match="of another command|exists"):
        Sink(out, run=RUN | {"bits": 3})
    assert content(out) == old and (left / "new/model.safetensors").is_file()


def test_the_marker_says_whose_the_stage_is(tmp_path):
    with Sink(tmp_path / "out", run=RUN) as sink:
        said = json.loads((sink.room / ".llmq-stage.json").read_text())
    assert said["out"] == str(tmp_path / "out") and said["pid"] == os.getpid() and said["run"] == RUN
    assert not list(tmp_path.iterdir())
