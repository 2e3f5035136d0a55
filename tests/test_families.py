"""Every family from end to end: quantized, written under its checkpoint's names, loaded, and better than rounding.

The tiny models are those of scripts/_families.py, whose sliding windows are shorter than the calibration's sequences.
What a written weight means is decoded here by its format alone, laid into the source's own tensors and loaded by
transformers: none of llmq's naming takes part in what it is compared with.
"""

import pytest
import torch
from _families import FAMILIES, SEQ_LEN, load_float
from _tiny import make_prose, make_tokenizer
from safetensors.torch import load_file

import llmq
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.types import LinearSpec, QTensor, Scheme

BITS, GROUP = 3, 32
FORMATS = {"gptq": (GPTQ, "qweight"), "compressed-tensors": (CompressedTensors, "weight_packed")}
PACKED = {"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape"}
NOT_YET = {
    "ministral", "gemma2", "gemma3_text", "gemma4_text", "olmo3", "exaone4", "phi3", "cohere2", "starcoder2",
    "falcon", "nemotron",
    "qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "nemotron_h", "granitemoehybrid",
    "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "granitemoe", "minimax_m2", "gpt_oss", "llama4_text",
    "gemma3", "gemma4", "qwen3_5", "mistral3", "qwen3_vl", "qwen2_5_vl",
}  # fmt: skip


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A text to calibrate on, and token ids of another one, int64 `[8, SEQ_LEN]`."""
    file = tmp_path_factory.mktemp("prose") / "calib.txt"
    file.write_text(make_prose(1500))
    ids = make_tokenizer(bos=False)(make_prose(600, seed=1))["input_ids"]
    return file, torch.tensor(ids[: 8 * SEQ_LEN]).reshape(8, SEQ_LEN)


def decoded(out, kind):
    """Return the quantized weights of a written checkpoint, float32, by the names that they have in a float one."""
    form, word = FORMATS[kind]
    tensors = load_file(out / "model.safetensors")
    grid, found = Int(BITS, True, GROUP), {}
    for name in tensors:
        module, _, local = name.rpartition(".")
        if local == word:
            own = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == module}
            (N, G) = own["weight_scale"].shape if "weight_scale" in own else own["scales"].T.shape
            spec = LinearSpec(module, N, G * GROUP, Scheme(grid))
            found[f"{module}.weight"] = form().unpack(own, spec).dequantize()
    return found


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NOT_YET])
def test_a_family_is_quantized_written_and_loaded(name, tmp_path, prose):
    family, (calib, ids) = FAMILIES[name], prose
    kind = "gptq" if family.dtype == torch.float32 else "compressed-tensors"
    src, out = tmp_path / "float", tmp_path / "packed"
    family.save(src)
    said = []
    how = {"bits": BITS, "group_size": GROUP, "format": kind, "samples": 16, "seq_len": SEQ_LEN, "calib": calib}
    llmq.quantize(src, out, **how, warn=said.append)
    assert not [w for w in said if "alike" in w]

    before, after = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    weights = decoded(out, kind)
    assert weights.keys() <= before.keys() and len(weights) > 6
    kept = {n: t for n, t in after.items() if n.rpartition(".")[2] not in PACKED}
    assert kept.keys() == before.keys() - weights.keys()
    for n, tensor in kept.items():
        assert tensor.dtype == before[n].dtype and torch.equal(tensor, before[n]), n

    rounded = {n: QTensor.rounded(before[n].float(), Int(BITS, True, GROUP)).dequantize() for n in weights}
    truth = logits(load_float(src), ids)
    by_hand = logits(load_float(src, weights), ids)
    packed = logits(llmq.load(out, dtype=torch.float32, backend="reference"), ids)
    assert (packed - by_hand).abs().max() <= 1e-4 * by_hand.abs().max()
    assert kl(truth, packed) < 0.9 * kl(truth, logits(load_float(src, rounded), ids))
