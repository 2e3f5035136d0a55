"""Every family from end to end: quantized, written under its checkpoint's names, loaded, and better than rounding.

The tiny models are those of scripts/_families.py, whose sliding windows are shorter than the calibration's sequences.
What a written weight means is decoded here by its format alone, laid into the source's own tensors and loaded by
transformers: none of llmq's naming takes part in what it is compared with.
"""

import re
from pathlib import Path

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

GRID = Int(bits=3, sym=True, group=32)
FORMATS = {"gptq": (GPTQ, "qweight"), "compressed-tensors": (CompressedTensors, "weight_packed")}
PACKED = {"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape"}
ALL_EXPERTS = re.compile(
    r"(.+?)(?:\.experts)?\.(input_linear\.weight|output_linear\.weight|gate_up_proj|down_proj)(_bias)?"
)


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
    tensors, found = load_file(out / "model.safetensors"), {}
    for module in (name.rpartition(".")[0] for name in tensors if name.endswith(f".{word}")):
        own = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.rpartition(".")[0] == module}
        N, G = own["weight_scale"].shape if "weight_scale" in own else own["scales"].T.shape
        spec = LinearSpec(module, N, G * GRID.group, Scheme(GRID))
        found[f"{module}.weight"] = form().unpack(own, spec).dequantize()
    return found


def views(name, tensor, how):
    """Return the parts of a tensor that holds all experts of a layer, by the names that llmq writes them under.

    how: `Family.experts`. Of another tensor: itself.
    """
    found = ALL_EXPERTS.fullmatch(name)
    if how == "apart" or not found or not (tensor.dim() == 3 or found[3]):
        return {name: tensor}
    parts = {}
    for e, part in enumerate(tensor):
        rows = part if how == "rows" or found[3] else part.T
        at, leaf = f"{found[1]}.experts.{e}", "bias" if found[3] else "weight"
        if found[2] in ("output_linear.weight", "down_proj"):
            parts[f"{at}.down_proj.{leaf}"] = rows
        else:
            gate, up = (rows[::2], rows[1::2]) if how == "turns" else rows.chunk(2)
            parts |= {f"{at}.gate_proj.{leaf}": gate, f"{at}.up_proj.{leaf}": up}
    return parts


def with_weights(stored, weights, how):
    """Return a checkpoint's tensors with some of their parts replaced."""
    changed = {}
    for name, tensor in stored.items():
        if weights.keys() & views(name, tensor, how).keys():
            changed[name] = tensor.float().clone()
            for n, part in views(name, changed[name], how).items():
                part.copy_(weights.get(n, part))
    return stored | changed


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_quantized_written_and_loaded(name, tmp_path, prose):
    family, (calib, ids) = FAMILIES[name], prose
    kind = "gptq" if family.dtype == torch.float32 else "compressed-tensors"
    src, out = tmp_path / "float", tmp_path / "packed"
    family.save(src)
    said = []
    how = {"bits": GRID.bits, "group_size": GRID.group, "format": kind, "calib": calib}
    llmq.quantize(src, out, **how, samples=16, seq_len=SEQ_LEN, warn=said.append)
    assert not [w for w in said if "alike" in w]

    stored, after = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    before = {n: part for name, tensor in stored.items() for n, part in views(name, tensor, family.experts).items()}
    weights = decoded(out, kind)
    assert weights.keys() <= before.keys() and len(weights) > 6
    kept = {n: t for n, t in after.items() if n.rpartition(".")[2] not in PACKED}
    assert kept.keys() == before.keys() - weights.keys()
    for n, tensor in kept.items():
        assert tensor.dtype == before[n].dtype and torch.equal(tensor, before[n]), n

    rounded = {n: QTensor.rounded(before[n].float().contiguous(), GRID).dequantize() for n in weights}
    truth = logits(load_float(src, stored), ids)
    by_hand = logits(load_float(src, with_weights(stored, weights, family.experts)), ids)
    packed = logits(llmq.load(out, dtype=torch.float32, backend="reference"), ids)
    assert (packed - by_hand).abs().max() <= 1e-4 * by_hand.abs().max()
    assert kl(truth, packed) < 0.9 * kl(
        truth, logits(load_float(src, with_weights(stored, rounded, family.experts)), ids)
    )


def test_the_docs_have_a_row_for_each():
    doc = Path(__file__).parent.parent / "docs" / "models.md"
    assert re.findall(r"^\| (\w+) \|", doc.read_text(), re.MULTILINE) == ["model_type", *FAMILIES]
