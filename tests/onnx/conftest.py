"""Fixtures: golden and tiny checkpoints as ONNX folders, run by onnxruntime, beside what llmq computes of them."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _onnxruntime import OnnxModel
from _tiny import VOCAB, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.export._run import export
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """`golden(name)`: a peer's checkpoint with a tokenizer beside it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = shutil.copytree(GOLDEN / name, tmp_path_factory.mktemp("golden") / name)
            make_tokenizer(bos=True).save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """`family(model_type, recipe={}, **config)`: a tiny random model, norms and biases too, rounded to 4 bits."""

    def folder(model_type, recipe=None, **changes):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **(SMALL | changes))
        model = AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for vector in (p for p in model.parameters() if p.dim() == 1):
                vector.add_(0.1 * torch.randn_like(vector))
        src = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(src / "float")
        make_tokenizer(bos=True).save_pretrained(src / "float")
        how = {"method": "rtn", "dtype": "float32", "group_size": 32, "format": "compressed-tensors"} | (recipe or {})
        quantize(prepare(str(src / "float"), Recipe(**how), "cpu"), src / "packed")
        return src / "packed"

    return folder


@pytest.fixture(scope="module")
def reference():
    """`reference(folder)(ids, mask=None)`: the logits of llmq's reference decode in float32."""
    loaded = {}

    def model(folder):
        if folder not in loaded:
            loaded[folder] = llmq.load(folder, dtype=torch.float32, backend="reference")

        def logits(ids, mask=None):
            mask = torch.ones_like(ids) if mask is None else mask
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                return loaded[folder](ids, attention_mask=mask, position_ids=positions).logits

        return logits

    return model


@pytest.fixture
def exported(tmp_path):
    """`exported(folder, to)`: the export, its folder, and it running in onnxruntime."""

    def run(folder, to="onnx"):
        out = tmp_path / "onnx"
        done = export(str(folder), out, to, overwrite=True)
        return SimpleNamespace(done=done, folder=out, model=OnnxModel(out))

    return run


@pytest.fixture(scope="session")
def ids():
    """Two rows of 20 seeded ids."""
    return torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
