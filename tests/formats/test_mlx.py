"""MLX: the words of every mode held against `mx.dequantize` bit for bit, and what mlx-lm computes from a folder."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file

import llmq
from llmq.checkpoint import Source
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.export._run import export
from llmq.formats.mlx import MLX
from llmq.grids._biased import Biased, as_integers
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.model.pretrained import blank_model, model_config
from llmq.types import LlmqError, QTensor
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = [[5, 17, 30, 41, 25, 25, 9, 12]]


def to_mlx(t):
    if t.dtype == torch.bfloat16:
        return mx.array(t.float().numpy()).astype(mx.bfloat16)
    return mx.array(t.numpy())


def decoded(tensors, grid, size):
    """Return what mlx makes of a linear's tensors, in float32."""
    weight, scales = (to_mlx(tensors[name]) for name in ("weight", "scales"))
    if "biases" not in tensors:
        mode = type(grid).__name__.lower()
        return np.array(mx.dequantize(weight, scales, group_size=size, bits=grid.bits, mode=mode, dtype=mx.float32))
    scales, biases = scales.astype(mx.float32), to_mlx(tensors["biases"]).astype(mx.float32)
    return np.array(mx.dequantize(weight, scales, biases, size, grid.bits))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (5, 32), (6, 64), (8, 128)])
def test_integers_are_what_mlx_decodes(q_of, spec_of, bits, group, sym):
    grid = Int(bits, sym, group)
    spec, q = spec_of(grid, 64, 256), q_of(grid, 64, 256)
    q = QTensor(
        q.codes, q.params.map(lambda p: p * (-1) ** torch.arange(p.shape[1]) if p.is_floating_point() else p), grid
    )
    tensors = MLX().pack(q, spec)
    back = MLX().unpack(tensors, spec)
    assert {k: (t.dtype, t.shape) for k, t in tensors.items()} == {
        k: (t.dtype, t.shape) for k, t in MLX().layout(spec).items()
    }
    assert torch.equal(back.codes, q.codes) and back.grid == Biased(bits, group)
    assert np.array_equal(back.dequantize().numpy(), decoded(tensors, grid, group))
    found = as_integers(back.params, bits)
    assert torch.equal(found.zero, q.params.zero) and torch.equal(found.scale, q.params.scale)
    exact = torch.equal(back.dequantize(), q.dequantize())
    assert exact or not sym  # a middle zero is a power of two
    rounding = (back.dequantize() - q.dequantize()).abs().reshape(64, -1, group).amax(-1)
    assert (rounding <= 2**-11 * (q.params.zero * q.params.scale.float()).abs() + 1e-6).all()
    assert all(torch.equal(t, MLX().pack(back, spec)[k]) for k, t in tensors.items())


@pytest.mark.parametrize(("grid", "size"), [(Mxfp4(), 32), (Mxfp8(), 32), (Nvfp4(divisor=1.0), 16)])
def test_small_floats_are_what_mlx_decodes(spec_of, grid, size):
    W, spec = torch.randn(64, 128), spec_of(grid, 64, 128)
    q = QTensor.rounded(W, grid)
    tensors = MLX().pack(q, spec)
    back = MLX().unpack(tensors, spec)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.params.scale, q.params.scale)
    assert np.array_equal(back.dequantize().numpy(), decoded(tensors, grid, size))


@pytest.mark.parametrize(
    ("mode", "bits", "size"),
    [
        ("affine", 4, 64),
        ("affine", 3, 32),
        ("affine", 6, 128),
        ("affine", 8, 64),
        ("mxfp4", 4, 32),
        ("mxfp8", 8, 32),
        ("nvfp4", 4, 16),
    ],
)
def test_what_mlx_quantized_is_read_as_mlx_reads_it(spec_of, mode, bits, size):
    W = mx.array(torch.randn(64, 256).numpy())
    weight, scales, *biases = mx.quantize(W, size, bits, mode=mode)
    _, scheme = MLX.read({"group_size": size, "bits": bits, "mode": mode})
    spec = spec_of(scheme("x").weight, 64, 256)
    tensors = {"weight": torch.from_numpy(np.array(weight)), "scales": torch.from_numpy(np.array(scales))}
    tensors |= {"biases": torch.from_numpy(np.array(biases[0]))} if biases else {}
    q = MLX().unpack(tensors, spec)
    wanted = mx.dequantize(weight, scales, *biases, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    wanted = np.array(wanted)
    assert np.array_equal(q.dequantize().numpy(), wanted)
    again = MLX().pack(q, spec)
    assert again.keys() == tensors.keys() and all(torch.equal(t, again[k]) for k, t in tensors.items())


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (Int(7, True, 64), "2, 3, 4, 5, 6 and 8 bits"),
        (Int(4, True, 16), "in groups of 32, 64 and 128"),
        (Int(4, True, "channel"), "per channel"),
        (Nvfp4(), "no divisor beside nvfp4"),
        (Fp8(), "not Fp8"),
    ],
)
def test_what_mlx_does_not_hold_is_refused(spec_of, grid, said):
    with pytest.raises(LlmqError, match=said):
        MLX().check([spec_of(grid, 64, 128)])


