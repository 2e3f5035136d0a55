"""Plain `from_pretrained` on the peers' checkpoints, with llmq registered and none of the peers' packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig
from transformers.quantizers import auto

import llmq
from llmq.integrations import transformers as integration
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime.linear import QuantLinear
from llmq.types import LlmqError

GOLDEN = sorted(p.parent for p in (Path(__file__).parents[1] / "golden").glob("[!f]*/logits.safetensors"))  # not float
CT = [p for p in GOLDEN if p.name.startswith("ct_") and "asym" not in p.name]  # asym: not without rounding to bfloat16
IDS = torch.arange(16)[None]
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
Tensors = dict[str, Tensor]


def quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def of_method(method: str) -> Path:
    sample = {"gptq": "gptq_v1_w4g32_desc_act", "awq": "awq_w4g32", "compressed-tensors": "ct_mixed"}
    return Path(__file__).parents[1] / "golden" / sample[method]


def mappings() -> list[list]:
    return [list(m.items()) for m in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)]


@pytest.fixture
def registered() -> Iterator[None]:
    with integration.registered():
        yield


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# Registration


def test_register_replaces_its_methods_and_unregister_puts_them_back():
    before = mappings()
    integration.register()
    try:
        during = mappings()
        for old, new, ours in zip(before, during, (integration.PackedConfig, integration.PackedQuantizer), strict=True):
            was, now = dict(old), dict(new)
            assert [k for k, _ in new if k in was] == [k for k, _ in old]
            assert {k for k, v in new if v is not was.get(k)} == set(integration.METHODS)
            assert now.keys() - was.keys() <= {"modelopt", "mlx"}, "transformers has all methods but these"
            assert all(v is ours for k, v in new if k in integration.METHODS)
        integration.register()
        assert mappings() == during
    finally:
        integration.unregister()
    assert mappings() == before
    integration.unregister()
    assert mappings() == before


def test_registered_restores_the_state_before_it():
    before = mappings()
    with pytest.raises(KeyError), integration.registered():
        assert mappings() != before
        raise KeyError
    assert mappings() == before
    integration.register()
    try:
        during = mappings()
        with integration.registered():
            assert mappings() == during
        assert mappings() == during
    finally:
        integration.unregister()
    assert mappings() == before


def test_an_entry_that_was_absent_is_absent_again(monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "awq")
    before = mappings()
    integration.register()
    assert auto.AUTO_QUANTIZER_MAPPING["awq"] is integration.PackedQuantizer
    integration.unregister()
    assert mappings() == before


# Reading and writing


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_a_peers_checkpoint_is_written_back_byte_for_byte(folder, tmp_path, registered):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    model.save_pretrained(tmp_path)
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert new.keys() == old.keys()
    assert [k for k in old if not same(old[k], new[k])] == []
    assert quantization(tmp_path) == quantization(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(method, device_map, registered):
    folder = of_method(method)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=torch.float32)
    assert torch.equal(logits(model).cpu(), logits(llmq.load(folder, dtype=torch.float32, device="cpu")))


def test_a_block_offloaded_to_disk(tmp_path, registered):
    folder = of_method("gptq")
    places = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers"], "cpu")
    last = json.loads((folder / "config.json").read_text())["num_hidden_layers"] - 1
    del places["model.layers"]
    places |= {f"model.layers.{i}": "disk" if i == last else "cpu" for i in range(last + 1)}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path, offload_buffers=True, dtype=torch.float32
    )
    assert model.get_submodule(f"model.layers.{last}.mlp.up_proj").qweight.device.type == "meta"
    assert {m.backend for m in model.modules() if isinstance(m, QuantLinear)} == {"reference"}  # weights come and go
    whole = llmq.load(folder, dtype=torch.float32, device="cpu", backend="reference")
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("method", SCALES)
def test_generate(method):
    model = llmq.load(of_method(method), dtype=torch.float32, device="cpu")
    tokens = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert tokens.shape == (1, 20)
    with torch.no_grad():
        assert tokens[0, 16] == model(IDS).logits[0, -1].argmax()


@pytest.mark.parametrize("method", SCALES)
def test_a_compiled_model_computes_the_same(method):
    model = llmq.load(of_method(method), dtype=torch.float32, device="cpu")
    want = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), want, rtol=0, atol=1e-5)


def test_packed_tensors_keep_their_dtype_and_floats_take_the_models(registered):
    folder = of_method("gptq")
    stored = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in model.named_modules():
        for local, t in module._buffers.items() if isinstance(module, QuantLinear) else ():
            assert t is None or t.dtype == stored[f"{name}.{local}"].dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_bare_decoder_loads(registered):
    folder = of_method("gptq")
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    whole = llmq.load(folder, dtype=torch.float32, device="cpu")
    assert isinstance(decoder.layers[0].mlp.up_proj, QuantLinear)
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_the_config_object_is_verbatim():
    config = {"quant_method": "gptq", "bits": 4, "meta": {"by": ["someone"]}}
    ours = integration.PackedConfig.from_dict(config)
    assert ours.to_dict() == dict(ours) == config
    assert json.loads(ours.to_json_string()) == config
    ours.to_dict()["meta"]["by"].append("me")
    assert ours.to_dict()["meta"] == {"by": ["someone"]}


def test_it_can_be_saved_but_not_trained():
    quantizer = llmq.load(of_method("awq")).hf_quantizer
    assert quantizer.is_serializable()
    assert not quantizer.is_trainable


# Peers absent, peers present


def test_no_peer_package_is_needed():
    code = (
        "import sys\n"
        "for name in ('compressed_tensors', 'gptqmodel', 'auto_gptq', 'awq', 'optimum'): sys.modules[name] = None\n"
        "import llmq\n"
        "for path in sys.argv[1:]: llmq.load(path, device='cpu')\n"
        "print('loaded')\n"
    )
    one_of_each = {p.name.partition("_")[0]: p for p in GOLDEN}.values()
    command = [sys.executable, "-c", code, *map(str, one_of_each)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "loaded", done.stderr


@pytest.mark.parametrize("folder", CT, ids=lambda p: p.name)
def test_stock_transformers_computes_the_same(folder):
    in_bfloat16 = folder.name in ("ct_nvfp4", "ct_mxfp4", "ct_mxfp8a16", "ct_mixed_floats")  # the library decodes so
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert not any(isinstance(m, QuantLinear) for m in stock.modules())
    ours = llmq.load(folder, dtype=dtype, device="cpu", backend="reference")
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=1e-5)


def test_stock_transformers_reads_a_quantized_head(tiny_checkpoint, tmp_path):
    recipe = Recipe(method="rtn", group_size=32, format="compressed-tensors", lm_head=True)
    quantize(prepare(str(tiny_checkpoint()), recipe, "cpu"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight_packed" in stored and "lm_head.weight" not in stored
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = llmq.load(tmp_path / "out", dtype=torch.float32, device="cpu", backend="reference")
    assert isinstance(ours.lm_head, QuantLinear) and not isinstance(stock.lm_head, QuantLinear)
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.int64])
def test_what_a_peer_left_out_or_stores_wider_is_loaded_and_written_back_as_it_was(dtype, tmp_path, registered):
    """GPTQModel, vLLM and auto-round derive a plain g_idx; some writers store one of 64 bits."""

    def change(tensors: Tensors, config: dict) -> None:
        for name in [n for n in tensors if n.endswith(".g_idx")]:
            g_idx = tensors.pop(name)
            if dtype is not None:
                tensors[name] = g_idx.to(dtype)

    plain = Path(__file__).parents[1] / "golden" / "gptq_v1_w4g32_sym"
    folder = tampered(tmp_path, plain, change)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(llmq.load(plain, dtype=torch.float32, device="cpu")))
    model.save_pretrained(tmp_path / "again")
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    packed = [n for n in old if n.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert [n for n in new if n.endswith("g_idx")] == [n for n in old if n.endswith("g_idx")]
    assert all(same(old[n], new[n]) for n in packed)


# Tampered checkpoints


def tampered(tmp_path: Path, folder: Path, change: Callable[[Tensors, dict], None]) -> Path:
    """A copy of `folder` with its tensors and config changed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


