"""Reading one tensor at a time."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import Source, resolve
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
