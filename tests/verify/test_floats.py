"""Small floats decoded by numpy: what each of llmq's schemes packs comes back, and what is wrong is named."""

import numpy as np
import pytest
import torch

from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.fp8 import Fp8
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.types import FloatParams, LinearSpec, QTensor, Scheme
from llmq.verify.packing import packing
from llmq.verify.report import Report

NAME, N, K = "model.layers.0.mlp.up_proj", 72, 64
SCHEMES = {
    "fp8 tensor": Scheme(Fp8("tensor"), Fp8("tensor")),
    "fp8 channel": Scheme(Fp8("channel"), Fp8("channel")),
    "fp8 block": Scheme(Fp8("32x32"), Fp8(32)),
    "fp8 group": Scheme(Fp8(16)),
    "nvfp4": Scheme(Nvfp4(), Nvfp4()),
    "nvfp4a16": Scheme(Nvfp4()),
    "mxfp4": Scheme(Mxfp4(), Mxfp4()),
    "mxfp8": Scheme(Mxfp8()),
}


def packed(scheme):
    """Return a random linear, its tensors, and how verify reads them."""
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, N)[:, None]
    q, spec, form = QTensor.rounded(W, scheme.weight), LinearSpec(NAME, N, K, scheme), CompressedTensors()
    if scheme.static:
        one = torch.tensor([96.0])
        q = QTensor(
            q.codes, q.params, q.grid, None, FloatParams(one if isinstance(q.grid, Fp8) else 1 / one, None, one)
        )
    return q, form.pack(q, spec), packing(form.config([spec], []))(NAME)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_packed_comes_back(name):
    q, stored, how = packed(SCHEMES[name])
    assert how.tensors(N, K).keys() == stored.keys()
    assert {k: tuple(t.shape) for k, t in stored.items()} == {k: shape for k, (_, shape) in how.tensors(N, K).items()}
    report = Report()
    assert np.array_equal(how.values(stored, NAME, report), q.dequantize().numpy()) and report.passed
    fixed = how.input_scale(stored)
    assert fixed is None if q.input is None else torch.equal(fixed, q.input.scale)


@pytest.mark.parametrize(
    ("name", "local", "byte", "line"),
    [
        ("fp8 channel", "weight", 0xFF, f"{NAME}.weight holds NaN"),
        ("nvfp4", "weight_scale", 0x7F, f"{NAME}.weight_scale: not all scales are finite and above 0"),
        ("nvfp4", "weight_scale", 0xB8, f"{NAME}.weight_scale: not all scales are finite and above 0"),
        ("mxfp4", "weight_scale", 0xFF, f"{NAME}.weight_scale: not all scales are finite and above 0"),
    ],
)
def test_what_is_no_number_is_named(name, local, byte, line):
    _, stored, how = packed(SCHEMES[name])
    stored[local].view(torch.uint8).view(-1)[5] = byte
    report = Report()
    assert how.values(stored, NAME, report) is None and report.failures == [line]


def test_formats_and_strategies_that_are_not_decoded_are_named():
    weights = {"type": "float", "num_bits": 6}
    for change, line in (({"format": "mxfp6-pack-quantized"}, "mxfp6"), ({"format": "float-quantized"}, "attn_head")):
        group = {"targets": ["Linear"], "weights": weights | {"strategy": "attn_head"}} | change
        with pytest.raises(LlmqError, match=line):
            packing({"quant_method": "compressed-tensors", "config_groups": {"g": group}})
