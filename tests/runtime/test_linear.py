"""QuantLinear against plain float arithmetic, and its activation rounding against compressed-tensors."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmq import registry
from llmq.grids.int import Int
from llmq.runtime.linear import QuantLinear
from llmq.types import LinearSpec, Params, QTensor

N, K = 288, 64  # more rows than are decoded at once
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compressed(bits: int, group: int | None, activation: dict | None = None) -> dict:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False} | strategy
    fmt = "int-quantized" if activation else "pack-quantized"
    if activation is not None:
        activation = {"num_bits": 8, "type": "int", "symmetric": True} | activation
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activation}},
        "ignore": ["lm_head"],
    }


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "compressed": compressed(4, 32),
    "w8a8_dynamic": compressed(8, None, {"strategy": "token", "dynamic": True}),
    "w8a8_static": compressed(8, None, {"strategy": "tensor", "dynamic": False}),
}
WEIGHT_ONLY = ["gptq", "awq", "compressed"]


def solved(name: str) -> tuple[QTensor, QuantLinear]:
    """A weight on the grid of a config, and the layer that holds it packed."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    fmt, scheme = registry.find("formats", config["quant_method"]).read(config)
    chosen = scheme("model.layers.0.mlp.up_proj")
    grid, W = chosen.weight, torch.randn(N, K)
    G = grid.granularity.groups(K)
    params = grid.fit(W)
    codes = grid.nearest(W.reshape(N, G, -1), params.map(lambda p: p[..., None])).reshape(N, K).to(torch.uint8)
    static = None
    if chosen.static:
        static = Params(torch.tensor([0.02], dtype=grid.scale_dtype), torch.tensor([128], dtype=torch.int32))
    q = QTensor(codes, params, grid, input=static)
    spec_ = LinearSpec("model.layers.0.mlp.up_proj", N, K, chosen)
    layer = QuantLinear(fmt, spec_, bias=True)
    layer.load_state_dict(fmt.pack(q, spec_) | {"bias": torch.randn(N)}, assign=True)
    return q, layer


@pytest.mark.parametrize("name", CONFIGS)
def test_buffers_are_the_files_tensors(name):
    q, layer = solved(name)
    assert not list(layer.parameters())
    stored = layer.fmt.pack(q, layer.spec)
    assert layer.state_dict().keys() == {*stored, "bias"}
    assert all(torch.equal(layer.state_dict()[local], t) for local, t in stored.items())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_it_is_made_empty_on_a_device_without_or_with_bias(device):
    _, full = solved("gptq")
    stored = full.fmt.layout(full.spec)
    stored["scales"] = stored["scales"].float()
    layer = QuantLinear(full.fmt, full.spec, device=device, stored=stored)
    assert {b.device.type for b in layer.buffers()} == {device}
    assert layer.scales.dtype == torch.float32
    assert layer.qweight.dtype == torch.int32
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    assert (layer.in_features, layer.out_features) == (K, N)
    assert "in_features=64, out_features=288, bias=False, bits=4" in repr(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_forward_is_linear_in_the_decoded_weight(name, dtype):
    q, layer = solved(name)
    W, x = q.dequantize(), torch.randn(2, 5, K).to(dtype)
    assert torch.equal(layer.dequantize(), W)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, F.linear(x, W.to(dtype), layer.bias.to(dtype)))


@pytest.mark.parametrize("name", ["w8a8_dynamic", "w8a8_static"])
def test_w8a8_is_integer_arithmetic_rescaled(name):
    q, layer = solved(name)
    x = torch.randn(2, 5, K)
    scale = torch.tensor(0.02, dtype=q.params.scale.dtype).float()
    if name == "w8a8_dynamic":
        scale = x.abs().amax(-1, keepdim=True) / 127.5
    x_int = (x / scale).round().clamp(-128, 127).long()
    w_int = q.codes.long() - q.params.zero
    want = (x_int @ w_int.T).float() * scale * q.params.scale.float().T + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), F.linear(x, q.dequantize(), layer.bias), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["token", "asymmetric token", "tensor", "asymmetric"])
def test_activation_rounding_has_the_bits_of_compressed_tensors(dtype, case):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as peer
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    torch.manual_seed(0)
    x = (torch.randn(2, 40, 301) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    x[0, 3] = 0
    args = QuantizationArgs(
        num_bits=8,
        type="int",
        symmetric="asymmetric" not in case,
        strategy="token" if "token" in case else "tensor",
        dynamic="token" in case,
    )
    if "token" in case:
        x[0, 4], x[0, 5] = x[0, 4].abs(), -x[0, 5].abs()
        scale, zero = compute_dynamic_scales_and_zp(x, args, None)
        got = Int(8, case == "token", "channel").fake_quantize(x)
    else:
        scale, zero = torch.tensor([0.0371], dtype=dtype), torch.tensor([-7 if case == "asymmetric" else 0])
        got = Int(8, True, "tensor").fake_quantize(x, Params(scale, zero.int() + 128))
    assert got.dtype == dtype
    assert torch.equal(got, peer(x, scale, zero.to(torch.int8), args))


def test_activation_rounding_keeps_zero_and_touches_no_input():
    x = torch.randn(3, K)
    x[1] = 0
    before = x.clone()
    got = Int(8, True, "channel").fake_quantize(x)
    assert torch.equal(x, before)
    assert torch.equal(got[1], torch.zeros(K))
    step = x.abs().amax(-1, keepdim=True) / 127.5
    assert ((got - x).abs() <= step * 1.001).all()
    assert (got - x).abs().max() > 0


def test_a_static_grid_needs_its_scale():
    with pytest.raises(ValueError, match="static"):
        Int(8, True, "tensor").fake_quantize(torch.ones(2, K))


@pytest.mark.parametrize("name", CONFIGS)
def test_casting_a_model_leaves_packed_tensors_alone(name):
    q, layer = solved(name)
    model = torch.nn.Sequential(torch.nn.LayerNorm(K), copy.deepcopy(layer))
    before = {k: (t.dtype, t.clone()) for k, t in model[1].state_dict().items()}
    model.to(torch.bfloat16).half().double().float().bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    for k, t in model[1].state_dict().items():
        assert t.dtype == before[k][0]
        assert torch.equal(t, before[k][1])
    assert torch.equal(model[1].dequantize(), q.dequantize())
    assert {b.device.type for b in model.to("meta").buffers()} == {"meta"}


def test_no_decoded_weight_outlives_a_forward():
    _, layer = solved("gptq")

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) and o.shape == (N, K) for o in gc.get_objects())

    before = alive()
    layer(torch.randn(2, K))
    assert alive() == before