LINEAR = "model.layers.0.self_attn.k_proj"


def drop_scales(method: str, tensors: Tensors, config: dict) -> None:
    del tensors[f"{LINEAR}.{SCALES[method]}"]


def unknown_tensor(method: str, tensors: Tensors, config: dict) -> None:
    tensors[f"{LINEAR}.{SCALES[method]}_2"] = torch.ones(3)


def packed_in_no_linear(method: str, tensors: Tensors, config: dict) -> None:
    tensors[f"model.layers.0.mlp.experts.0.w1.{SCALES[method]}"] = torch.ones(3)


TAMPERINGS = {
    drop_scales: "{linear}.{scales} is missing",
    unknown_tensor: "{linear}.{scales}_2 .* does not know",
    packed_in_no_linear: "experts.0.w1.{scales} (is packed|has no place)",
}


@pytest.mark.parametrize("method", SCALES)  # tests/checkpoint/test_packed.py has all that is refused
@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda f: f.__name__)
def test_tensors_that_disagree_with_the_config_are_refused(method, tamper, tmp_path, registered):
    folder = tampered(tmp_path, of_method(method), lambda t, c: tamper(method, t, c))
    message = TAMPERINGS[tamper].format(linear=LINEAR, scales=SCALES[method])
    for read in (AutoModelForCausalLM.from_pretrained, llmq.load):
        with pytest.raises(LlmqError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_config_for_other_bits_is_refused(tmp_path, registered):
    folder = tampered(tmp_path, of_method("gptq"), lambda t, c: c["quantization_config"].update(bits=8))
    with pytest.raises(LlmqError, match=r"qweight is torch.int32 .*, not torch.int32"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_that_selects_nothing_is_refused(tmp_path, registered):
    folder = of_method("compressed-tensors")
    folder = tampered(tmp_path, folder, lambda t, c: c["quantization_config"].update(ignore=["re:.*"]))
    with pytest.raises(LlmqError, match="selects no linear"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_linear_stored_float_stays_float(tmp_path, registered):
    def change(tensors: Tensors, config: dict) -> None:
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{LINEAR}.{local}")
        tensors[f"{LINEAR}.weight"] = weight

    folder = of_method("gptq")
    weight = llmq.load(folder, device="cpu").get_submodule(LINEAR).dequantize()
    model = llmq.load(tampered(tmp_path, folder, change), dtype=torch.float32, device="cpu", backend="reference")
    assert type(model.get_submodule(LINEAR)) is torch.nn.Linear
    whole = llmq.load(folder, dtype=torch.float32, device="cpu", backend="reference")
    assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("selected", [False, True])
def test_tied_embeddings(selected, tmp_path, registered):
    def tie(tensors: Tensors, config: dict) -> None:
        config["tie_word_embeddings"] = True
        config["quantization_config"]["lm_head"] = selected
        del tensors["lm_head.weight"]

    folder = tampered(tmp_path, of_method("gptq"), tie)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_packed_head_that_is_tied_is_refused(tmp_path, registered):
    def tie(tensors: Tensors, config: dict) -> None:
        config["tie_word_embeddings"] = config["quantization_config"]["lm_head"] = True
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"lm_head.{local}"] = tensors[f"{LINEAR}.{local}"].clone()

    with pytest.raises(LlmqError, match=r"lm_head.* is packed, but config.json ties lm_head"):
        AutoModelForCausalLM.from_pretrained(tampered(tmp_path, of_method("gptq"), tie))


def round_trip(folder: Path, tmp_path: Path) -> tuple[Tensors, Tensors]:
    """The tensors of a checkpoint before and after loading and saving."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    return load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")


def test_a_bias_of_the_file_is_used_and_keeps_its_dtype(tmp_path, registered):
    def change(tensors: Tensors, config: dict) -> None:  # Llama has no bias there, but old writers store one
        N = tensors[f"{LINEAR}.scales"].shape[1]
        tensors[f"{LINEAR}.bias"] = torch.linspace(-1, 1, N).half()

    folder = tampered(tmp_path, of_method("gptq"), change)
    old, new = round_trip(folder, tmp_path)
    assert new.keys() == old.keys()
    assert new[f"{LINEAR}.bias"].dtype == torch.float16
    assert torch.equal(new[f"{LINEAR}.bias"], old[f"{LINEAR}.bias"])
    without = llmq.load(of_method("gptq"), dtype=torch.float32, device="cpu")
    assert not torch.allclose(logits(llmq.load(folder, dtype=torch.float32, device="cpu")), logits(without), atol=1e-3)


def test_static_key_value_scales_survive_a_save(tmp_path, registered):
    def change(tensors: Tensors, config: dict) -> None:
        scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
        config["quantization_config"]["kv_cache_scheme"] = scheme
        for i in range(config["num_hidden_layers"]):
            for local in ("k_scale", "v_scale"):
                tensors[f"model.layers.{i}.self_attn.{local}"] = torch.tensor([0.5 + i], dtype=torch.float32)

    old, new = round_trip(tampered(tmp_path, of_method("compressed-tensors"), change), tmp_path)
    assert new.keys() == old.keys()
    assert all(same(old[k], new[k]) for k in old)


def test_pickled_weights_are_refused(tmp_path, registered):
    folder = shutil.copytree(of_method("gptq"), tmp_path / "copy")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LlmqError, match="safetensors files only"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)


def test_quantizing_while_loading_is_refused(tiny_checkpoint, registered):
    with pytest.raises(LlmqError, match=r"llmq quantize.*unregister"):
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), quantization_config=GPTQConfig(bits=4, dataset=["a"]))
