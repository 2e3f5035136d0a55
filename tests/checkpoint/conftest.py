"""Folders as `--overwrite` meets them."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def quantized():
    """`quantized(folder, value=0.0)`: make the folder the smallest quantized checkpoint; returns it."""

    def make(folder, value=0.0):
        folder.mkdir(parents=True)
        config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"a": torch.full((3,), value)}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def content():
    """`content(folder)`: every file below it by its name, with its bytes."""
    return lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
