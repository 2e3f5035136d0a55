"""What a forward holds: exact for a Llama, by counting its tensors; found for what is far from one."""

from __future__ import annotations

import pytest
import torch
from _families import FAMILIES

from llmq.checkpoint import Source
from llmq.model.footprint import footprints
from llmq.model.skeleton import Skeleton

T, H, I, KV = 32, 64, 128, 32  # noqa: E741


@pytest.fixture
def llama(tiny_checkpoint):
    return Skeleton(Source(tiny_checkpoint()), torch.float32)


def test_a_suspended_llama_holds_what_its_frames_name(llama):
    entered, found = footprints(llama, T)
    word = 4 * T
    assert entered.hidden == word * H
    # what entered and its norm; then queries, keys, values and their mix; the residual takes the mix's place; gate * up
    assert list(found[0].at.values()) == [word * n for n in (2 * H, 2 * H + (H + 2 * KV) + H, 3 * H, 3 * H + I)]
    assert found[0].most >= max(found[0].at.values()) and found[0].left == 0


def test_tokens_and_dtype_scale_it(llama, tiny_checkpoint):
    _, short = footprints(llama, T)
    _, long = footprints(llama, 2 * T)
    assert long[0].at == {n: 2 * size for n, size in short[0].at.items()}
    _, half = footprints(Skeleton(llama.source, torch.bfloat16), T)
    assert 2 * half[0].at["mlp.down_proj",] == short[0].at["mlp.down_proj",]


def test_a_gradient_holds_the_activations_of_the_whole_block(llama):
    _, (found, _) = footprints(llama, T, gradients=True)
    assert found.backward > 4 * T * (6 * H + 2 * KV + 3 * I) > found.most


def test_the_model_is_left_as_it_was(llama):
    footprints(llama, T, gradients=True)
    with llama.loaded(0, torch.device("cpu")) as block:
        assert all(p.device.type == "cpu" and p.any() for p in block.parameters())
    assert all(p.is_meta for p in llama.model.parameters())


@pytest.mark.parametrize("family", ["gemma4_text", "qwen3_moe", "llama4_text", "falcon_h1"])
def test_what_is_no_llama(family, tmp_path):
    """Keys that are handed on, experts, one batch of all experts, a state space."""
    FAMILIES[family].save(tmp_path)
    _, found = footprints(Skeleton(Source(tmp_path), torch.float32), T)
    assert all(f.most >= max(f.at.values()) > 0 for f in found)
    assert bool(found[0].left) == (family == "gemma4_text")
