"""GGUF files change hands one by one: which of them are this model's, and that no two models' shards are ever mixed."""

import gguf
import numpy as np
import pytest

from llmq.gguf import container
from llmq.gguf.sink import GgufSink
from llmq.types import LlmqError


def file(path, count=None, value=0.0):
    writer = gguf.GGUFWriter(path, "llama")
    if count is not None:
        writer.add_uint16("split.count", count)
    writer.add_tensor("a", np.full(3, value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(out, count):
    names = [out.with_name(f"{out.stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    return [file(name, count) for name in names]


def test_shards_are_known_by_exact_names_and_by_what_the_first_one_says(tmp_path):
    out = tmp_path / "llama.gguf"
    ours = split(out, 2)
    split(tmp_path / "llama-2-7b.gguf", 2)
    split(tmp_path / "llama-00001-of-00002.gguf", 2)
    (tmp_path / "llama-00001-of-00003.gguf").write_text("a diary")  # no GGUF file
    file(tmp_path / "llama-00001-of-00004.gguf", 9)  # of another count
    file(tmp_path / "llama-00002-of-00005.gguf", 5)  # without its first
    assert container.shards(out) == ours
    with pytest.raises(LlmqError, match="llama-00001-of-00002.gguf exists"):
        container.check_out(out, overwrite=False)
    container.check_out(out, overwrite=True)
    assert container.shards(tmp_path / "other[a-z].gguf") == []


def test_what_is_no_gguf_file_is_not_overwritten(tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("a diary")
    with pytest.raises(LlmqError, match="no GGUF file; it is not overwritten"):
        GgufSink(out, overwrite=True)
    out.write_text("")
    GgufSink(out, overwrite=True)


def test_the_shards_of_other_models_survive_and_are_no_refusal(tmp_path):
    out = tmp_path / "llama.gguf"
    others = {p: p.read_bytes() for p in split(tmp_path / "llama-2-7b.gguf", 2)}
    ours = split(out, 3)
    with GgufSink(out, overwrite=True) as sink:
        file(sink.stage / "llama.gguf", value=1.0)
        sink.commit()
    assert {p: p.read_bytes() for p in others} == others
    assert not any(p.exists() for p in ours) and out.is_file()
    with GgufSink(tmp_path / "llama-2.gguf") as sink:
        file(sink.stage / "llama-2.gguf")
        sink.commit()
    assert {p.name for p in tmp_path.iterdir()} == {"llama-2.gguf", "llama.gguf", *(p.name for p in others)}


def test_what_is_removed_is_what_was_there_when_the_new_one_was_whole(tmp_path):
    out = file(tmp_path / "m.gguf")
    with GgufSink(out, overwrite=True) as sink:
        split(sink.stage / "m.gguf", 3)
        sink.seal({})
        out.write_bytes(b"GGUF of another tool, written meanwhile")
        sink.commit()
    assert out.read_bytes() == b"GGUF of another tool, written meanwhile"


def test_shards_replace_one_file_and_the_first_of_them_comes_last(tmp_path, monkeypatch):
    out, order = file(tmp_path / "m.gguf"), []
    put = GgufSink.target

    def watched(self, name):
        order.append(name)
        return put(self, name)

    with GgufSink(out, overwrite=True) as sink:
        split(sink.stage / "m.gguf", 3)
        sink.seal({})
        monkeypatch.setattr(GgufSink, "target", watched)
        sink.put(sorted(p.name for p in sink.stage.iterdir()))
        monkeypatch.undo()
        assert out.is_file()
        sink.commit()
    assert order == [f"m-{i:05d}-of-00003.gguf" for i in (3, 2, 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(order)
