"""Every peer's checkpoint as QTensors: its headers checked before a weight is read, one linear in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmq.checkpoint import Source, source
from llmq.checkpoint.packed import PackedCheckpoint, natural
from llmq.grids.int import Int
from llmq.guard.reading import Entry, tensor_entries
from llmq.model.pretrained import blank_model, model_config
from llmq.types import LlmqError, QTensor

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if p.parent.name != "float")
TOLERANCE = {
    "ct": 2e-5, "ct_int": 0.3, "ct_fp8": 0.7, "ct_mixed_floats": 0.7, "ct_nvfp4": 2.0, "ct_mxfp4": 2.5,
    "gptq": 5e-3, "awq": 1e-2,
}  # fmt: skip
"""By the start of a golden's name, of logits up to 4.6: GPTQModel rounds to float16, int8 activations to 256 values,
FP8 ones to 3 bits, FP4 ones to 1."""
LINEAR, HEAD, NORM = "model.layers.0.self_attn.k_proj", "lm_head", "model.layers.0.input_layernorm"
SCALES = {
    "gptq_v1_w4g32_desc_act": "scales",
    "awq_w4g32": "scales",
    "auto_round_w4g32_asym": "scales",
    "ct_mixed": "weight_scale",
    "ct_int_w8a8_static": "weight_scale",
}
Tensors = dict[str, Tensor]


def opened(folder: Path) -> PackedCheckpoint:
    found = Source(folder)
    return PackedCheckpoint.open(found, blank_model(found, model_config(found)))


@pytest.mark.parametrize("name", FOLDERS)
def test_what_it_yields_is_the_model_that_the_peers_reader_runs(name: str) -> None:
    model = AutoModelForCausalLM.from_config(model_config(Source(GOLDEN / "float"))).float().eval()
    state: Tensors = {}
    for tensor, weight in opened(GOLDEN / name):
        assert isinstance(weight, QTensor) == tensor.endswith("_proj.weight")
        state[tensor] = weight.dequantize() if isinstance(weight, QTensor) else weight.float()
    assert list(state) == sorted(state, key=natural)
    model.load_state_dict(state, strict=True)
    want = GOLDEN / name / "logits.safetensors"
    if not want.exists():
        assert name.startswith("auto_round")
        return
    stored = load_file(want)
    with torch.no_grad():
        got = model(stored["input_ids"]).logits
    atol = TOLERANCE[max((k for k in TOLERANCE if name.startswith(k)), key=len)]
    torch.testing.assert_close(got, stored["logits"], rtol=0, atol=atol)


def test_linears_are_known_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    packed = opened(GOLDEN / "ct_mixed")
    down = packed.linears["model.layers.1.mlp.down_proj"]
    assert (down.N, down.K, down.scheme.weight) == (64, 128, Int(8, True, "channel"))
    assert packed.linears[LINEAR].scheme.weight == Int(4, True, 32)


def test_the_header_of_a_shard_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is each tensor, and of the linears no more than one is held."""
    folder = Path(shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({n: tensors[n] for n, f in where.items() if f == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    opens: list[str] = []
    reads: list[str] = []
    read = Entry.read
    monkeypatch.setattr(source, "tensor_entries", lambda file: opens.append(file.name) or tensor_entries(file))
    monkeypatch.setattr(Entry, "read", lambda entry: reads.append(entry.name) or read(entry))
    held: list[weakref.ref[Tensor]] = []
    for _, weight in opened(folder):
        assert all(codes() is None for codes in held)
        held = [weakref.ref(weight.codes)] if isinstance(weight, QTensor) else []
        del weight
    assert sorted(opens) == sorted(set(where.values())) and sorted(reads) == sorted(tensors)


def test_a_checkpoint_of_the_bare_decoder_has_the_names_of_the_model(tmp_path: Path) -> None:
    """Of many blocks, with a bias that the model has not, and a tensor that nothing reads."""
    folder = Path(shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path / "copy"))
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    stored = {n.removeprefix("model."): t for n, t in tensors.items() if ".layers." not in n}
    for n, t in tensors.items():
        if ".layers.0." in n:
            stored |= {n.removeprefix("model.").replace("layers.0", f"layers.{i}"): t.clone() for i in range(11)}
    stored |= {"layers.10.mlp.up_proj.bias": torch.ones(128), "nothing.reads": torch.ones(1)}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 11}))
    found = dict(opened(folder))
    blocks = [int(n.split(".")[2]) for n in found if ".layers." in n]
    assert blocks == sorted(blocks) and set(blocks) == set(range(11))
    assert isinstance(found["model.layers.10.mlp.up_proj.weight"], QTensor) and "nothing.reads" not in found
    assert torch.equal(found["model.layers.10.mlp.up_proj.bias"], torch.ones(128))


