"""What is said before any work: weights that no scale of the format can hold."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe

NAME = "model.layers.1.mlp.up_proj"
RTN = {"method": "rtn", "group_size": 32}


@pytest.fixture
def faint(tiny_checkpoint):
    """`faint(dtype)`: a checkpoint with four rows of a linear near 1e-7, and one row of zeros."""

    def make(dtype):
        folder = tiny_checkpoint(dtype=dtype)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{NAME}.weight"][:4] *= 1e-6
        tensors[f"{NAME}.weight"][4] = 0
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def told(folder, **options):
    return [w for w in prepare(str(folder), Recipe(**options), "cpu").warnings if "too small or too large" in w]


@pytest.mark.parametrize("form", ["gptq", "awq", "gguf:pre=gpt-2"])
def test_weights_below_float16_scales_are_warned_of(form, faint):
    options = {"method": "rtn", "format": form, "type": "Q8_0"} if form.startswith("gguf") else RTN | {"format": form}
    (warning,) = told(faint(torch.float32), **options)
    assert warning.startswith(f"{NAME}: the weights of 8 groups ") and "compressed-tensors" in warning


def test_scales_as_wide_as_the_checkpoint_hold_them(faint, tmp_path):
    folder = faint(torch.float32)
    options = RTN | {"format": "compressed-tensors"}
    assert told(folder, **options) == []
    quantize(prepare(str(folder), Recipe(**options), "cpu"), tmp_path / "out")
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.weight_scale"]
    W = load_file(folder / "model.safetensors")[f"{NAME}.weight"]
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale[:4] * 7.5, W[:4].view(4, -1, 32).abs().amax(-1), rtol=1e-5, atol=0)
    (warning,) = told(faint(torch.float16), **options)  # whose own scales are float16
    assert "8 groups" in warning


def test_ordinary_weights_are_not_warned_of(tiny_checkpoint):
    assert told(tiny_checkpoint(dtype=torch.bfloat16), **RTN) == []
