"""Where and how a checkpoint says that it is packed: every place, auto-round's dialect, what is not read by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llmq
from llmq.checkpoint import Source
from llmq.checkpoint.packed import Packing
from llmq.export._run import export
from llmq.guard.reading import tensor_entries
from llmq.inspection import inspect
from llmq.pipeline.plan import prepare
from llmq.recipe import Recipe
from llmq.runtime.linear import QuantLinear
from llmq.types import LlmqError

GOLDEN = Path(__file__).parents[1] / "golden"
GPTQ, AWQ, CT = (GOLDEN / n for n in ("gptq_v1_w4g32_sym", "awq_w4g32", "ct_pack_w4g32_sym"))
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture
def moved(tmp_path: Path) -> Callable[..., Path]:
    """`moved(folder, change)`: a copy whose config.json `change` has edited, given its quantization_config."""

    def make(folder: Path, change: Callable[[Path, dict[str, Any], dict[str, Any]], None]) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        (copy / "quantize_config.json").unlink(missing_ok=True)
        config = json.loads((copy / "config.json").read_text())
        change(copy, config, config.pop("quantization_config", {}))
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return llmq.load(folder, dtype=torch.float32, device="cpu")(torch.arange(16)[None]).logits


def beside(name: str, spelling: dict[str, str]) -> Callable[[Path, dict, dict], None]:
    def change(folder: Path, config: dict, quantization: dict) -> None:
        said = {spelling.get(k, k): v for k, v in quantization.items() if k != "quant_method"}
        (folder / name).write_text(json.dumps(said))

    return change


def under(key: str) -> Callable[[Path, dict, dict], None]:
    return lambda folder, config, quantization: config.update({key: quantization, "quantization_config": None})


PLACES = {
    "quantize_config.json": (GPTQ, beside("quantize_config.json", {})),
    "quant_config.json": (AWQ, beside("quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"})),
    "compression_config": (CT, under("compression_config")),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_config_may_lie_elsewhere(place: str, moved: Callable[..., Path]) -> None:
    folder, change = PLACES[place]
    copy = moved(folder, change)
    assert torch.equal(logits(copy), logits(folder))
    assert Packing(Source(copy).quantization or {})
    plan = prepare(str(copy), Recipe(method="rtn", group_size=32))
    assert sum(plan.source.decoded["weights"].values()) == 14 and "compression_config" not in plan.model.saved


def test_null_is_a_float_model_whatever_lies_beside_it(moved: Callable[..., Path]) -> None:
    def null(folder: Path, config: dict, quantization: dict) -> None:
        config["quantization_config"] = None
        (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')

    copy = moved(GOLDEN / "float", null)
    assert Source(copy).quantization is None
    assert torch.equal(logits(copy), logits(GOLDEN / "float"))
    with pytest.raises(LlmqError, match="is a float checkpoint"):
        export(str(copy), copy.parent / "x.gguf")


def test_packed_tensors_without_any_config_are_refused(moved: Callable[..., Path]) -> None:
    copy = moved(GPTQ, lambda folder, config, quantization: None)
    for read in (llmq.load, lambda c: export(str(c), c.parent / "x.gguf"), lambda c: list(inspect(str(c)))):
        with pytest.raises(LlmqError, match=r"qweight is packed, but config\.json has no quantization_config"):
            read(copy)


@pytest.mark.parametrize("said", ["gptq", 5, [1], True, ["quant_method"]])
def test_a_config_that_is_no_object_is_refused(said: Any, moved: Callable[..., Path]) -> None:
    copy = moved(GPTQ, lambda folder, config, quantization: config.update(quantization_config=said))
    for read in (llmq.load, lambda c: export(str(c), c.parent / "x.gguf"), lambda c: list(inspect(str(c)))):
        with pytest.raises(LlmqError, match=r"config\.json: quantization_config is .*must be of type dict"):
            read(copy)


@pytest.mark.parametrize("folder", ["auto_round_w4g32_sym", "auto_round_w4g32_asym"])
def test_a_checkpoint_of_auto_round(folder: str, tmp_path: Path) -> None:
    """auto-round writes no g_idx, and zeros of GPTQ's v1 where symmetric, of v2 where not."""
    floats = load_file(GOLDEN / "float" / "model.safetensors")
    model = llmq.load(GOLDEN / folder, dtype=torch.float32, device="cpu")
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            W = floats[f"{name}.weight"].float()
            assert (module.dequantize() - W).norm() / W.norm() < 0.12
            seen += 1
    assert seen == 14
    model.save_pretrained(tmp_path)
    old, new = (load_file(d / "model.safetensors") for d in (GOLDEN / folder, tmp_path))
    packed = [n for n in old if n.endswith(("qweight", "qzeros", "scales"))]
    assert all(torch.equal(old[n], new[n]) for n in packed) and not any(n.endswith("g_idx") for n in new)
    copy = shutil.copytree(GOLDEN / folder, tmp_path / "copy")
    for file in (GOLDEN / "float").glob("tokenizer*"):
        shutil.copy(file, copy)
    done = export(str(copy), tmp_path / "x.gguf", pre="gpt-2")
    assert done["types"].get("Q4_0" if folder.endswith("_sym") else "Q4_1") == 14


AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}


def test_auto_rounds_name_of_awqs_packing_is_awq(moved: Callable[..., Path]) -> None:
    said = AUTO | {"sym": False, "packing_format": "auto_round:auto_awq"}
    copy = moved(AWQ, lambda folder, config, quantization: config.update(quantization_config=said))
    assert torch.equal(logits(copy), logits(AWQ))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_type": "mx_fp", "packing_format": "auto_round:llm_compressor"}, "auto_round:llm_compressor"),
        ({"data_type": "mx_fp"}, "'mx_fp'"),
        ({"packing_format": ["auto_round"]}, "packing_format is"),
        ({"act_bits": 8}, "activations 8"),
        ({"rotation_config": {"type": "hadamard"}}, "rotation_config"),
        ({"extra_config": {NAME: {"bits": 8}}}, "extra_config.*another scheme"),
        ({"extra_config": {NAME: 5}}, "extra_config: .* is 5"),
        ({"extra_config": [NAME]}, "extra_config is"),
        ({"bits": "4"}, "bits is '4'"),
        ({"sym": "true"}, "sym is 'true'"),
    ],
)
def test_what_auto_round_packs_in_another_way_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmqError, match=message) as e:
        Packing(AUTO | change)
    assert "\n" not in str(e.value)
    assert Packing(AUTO | {"extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}})


def test_a_head_is_packed_where_auto_round_says_so() -> None:
    packed = {"lm_head.qweight", f"{NAME}.qweight"}
    for extra, there in (({}, False), ({"lm_head": {"bits": 4}}, True), ({"lm_head": {"bits": 16}}, False)):
        packing = Packing(AUTO | {"extra_config": extra})
        assert packing.linear(NAME, 64, 64, packed) is not None
        assert (packing.linear("lm_head", 64, 64, packed) is not None) is there


def test_other_methods_are_refused_by_name_with_the_remedy(moved: Callable[..., Path]) -> None:
    said = {"quantization_config": {"quant_method": "bitsandbytes"}, "model_type": "of the future"}  # which is second
    copy = moved(GOLDEN / "float", lambda folder, config, quantization: config.update(said))
    for read in (llmq.load, lambda c: export(str(c), c.parent / "x.gguf")):
        with pytest.raises(LlmqError, match=r"bitsandbytes.*quantize the float model again"):
            read(copy)
    (table,) = inspect(str(copy))  # tells why, and goes on
    assert any("llmq reads gptq" in str(cell) for column in table.columns for cell in column.cells)
    for odd in (None, 5, ["gptq"], {}):
        with pytest.raises(LlmqError, match="llmq reads gptq"):
            Packing({"quant_method": odd})


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "mxfp4"])
def test_narrow_floats_are_decoded_but_not_exported(method: str, moved: Callable[..., Path]) -> None:
    said = {"quantization_config": {"quant_method": method}}
    copy = moved(GOLDEN / "float", lambda folder, config, quantization: config.update(said))
    with pytest.raises(LlmqError, match="none is packed"):
        llmq.load(copy)
    with pytest.raises(LlmqError, match=rf"narrow floats \({method}\).*llmq quantize .* OUT --format"):
        export(str(copy), copy.parent / "x.gguf")
    (table,) = inspect(str(copy))
    assert any("none is packed" in str(cell) for column in table.columns for cell in column.cells)


def test_a_gguf_file_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(LlmqError, match="is a GGUF file: llama.cpp runs it, llmq inspect shows it"):
        llmq.load(tmp_path / "x.gguf")


def test_damage_is_refused_at_load_by_either_back_end_and_at_export(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GPTQ, tmp_path / "copy"))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which an export asks for first
        shutil.copyfile(GOLDEN / "float" / name, copy / name)
    data = bytearray((copy / "model.safetensors").read_bytes())
    start = tensor_entries(copy / "model.safetensors")[f"{NAME}.scales"].start
    data[start : start + 2] = b"\x00\x7c"  # float16's infinity
    (copy / "model.safetensors").write_bytes(data)
    for read in (
        lambda: llmq.load(copy, device="cpu"),
        lambda: llmq.load(copy, device="cpu", backend="reference"),
        lambda: export(str(copy), tmp_path / "x.gguf", pre="gpt-2"),
    ):
        with pytest.raises(LlmqError, match=rf"{NAME}\.scales: row 0, group 0 is inf"):
            read()
