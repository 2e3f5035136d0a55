"""Reading one tensor at a time, writing all or nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import Sink, Source, resolve
from llmq.types import LlmqError


def test_reads_sharded_and_single_files_alike(tiny_checkpoint):
    one, many = Source(tiny_checkpoint()), Source(tiny_checkpoint(shard="100KB"))
    assert len(list(many.path.glob("*.safetensors"))) > 2
    assert sorted(one.names()) == sorted(many.names())
    assert all(torch.equal(one.get(n), many.get(n)) for n in one.names())
    assert one.headers() == many.headers()
    one.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(tiny_checkpoint, value):
    from safetensors.torch import save_file

    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        Source(folder).check()


def test_a_missing_and_a_truncated_shard_are_named(tiny_checkpoint):
    folder = tiny_checkpoint(shard="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(LlmqError, match=f"{shard.name} is truncated"):
        Source(folder)
    shard.unlink()
    with pytest.raises(LlmqError, match=f"{shard.name} is missing"):
        Source(folder)


def test_pickles_are_refused_with_the_way_to_convert(tiny_checkpoint):
    folder = tiny_checkpoint()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LlmqError, match="pickle.*save_pretrained"):
        Source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "never runs such code"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    ],
)
def test_broken_folders_say_what_is_wrong(tiny_checkpoint, change, message):
    folder = tiny_checkpoint()
    change(folder)
    with pytest.raises(LlmqError, match=message):
        Source(resolve(str(folder)))


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


def test_an_error_leaves_nothing_behind_and_an_old_out_untouched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(LlmqError, match="--overwrite"):
        Sink(out)
    with pytest.raises(KeyboardInterrupt), Sink(out, overwrite=True) as sink:
        sink.add({"a": torch.ones(3)})
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "old"
    with Sink(out, overwrite=True) as sink:
        sink.text("config.json", "new")
        sink.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "config.json").read_text() == "new"


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LlmqError, match="not a checkpoint folder"):
        Sink(tmp_path, overwrite=True)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmq.checkpoint.sink.save_file", full)
    with pytest.raises(LlmqError, match="No space left"), Sink(tmp_path / "out") as sink:
        sink.add({"a": torch.ones(3)})
    assert not list(tmp_path.iterdir())
