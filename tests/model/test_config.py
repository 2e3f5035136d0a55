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
