"""Heads as configs give them: explicit, implied, and left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmq.model.config import head_dim, kv_heads

CASES = {
    "implied": ({}, 16, 8),
    "explicit": ({"head_dim": 32, "num_key_value_heads": 2}, 32, 2),
    "empty": ({"head_dim": None, "num_key_value_heads": None}, 16, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_of_a_config(case):
    given, dim, kv = CASES[case]
    config = SimpleNamespace(hidden_size=128, num_attention_heads=8, **given)
    assert (head_dim(config), kv_heads(config)) == (dim, kv)


def test_heads_that_differ_from_block_to_block():
    wide, narrow = (SimpleNamespace(head_dim=d, num_key_value_heads=h) for d, h in ((64, 1), (16, 4)))
    config = SimpleNamespace(is_heterogeneous=True, per_layer_config=[narrow, wide])
    assert (head_dim(config, 0), head_dim(config, 1), head_dim(config)) == (16, 64, 64)
    assert (kv_heads(config, 0), kv_heads(config, 1), kv_heads(config)) == (4, 1, 4)