def test_blocks_are_in_their_order_whatever_their_names() -> None:
    names = [f"model.layers.{n}.x" for n in ("2", "10", "9" * 5000)]
    assert sorted(reversed(names), key=natural) == names
    assert len(sorted(["model.layers.\u00b2.x", "", "."], key=natural)) == 3


# What is refused


def drop(name: str) -> Callable[[Tensors, dict, str], Any]:
    return lambda tensors, config, scales: tensors.pop(name.format(scales=scales))


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[Tensors, dict, str], Any]:
    def change(tensors: Tensors, config: dict, scales: str) -> None:
        tensors[name.format(scales=scales)] = make(tensors[f"{LINEAR}.{scales}"]).clone()

    return change


def tie(tensors: Tensors, config: dict, scales: str) -> None:
    said = config["quantization_config"]
    config["tie_word_embeddings"] = said["lm_head"] = True
    said["extra_config"] = {"lm_head": {"bits": 4}}
    for group in said.get("config_groups", {}).values():
        group["targets"] = ["Linear"]
    said["ignore"] = []
    put(f"{HEAD}.{{scales}}", lambda t: t)(tensors, config, scales)
    del tensors[f"{HEAD}.weight"]


def select_nothing(tensors: Tensors, config: dict, scales: str) -> None:
    said = config["quantization_config"]
    said |= {
        "ignore": ["re:.*"],
        "dynamic": {"-:.*": {}},
        "quant_method": said["quant_method"].replace("auto-round", "gptq"),
    }


REFUSALS = {
    "scales that are missing": (drop(f"{LINEAR}.{{scales}}"), f"{LINEAR}.{{scales}} is missing"),
    "scales of another shape": (put(f"{LINEAR}.{{scales}}", lambda t: t[:, :-1]), f"{LINEAR}.{{scales}} is torch"),
    "scales that are integers": (put(f"{LINEAR}.{{scales}}", lambda t: t.long()), f"{LINEAR}.{{scales}} is torch.int"),
    "a bias of another shape": (put(f"{LINEAR}.bias", lambda t: torch.ones(3)), f"{LINEAR}.bias is torch.*, not"),
    "a tensor beside": (put(f"{LINEAR}.{{scales}}_2", lambda t: t), f"{LINEAR}.{{scales}}_2 is a tensor that llmq's"),
    "a packed tensor of a float linear": (put(f"{HEAD}.{{scales}}", lambda t: t), f"{HEAD}.{{scales}} is packed, but"),
    "a packed tensor of no linear": (put(f"{NORM}.{{scales}}", lambda t: t), f"{NORM}.{{scales}} is packed, but"),
    "a packed head that is tied": (tie, f"{HEAD}.{{scales}} is packed, but config.json ties lm_head"),
    "a config that selects nothing": (select_nothing, "selects no linear of LlamaForCausalLM"),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_config_does_not_promise_is_refused_before_a_weight_is_read(
    refusal: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSALS[refusal]
    scales = SCALES[name]
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "copy"))
    (folder / "quantize_config.json").unlink(missing_ok=True)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config, scales)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    with pytest.raises(LlmqError, match=message.format(scales=scales)) as e:
        opened(folder)
    assert "\n" not in str(e.value)


def test_a_float_checkpoint_is_none() -> None:
    with pytest.raises(LlmqError, match=f"^{re.escape(str(GOLDEN / 'float'))} is a float checkpoint"):
        opened(GOLDEN / "float")
