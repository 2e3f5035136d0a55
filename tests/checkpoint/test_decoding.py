"""Quantized sources as floats: what the peers' own decoders make of the peers' own files, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import _narrow
import pytest
import torch
from _families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmq.checkpoint import Source
from llmq.checkpoint.decoding import Decoded, as_floats, rounded_twice
from llmq.checkpoint.names import settle
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.checkpoint.scaled import Scaled
from llmq.guard.reading import Entry
from llmq.model.pretrained import blank_model, model_config
from llmq.types import LlmqError, QTensor

GOLDEN = Path(__file__).parents[1] / "golden"
PACKED = sorted(p.parent.name for p in GOLDEN.glob("*/config.json") if p.parent.name != "float")
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def narrow(tiny_checkpoint) -> Callable[..., Path]:
    """`narrow(kind)`: a tiny Llama in bfloat16 whose linears are packed in that kind."""

    def make(kind: str, **changes: object) -> Path:
        folder = tiny_checkpoint(dtype=torch.bfloat16, **changes)
        _narrow.rewrite(folder, kind)
        return folder

    return make


def decoded(folder: Path, dtype: torch.dtype | None = None) -> Source:
    source = Source(folder)
    source.warnings += as_floats(source, dtype)
    return source


def by_the_peer(stored: Tensors, kind: str) -> Tensor:
    """Decode a linear by compressed-tensors, or by a line where the format's library refuses uneven blocks."""
    if kind.startswith("ct"):
        return _narrow.compressor(kind).decompress(stored, _narrow.scheme(kind))["weight"].bfloat16()
    if kind == "modelopt-nvfp4":
        both = {"weight_packed": stored["weight"], "weight_scale": stored["weight_scale"]}
        codes = by_the_peer(both | {"weight_scale": torch.ones_like(stored["weight_scale"])}, "ct-nvfp4").float()
        scale = stored["weight_scale"].float() * stored["weight_scale_2"]
        return (codes * scale.repeat_interleave(16, 1)).bfloat16()
    (scale,) = (t.float() for n, t in stored.items() if n.startswith("weight_scale"))
    N, K = stored["weight"].shape
    n, k = _narrow.BLOCK if kind == "fp8-block" else (1, K) if kind == "fbgemm" else (N, K)
    rows, columns = (torch.arange(size) // step for size, step in ((N, n), (K, k)))
    return (stored["weight"].float() * scale.reshape(-(-N // n), -1)[rows][:, columns]).bfloat16()


@pytest.mark.parametrize("kind", _narrow.KINDS)
def test_every_weight_is_what_the_peers_decoder_makes_of_it(kind, narrow):
    folder = narrow(kind)
    stored, source = load_file(folder / "model.safetensors"), decoded(folder)
    names = sorted(source.names())
    assert names == sorted({n for n in stored if "_proj." not in n} | {n for n in names if "_proj" in n})
    assert all(n.endswith(".weight") for n in names) and "quantization_config" not in source.config
    for name in names:
        module = name.removesuffix(".weight")
        want = stored[name] if "_proj" not in name else by_the_peer(_locals(stored, module), kind)
        dtype, shape = source.headers()[name]
        assert (dtype, shape, source.sizes()[name]) == ("BF16", tuple(want.shape), want.nbytes)
        assert torch.equal(source.get(name).view(torch.int16), want.view(torch.int16)), name
    assert sum(source.decoded["weights"].values()) == 14 and source.quantization is None
    assert "14 weights as" in source.warnings[0] and "bfloat16" in source.warnings[0] and not rounded_twice(source)


def _locals(stored: Tensors, module: str) -> Tensors:
    return {n.removeprefix(f"{module}."): t for n, t in stored.items() if n.startswith(f"{module}.")}


def test_a_checkpoint_that_does_not_say_that_it_is_narrow_is_told_what_is_missing(narrow, tmp_path):
    folder = narrow("fp8-block")
    _unsay(folder)
    source = Source(folder)
    with pytest.raises(LlmqError, match=r"no place .*_proj\.weight and \S+weight_scale_inv look like FP8.*\"fp8\""):
        settle(source, blank_model(source, model_config(source)))
    FAMILIES["gpt_oss"].save(tmp_path / "oss")
    stored = load_file(tmp_path / "oss/model.safetensors")
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        stored |= {f"{name}{end}": t for end, t in _narrow.gpt_oss(stored.pop(name).mT.contiguous())}
    save_file(stored, tmp_path / "oss/model.safetensors", {"format": "pt"})
    source = Source(tmp_path / "oss")
    with pytest.raises(LlmqError, match=r"is missing.*_proj_scales look like MXFP4.*must have .*mxfp4"):
        settle(source, blank_model(source, model_config(source)))


def _unsay(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def test_fp8_in_even_blocks_is_what_transformers_makes_of_it():
    W = torch.randn(96, 80)
    codes, scale = _narrow._fp8(W, (48, 40))
    want = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(by_the_peer({"weight": codes, "weight_scale_inv": scale}, "fp8-block"), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_experts_of_four_bits_in_an_fp8_checkpoint_are_what_transformers_makes_of_them(dtype, tmp_path):
    stored = _narrow.packed(torch.randn(48, 64), "ct-mxfp4")
    codes, scale = stored["weight_packed"].view(torch.int8), stored["weight_scale"].view(dtype)
    save_file({"e.weight": codes, "e.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    source, want = decoded(tmp_path), Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(source.get("e.weight"), want) and source.decoded["weights"] == {"MXFP4, groups of 32": 1}
    assert str(Scaled("MXFP4", (48, 32), (1, 32))) == "MXFP4, groups of 32"  # though one group fills a row
    assert str(Scaled("FP8", (48, 32), (1, 32))) == "FP8, a scale per row"


@pytest.mark.parametrize("name", PACKED)
def test_what_is_decoded_is_what_a_packed_checkpoint_holds(name):
    source, floats = Source(GOLDEN / name), decoded(GOLDEN / name, torch.float32)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    want = {n: (w.dequantize() if isinstance(w, QTensor) else w) for n, w in packed}
    assert sorted(want) == sorted(floats.names())
    for tensor, W in want.items():
        assert floats.headers()[tensor][1] == tuple(W.shape)
        assert torch.equal(floats.get(tensor), W), tensor
    integers = not re.search("fp8|fp4|floats", name)
    assert ("weights as integers of" in floats.warnings[0]) == integers
    assert ["second error" in line for line in rounded_twice(floats)] == [True] * integers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_decodes_to_what_is_asked_for_else_to_what_config_json_says(dtype, narrow):
    folder = narrow("fp8-block")
    assert decoded(folder, dtype).dtype_of(f"{UP}.weight") == dtype
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    assert decoded(folder).get(f"{UP}.weight").dtype == dtype


def test_a_block_larger_than_any_weight_takes_no_memory(tmp_path):
    W = torch.randn(4, 6).to(torch.float8_e4m3fn)
    save_file({"p.weight": W, "p.weight_scale_inv": torch.tensor([[2.0]])}, tmp_path / "model.safetensors")
    said = {"quant_method": "fp8", "weight_block_size": [2**50, 2**50]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": said}))
    assert torch.equal(decoded(tmp_path, torch.float32).get("p.weight"), 2 * W.float())


@pytest.fixture
def gpt_oss(tmp_path) -> Path:
    """A folder with a fused tensor of three experts as gpt-oss has it, N = 48 and K = 64, beside its bias."""
    experts = dict(_narrow.gpt_oss(torch.randn(3, 48, 64)))
    stored = {f"mlp.experts.gate_up_proj{end}": t for end, t in experts.items()}
    save_file(stored | {"mlp.experts.gate_up_proj_bias": torch.zeros(3, 48)}, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_gpt_oss_is_what_transformers_makes_of_it_and_one_expert_is_read_alone(gpt_oss, monkeypatch):
    stored, source = load_file(gpt_oss / "model.safetensors"), decoded(gpt_oss)
    name = "mlp.experts.gate_up_proj"
    want = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert source.headers()[name] == ("BF16", (3, 64, 48)) and torch.equal(source.get(name), want)
    assert set(source.names()) == {name, f"{name}_bias"}
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    for e in range(3):
        assert torch.equal(source.get_slice(name, e), want[e])
        assert torch.equal(source.get_slice(f"{name}_bias", e), torch.zeros(48))


def test_a_fused_tensor_in_fp8_is_decoded_by_its_matrices(tmp_path):
    W, scale = torch.randn(3, 4, 6).to(torch.float8_e4m3fn), torch.rand(3, 1, 6) + 0.5
    save_file({"e.proj": W, "e.proj_scale": scale}, tmp_path / "model.safetensors")
    config = {"model_type": "llama4", "quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, want = decoded(tmp_path, torch.float32), W.float() * scale
    assert torch.equal(source.get("e.proj"), want) and torch.equal(source.get_slice("e.proj", 1), want[1])
    assert source.decoded["weights"] == {"FP8, a scale per column": 1}


def test_scales_of_activations_and_of_the_cache_are_left_out_with_a_word(narrow):
    folder = narrow("fp8-tensor")
    edit(folder, lambda t: t | {"model.layers.0.self_attn.k_scale": torch.tensor(1.0)})
    source = decoded(folder)
    assert not [n for n in source.names() if "scale" in n] and source.decoded["scales_left_out"] == 15
    assert "15 scales of activations or of a key-value cache" in source.warnings[1]


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file({n: t.contiguous().clone() for n, t in change(load_file(file)).items()}, file)


def one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda t: t | {f"{UP}.{name}": change(t[f"{UP}.{name}"])}


def put(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: v for n, v in t.items() if n != f"{UP}.{name}"}


HEADERS = {
    "no scale": ("fp8-block", without("weight_scale_inv"), "up_proj.weight_scale_inv is missing"),
    "no weight": ("fp8-block", without("weight"), "up_proj.weight_scale_inv (F32) is part of no weight"),
    "a scale too many": ("fp8-block", one("weight_scale_inv", lambda t: t.repeat(2, 1)), "weight_scale_inv is [6, 2]"),
    "an integer scale": ("fp8-block", one("weight_scale_inv", lambda t: t.int()), "weight_scale_inv is I32"),
    "a float weight": ("fp8-block", one("weight", lambda t: t.float()), "weight_scale_inv (F32) is part of no weight"),
    "no rows": ("fbgemm", one("weight", lambda t: t[:0]), "up_proj.weight is [0, 64], no matrix"),
    "two scales": ("fbgemm", lambda t: t | {f"{UP}.weight_scale_inv": t[f"{UP}.weight_scale"]}, "two scales"),
    "no global scale": ("ct-nvfp4", without("weight_global_scale"), "weight_global_scale is missing"),
    "global scales": ("ct-nvfp4", one("weight_global_scale", lambda t: t.repeat(2)), "weight_global_scale is [2]"),
    "rows of scales": ("ct-mxfp4", one("weight_scale", lambda t: t[1:]), "up_proj.weight_scale is [127, 2]"),
    "a zero point": (
        "ct-fp8-channel",
        lambda t: t | {f"{UP}.weight_zero_point": torch.zeros(128, 1, dtype=torch.int8)},
        "weight_zero_point (I8) is part of no weight",
    ),
    "twice": ("ct-mxfp4", lambda t: t | {f"{UP}.weight": torch.zeros(128, 64)}, "up_proj.weight in two forms"),
}
VALUES = {
    "NaN": (
        "fp8-block",
        one("weight_scale_inv", put((1, 0), torch.nan)),
        "weight_scale_inv: the scale at [1, 0] is nan",
    ),
    "inf": ("fbgemm", one("weight_scale", put((5, 0), torch.inf)), "weight_scale: the scale at [5, 0] is inf"),
    "zero": ("fbgemm", one("weight_scale", put((5, 0), 0.0)), "weight_scale holds a scale of 0"),
    "no exponent": ("ct-mxfp4", one("weight_scale", put((3, 1), 255)), "weight_scale: the scale at [3, 1] is nan"),
    "a global zero": ("ct-nvfp4", one("weight_global_scale", put((0,), 0.0)), "weight_global_scale is 0"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_what_does_not_belong_together_is_refused_by_name_before_a_weight_is_read(what, narrow, monkeypatch):
    kind, change, said = HEADERS[what]
    folder = narrow(kind)
    edit(folder, change)
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    with pytest.raises(LlmqError, match=re.escape(said)) as e:
        decoded(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("what", VALUES)
def test_a_scale_that_no_weight_can_have_is_refused_by_name(what, narrow):
    kind, change, said = VALUES[what]
    folder = narrow(kind)
    edit(folder, change)
    source = decoded(folder)
    with pytest.raises(LlmqError, match=re.escape(said)):
        source.check()


def test_a_scale_of_zero_above_zeros_is_one_for_a_group_of_zeros(narrow):
    folder = narrow("fbgemm")
    edit(folder, lambda t: one("weight", put((5,), 0.0))(one("weight_scale", put((5, 0), 0.0))(t)))
    assert not decoded(folder).get(f"{UP}.weight")[5].any()


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"quant_method": "bitsandbytes"}, "is quantized already (bitsandbytes), which llmq does not decode"),
        ({"quant_method": "fp8", "weight_block_size": [128, "x"]}, "a block of weights is [128, 'x']"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "a block of weights is [0, 128]"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "no scale per row, per matrix or per block (64 x 64)"),
    ],
)
def test_a_config_that_is_not_its_tensors_own_is_refused(said, refused, narrow):
    folder = narrow("fp8-block")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(LlmqError, match=re.escape(refused)):
        decoded(folder)


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_weights_that_were_not_rounded_alone_are_refused(key, narrow):
    folder = narrow("ct-nvfp4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {key: {"format": "sparse-24-bitmask", "config_groups": {"R1": {}}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqError, match=f"{key} is set, which llmq does not undo"):
        decoded(folder)


def test_modelopts_config_may_lie_beside(narrow):
    folder = narrow("modelopt-nvfp4")
    want = decoded(folder).get(f"{UP}.weight")
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": said["quant_algo"]}}))
    assert torch.equal(decoded(folder).get(f"{UP}.weight"), want)


def test_a_config_without_packed_weights_is_refused_and_a_float_source_is_left_alone(tiny_checkpoint):
    folder = tiny_checkpoint()
    assert decoded(folder).decoded is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(LlmqError, match="none is packed"):
        decoded(folder)


def test_the_config_of_a_wrappers_text_model_counts(tmp_path):
    shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({"text_config": config, "dtype": "float16"}))
    source = decoded(tmp_path / "m")
    assert "quantization_config" not in source.config["text_config"]
    assert {type(e) for n, e in source.entries().items() if "_proj" in n} == {Decoded}
