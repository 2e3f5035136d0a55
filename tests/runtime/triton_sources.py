"""Every source of a weight for the GPU's back-ends, and what they make of it; run as a script, in Triton's interpreter.

As a script, under TRITON_INTERPRET=1, CPU tensors go through the kernels: it prints one JSON object, by source the dB
of the layer against exact products, for float16 and for float32 activations, and whether all came back bit for bit.
"""

from __future__ import annotations

import json

import torch
from conftest import layer_of, make, sqnr

from llmq.formats.awq import AWQ
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int, quantize_activation
from llmq.runtime.backends.triton_w8a8 import TritonW8A8
from llmq.runtime.backends.triton_weight_only import TritonWeightOnly

FP32, BF16 = torch.float32, torch.bfloat16
BY_ROW = Int(8, True, "channel", scale_dtype=BF16)
SOURCES = {  # format, grid, activation, act-order, N, K
    "gptq w4g32": (GPTQ(), Int(4, True, 32), None, False, 96, 192),
    "gptq w4g128": (GPTQ(), Int(4, True, 128), None, False, 64, 256),
    "gptq w4g64 asym": (GPTQ(), Int(4, False, 64), None, False, 96, 192),
    "gptq w4g32 asym act-order": (GPTQ(desc_act=True), Int(4, False, 32), None, True, 96, 192),
    "gptq w4 channel": (GPTQ(), Int(4, True, "channel"), None, False, 160, 96),
    "gptq w2g64": (GPTQ(), Int(2, True, 64), None, False, 96, 192),
    "gptq w3g32 asym": (GPTQ(), Int(3, False, 32), None, False, 96, 192),
    "gptq w8g32 act-order": (GPTQ(desc_act=True), Int(8, True, 32), None, True, 96, 192),
    "awq w4g64 asym": (AWQ(), Int(4, False, 64), None, False, 96, 192),
    "awq w4g32": (AWQ(), Int(4, True, 32), None, False, 40, 64),
    "ct w4g128": (CompressedTensors(), Int(4, True, 128, scale_dtype=BF16), None, False, 33, 256),
    "ct w4g32 asym float32": (CompressedTensors(), Int(4, False, 32, scale_dtype=FP32), None, False, 72, 160),
    "ct w8 channel": (CompressedTensors(), BY_ROW, None, False, 50, 200),
    "ct w8 tensor": (CompressedTensors(), Int(8, True, "tensor", scale_dtype=FP32), None, False, 40, 64),
    "ct w3g96": (CompressedTensors(), Int(3, True, 96), None, False, 40, 192),
    "ct w5g64": (CompressedTensors(), Int(5, True, 64, scale_dtype=BF16), None, False, 48, 128),
    "ct w6 asym channel": (CompressedTensors(), Int(6, False, "channel"), None, False, 40, 160),
    "ct w8a8 per token": (CompressedTensors(), BY_ROW, Int(8, True, "channel"), False, 50, 200),
    "ct w8a8 static": (CompressedTensors(), Int(8, True, "channel"), Int(8, True, "tensor"), False, 64, 128),
}


def layer(name):
    """Return the layer of a source with a bias, on the reference, and its QTensor."""
    fmt, grid, activation, act_order, N, K = SOURCES[name]
    q, spec = make(N, K, grid, activation, act_order)
    torch.manual_seed(0)  # of the bias
    return layer_of(q, spec, fmt, bias=True), q


def exact(linear, q, x):
    """Return what `linear` has to compute, in float64."""
    activation = linear.spec.scheme.activation
    y = x.double()
    if activation is not None:
        integers, scale, _ = quantize_activation(x, activation, q.input)
        y = integers.double() * scale.double()
    return y @ q.dequantize().double().T + linear.bias.double()


def same(a, b):
    """Return whether two QTensors agree in every bit and dtype."""
    pairs = [(a.codes, b.codes), (a.params.scale, b.params.scale), (a.params.zero, b.params.zero)]
    pairs += [(a.g_idx, b.g_idx)] if b.g_idx is not None else []
    pairs += [(a.input.scale, b.input.scale), (a.input.zero, b.input.zero)] if b.input is not None else []
    kinds = (a.g_idx is None) == (b.g_idx is None) and (a.input is None) == (b.input is None) and a.grid == b.grid
    return kinds and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def report(name):
    """Run one source through `prepack`, `forward` and back."""
    linear, q = layer(name)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    linear.prepack()
    draw = torch.Generator().manual_seed(1)
    few = torch.randn(2, 2, linear.in_features, generator=draw) * torch.tensor([1.0, 8.0])[:, None, None]
    many = torch.randn(1, 21, linear.in_features, generator=draw)
    after = linear.state_dict()
    wide = few * 1e5  # float32 beyond what float16 holds
    return {
        "backend": linear.backend,
        "float16": sqnr(linear(few.half()), exact(linear, q, few.half())),
        "float16, many rows": sqnr(linear(many.half()), exact(linear, q, many.half())),
        "float32": sqnr(linear(wide), exact(linear, q, wide)),
        "dtypes": [str(linear(few.to(t)).dtype) for t in (torch.float16, FP32)],
        "shape": list(linear(few).shape) == [2, 2, linear.out_features],
        "restored": same(linear.prepacked.restore(), q),
        "file": all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items()),
    }


if __name__ == "__main__":
    TritonWeightOnly.devices = TritonW8A8.devices = frozenset({"cpu"})
    print(json.dumps({name: report(name) for name in SOURCES}))