def logits_of_mlx(folder):
    model, _ = load_model(folder)
    as_float32 = lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p  # noqa: E731
    model.update(tree_map(as_float32, model.parameters()))
    return torch.from_numpy(np.array(model(mx.array(IDS))))


@pytest.mark.parametrize("name", ["gptq_v1_w3g32", "ct_pack_w4g32_asym", "ct_mixed", "ct_mxfp4"])
def test_mlx_lm_computes_what_llmq_does(tmp_path, name):
    """Of integers of 3 bits, of asymmetric ones, of a mixture, and of small floats."""
    mx.set_default_device(mx.cpu)
    out = tmp_path / "out"
    export(str(GOLDEN / name), out, "mlx")  # verified as it is written
    with torch.no_grad():
        wanted = llmq.load(out, dtype=torch.float32, backend="reference")(torch.tensor(IDS)).logits
    error = (logits_of_mlx(out) - wanted).square().sum() / wanted.square().sum()
    assert error < 1e-10  # 100 dB


def test_a_folder_of_mlx_lm_is_read_verified_and_decoded(tmp_path):
    folder, out = tmp_path / "m", tmp_path / "floats"
    folder.mkdir()
    config = json.loads((GOLDEN / "float" / "config.json").read_text())
    tensors, said = {}, {"group_size": 32, "bits": 4}
    for name, W in load_file(GOLDEN / "float" / "model.safetensors").items():
        if W.dim() < 2 or not name.endswith("_proj.weight"):
            tensors[name] = W
            continue
        bits = 8 if "down_proj" in name else 4
        found = mx.quantize(to_mlx(W.float()), 32, bits)
        module = name.removesuffix(".weight")
        tensors |= {
            f"{module}.{k}": torch.from_numpy(np.array(t))
            for k, t in zip(("weight", "scales", "biases"), found, strict=True)
        }
        if bits == 8:
            said[module] = {"group_size": 32, "bits": 8}
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization": said, "quantization_config": said}))
    report = verify(folder)
    assert report.passed and report.checked["packed linears"] == 14, report.failures
    source = Source(folder)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    llmq.dequantize(folder, out, dtype="float32", warn=print)
    floats = load_file(out / "model.safetensors")
    assert all(torch.equal(floats[f"{n}.weight"], packed.qtensor(n).dequantize()) for n in packed.linears)
    with pytest.raises(LlmqError, match="some of its minima are"):  # mlx's own are no products of their scales
        export(str(folder), tmp_path / "out", "compressed-tensors")


def test_packed_embeddings_are_refused_by_name(tmp_path):
    shutil.copytree(GOLDEN / "gptq_v1_w4g32_sym", tmp_path / "m")
    export(str(tmp_path / "m"), tmp_path / "mlx", "mlx", check=False)
    file = tmp_path / "mlx" / "model.safetensors"
    tensors, name = load_file(file), "model.embed_tokens"
    found = mx.quantize(to_mlx(tensors[f"{name}.weight"].float()), 32, 4)
    for local, t in zip(("weight", "scales", "biases"), found, strict=True):
        tensors[f"{name}.{local}"] = torch.from_numpy(np.array(t))
    save_file(tensors, file, {"format": "mlx"})
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key].pop(name, None)
    (tmp_path / "mlx" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlmqError, match=r"model\.embed_tokens\.weight .* is packed.*llmq dequantize"):
        llmq.load(tmp_path / "mlx")
    record = llmq.dequantize(tmp_path / "mlx", tmp_path / "floats", warn=print)
    assert sum(record["decoded"]["weights"].values()) == 15
