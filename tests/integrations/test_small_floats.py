"""Checkpoints of small floats as models: packed linears, what they compute, what is saved, compiled, moved, listed."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmq
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.inspection import inspect
from llmq.integrations.transformers import registered
from llmq.runtime.linear import QuantLinear
from llmq.types import FloatParams, LinearSpec, QTensor, Scheme

FLOAT = Path(__file__).parents[1] / "golden" / "float"
IDS = torch.arange(2, 26)[None]
SCHEMES = {
    "nvfp4a16": Scheme(Nvfp4()),
    "nvfp4": Scheme(Nvfp4(), Nvfp4()),
    "mxfp4a16": Scheme(Mxfp4()),
    "mxfp4": Scheme(Mxfp4(), Mxfp4()),
    "mxfp8": Scheme(Mxfp8(), Mxfp8()),
    "fp8 dynamic": Scheme(Fp8(), Fp8()),
    "fp8 static": Scheme(Fp8("tensor"), Fp8("tensor")),
    "fp8 blocks": Scheme(Fp8("32x32"), Fp8("32")),
}
every_scheme = pytest.mark.parametrize("name", SCHEMES)


def solved(W: Tensor, scheme: Scheme) -> QTensor:
    """A weight rounded to nearest; of static inputs, whatever."""
    q = QTensor.rounded(W.float(), scheme.weight)
    if not scheme.static:
        return q
    divisor = torch.tensor([200.0])
    fixed = (
        FloatParams(1 / divisor, None, divisor) if isinstance(scheme.activation, Nvfp4) else FloatParams(1 / divisor)
    )
    return replace(q, input=fixed)


def write(folder: Path, schemes: dict[str, Scheme]) -> tuple[Path, dict[str, Tensor]]:
    """Write the tiny model with its linears as schemes say, by parts of their names; return its decoded weights too."""
    shutil.copytree(FLOAT, folder)
    tensors, decoded, specs, form = load_file(FLOAT / "model.safetensors"), {}, [], CompressedTensors()
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        module, W = name.removesuffix(".weight"), tensors.pop(name)
        scheme = next((s for part, s in schemes.items() if part in module), None)
        if scheme is None:
            tensors[name] = decoded[name] = W
            continue
        spec, q = LinearSpec(module, *W.shape, scheme), solved(W, scheme)
        specs.append(spec)
        tensors |= {f"{module}.{local}": t.contiguous() for local, t in form.pack(q, spec).items()}
        decoded[name] = q.dequantize()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form.config(specs, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder, decoded


@pytest.fixture
def checkpoint(name: str, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    return write(tmp_path / "packed", {"": SCHEMES[name]})


def decibel(found: Tensor, wanted: Tensor) -> float:
    """Return the signal-to-noise ratio."""
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def linears(model: torch.nn.Module) -> list[QuantLinear]:
    return [m for m in model.modules() if isinstance(m, QuantLinear)]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(model: torch.nn.Module, folder: Path) -> bool:
    """Whether a model's state has the packed tensors of a folder, bit for bit."""
    ours, modules = model.state_dict(), {m.spec.name for m in linears(model)}
    theirs = {n: t for n, t in load_file(folder / "model.safetensors").items() if n.rpartition(".")[0] in modules}
    return all(ours[n].dtype == t.dtype and torch.equal(_bits(ours[n]), _bits(t)) for n, t in theirs.items())


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def of_decoded(decoded: dict[str, Tensor]) -> torch.nn.Module:
    """The float model of decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(FLOAT, dtype=torch.float32).eval()
    model.load_state_dict(decoded, strict=False)
    return model


@every_scheme
def test_it_stays_packed_and_computes_what_the_decoded_weights_do(name, checkpoint):
    folder, decoded = checkpoint
    model = llmq.load(folder, dtype=torch.float32, device="cpu")
    assert {m.backend for m in linears(model)} == {"floatloop"}
    exact = llmq.load(folder, dtype=torch.float32, device="cpu", backend="reference")
    assert {m.backend for m in linears(exact)} == {"reference"}
    for linear, packed in zip(linears(exact), linears(model), strict=True):
        assert torch.equal(linear.dequantize(), decoded[f"{linear.spec.name}.weight"])
        assert torch.equal(packed.dequantize(), linear.dequantize())
    if SCHEMES[name].activation is not None:  # an input may fall on the other side of an edge, wide at 4 bits
        assert decibel(logits(model), logits(exact)) > (15 if SCHEMES[name].activation.bits == 4 else 40)
    else:
        torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-3)
        float_model = of_decoded(decoded)
        torch.testing.assert_close(logits(exact), logits(float_model), rtol=0, atol=1e-4)
        tokens = [m.generate(IDS, max_new_tokens=8, do_sample=False) for m in (model, float_model)]
        assert torch.equal(*tokens)


@every_scheme
def test_a_state_dict_is_the_file_in_any_dtype_and_saved_again(name, checkpoint, tmp_path):
    folder, _ = checkpoint
    model = llmq.load(folder, device="cpu")
    assert same(model, folder)
    assert same(copy.deepcopy(model).to(torch.float16), folder)
    model.save_pretrained(tmp_path / "again")
    again = llmq.load(tmp_path / "again", device="cpu")
    assert same(again, folder)
    assert torch.equal(logits(again), logits(model))
    config, kept = (
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (tmp_path / "again", folder)
    )
    assert config == kept


@pytest.mark.parametrize("name", ["nvfp4a16", "fp8 blocks"])
def test_plain_transformers_reads_it_once_registered(name, checkpoint):
    folder, _ = checkpoint
    with registered():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {m.backend for m in linears(model)} == {"floatloop"}
    assert torch.equal(logits(model), logits(llmq.load(folder, dtype=torch.float32, device="cpu")))


@pytest.mark.parametrize("name", ["nvfp4a16", "fp8 dynamic"])
def test_torch_compile(name, checkpoint):
    folder, _ = checkpoint
    model = llmq.load(folder, dtype=torch.float32, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_schemes_and_integers_side_by_side(tmp_path):
    schemes = {"mlp": Scheme(Nvfp4()), "q_proj": Scheme(Fp8(), Fp8()), "v_proj": Scheme(Int(4, True, 32))}
    folder, decoded = write(tmp_path / "mixed", schemes)
    model = llmq.load(folder, dtype=torch.float32, device="cpu")
    found = {m.spec.name.rpartition(".")[2]: m for m in linears(model)}
    assert found.keys() == {"gate_proj", "up_proj", "down_proj", "q_proj", "v_proj"}
    assert {n: m.backend for n, m in found.items()}["q_proj"] == "floatloop"
    for linear in found.values():
        assert torch.equal(linear.dequantize(), decoded[f"{linear.spec.name}.weight"])
    assert same(model, folder)


@pytest.mark.parametrize(
    ("name", "row"), [("nvfp4a16", "4 16 yes float"), ("fp8 static", "8 tensor yes 8 bits, static")]
)
def test_inspect_lists_its_linears(row, checkpoint):
    folder, _ = checkpoint
    table, shown = inspect(str(folder), linears=True)
    rows = [" ".join(map(str, cells)) for cells in zip(*(c.cells for c in shown.columns), strict=True)]
    assert len(rows) == 14
    assert rows[0].endswith(row)
    assert not any("not loaded" in str(cell) for cell in table.columns[0].cells)


def test_what_llmq_cannot_keep_packed_is_decoded_with_a_word(tmp_path, caplog):
    folder, decoded = write(tmp_path / "fp8", {"": SCHEMES["fp8 dynamic"]})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO):
        model = llmq.load(folder, dtype=torch.float32, device="cpu")
    assert not linears(model)
    assert "they are decoded to bfloat16 as they are read" in caplog.text
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], decoded[name], rtol=2**-8, atol=0)
