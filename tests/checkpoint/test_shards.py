"""Safetensors files as llmq writes them are what the library reads, and each tensor lies where it was said to."""

import pytest
import torch
from safetensors.torch import load_file

from llmq.checkpoint import shards
from llmq.errors import LlmqError
from llmq.guard.reading import tensor_entries

SHARED = torch.arange(6, dtype=torch.int32)
TENSORS = {
    "z": torch.randn(3, 5),
    "a": torch.randn(7).bfloat16(),
    "rows": torch.arange(12, dtype=torch.uint8).view(3, 4).T,
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "g_idx": SHARED,
    "h_idx": SHARED,
}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) and t.dtype == wanted[n].dtype for n, t in found.items())


def test_a_part_holds_its_tensors_where_it_says(tmp_path):
    entries = shards.write(tmp_path / "part", TENSORS)
    same(load_file(tmp_path / "part"), TENSORS)
    same({e.name: e.read() for e in entries}, TENSORS)
    assert {e.name: e for e in entries} == tensor_entries(tmp_path / "part")
    assert all(e.start % max(1, e.meta().element_size()) == 0 for e in entries)


def test_a_shard_is_made_of_parts_one_run_of_bytes_at_a_time(tmp_path, monkeypatch):
    names = list(TENSORS)
    parts = [
        shards.write(tmp_path / f"part{i}", {n: TENSORS[n] for n in some})
        for i, some in enumerate((names[:3], names[3:]))
    ]
    copies, copy = [], shards._copy
    monkeypatch.setattr(shards, "_copy", lambda source, target, n: copies.append(n) or copy(source, target, n))
    shards.join(tmp_path / "shard", [e for part in parts for e in part])
    same(load_file(tmp_path / "shard"), TENSORS)
    assert sum(copies) == sum(t.nbytes for t in TENSORS.values()) and len(copies) < 6


def test_a_part_that_shrank_is_named(tmp_path):
    entries = shards.write(tmp_path / "part", TENSORS)
    (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-1])
    with pytest.raises(LlmqError, match="part ended early"):
        shards.join(tmp_path / "shard", entries)
