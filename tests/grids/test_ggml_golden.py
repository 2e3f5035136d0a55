"""Against llama.cpp: its bytes are read and rewritten as they are, and on its weights our encoders err less.

tests/golden/ggml.safetensors: made by scripts/make_golden_ggml.py.
"""

from pathlib import Path

import pytest
import torch
from _ggml import values_of
from safetensors.torch import load_file

from llmq import registry
from llmq.gguf import kinds
from llmq.stored import StoredGrid

GOLDEN = load_file(Path(__file__).parent.parent / "golden/ggml.safetensors")
W_NK, IMPORTANCE = GOLDEN["weights"].float(), GOLDEN["importance"]
KEYS = [k for k in GOLDEN if k not in ("weights", "importance")]


def read(key):
    """Return the grid and what llama.cpp's bytes mean."""
    kind = key.partition(".")[0]
    return kinds.grid(kind), values_of(GOLDEN[key], kind)


@pytest.mark.parametrize("key", KEYS)
def test_llama_cpps_bytes_are_read_and_rewritten(key):
    grid, values = read(key)
    codes, params = grid.from_bytes(GOLDEN[key])
    decoded = grid.decode(codes, params.columns(W_NK.shape[1]))
    assert torch.equal(decoded + 0, values + 0)  # ggml's -0 of small floats is 0
    assert torch.equal(grid.to_bytes(codes, params), GOLDEN[key])


@pytest.mark.parametrize("key", KEYS)
def test_the_error_is_below_llama_cpps(key):
    """By the importance where there is one, else by the squared error."""
    grid, theirs = read(key)
    importance = IMPORTANCE if key.endswith(".weighted") else None
    params = grid.fit(W_NK, importance).columns(W_NK.shape[1])
    ours = grid.decode(grid.nearest(W_NK, params), params)
    weight = 1.0 if importance is None else importance
    ratio = ((ours - W_NK).square() * weight).sum() / ((theirs - W_NK).square() * weight).sum()
    assert ratio < 1


def test_every_grid_has_its_golden_bytes():
    found = {n.upper() for n in registry.names("grids") if issubclass(registry.find("grids", n), StoredGrid)}
    assert found == {k.partition(".")[0] for k in KEYS}
