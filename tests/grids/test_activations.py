"""Activations on small floats: compressed-tensors' own results to the bit, and what calibration fixes of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.grids.fp8 import Fp8
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.histogram import Histogram
from llmq.pipeline.activations import static_input
from llmq.ranges.mse import Mse
from llmq.ranges.percentile import Percentile
from llmq.types import FloatParams, Scheme

GOLDEN = load_file(Path(__file__).parents[1] / "golden/activations.safetensors")
GRIDS = {
    "FP8_DYNAMIC": Fp8(), "FP8": Fp8("tensor"), "FP8_BLOCK": Fp8(128), "NVFP4": Nvfp4(), "MXFP4": Mxfp4(),
    "MXFP8": Mxfp8(),
}  # fmt: skip


def fixed(name, dtype):
    value = GOLDEN.get(f"fixed.{name}.{dtype}")
    if value is None:
        return None
    return FloatParams(1 / value, None, value) if name == "NVFP4" else FloatParams(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", GRIDS)
def test_what_runs_is_what_compressed_tensors_computes_to_the_bit(name, dtype):
    x = GOLDEN[f"x.{dtype}"]
    got = GRIDS[name].fake_quantize(x, fixed(name, dtype))
    assert got.dtype == x.dtype and torch.equal(got, GOLDEN[f"{name}.{dtype}"])
    alone = torch.cat([GRIDS[name].fake_quantize(row, fixed(name, dtype)) for row in x[0].split(1)])
    assert torch.equal(alone, got[0]), "a token is rounded as if it were alone"


def test_scales_and_codes_are_what_a_kernel_multiplies():
    x = torch.randn(5, 64)
    bits, scale = Fp8().quantize_activation(x)
    assert bits.shape == (5, 1, 64) and bits.dtype == torch.uint8 and scale.shape == (5, 1, 1)
    assert torch.equal((bits.view(torch.float8_e4m3fn).float() * scale).flatten(1), Fp8().fake_quantize(x))


def histogram(X_TK):
    return collect((Histogram,), [X_TK], Dealt.of([len(X_TK)]))[Histogram]


def test_the_static_scale_of_fp8_covers_what_its_range_says():
    X_TK = torch.randn(4000, 16)
    X_TK[0, 0] = -100
    inputs, line = static_input(Fp8("tensor"), histogram(X_TK))
    assert inputs.scale.shape == (1,) and inputs.scale.item() == pytest.approx(100 / 448) and line == {}
    inputs, line = static_input(Fp8("tensor", Percentile(99)), histogram(X_TK))
    assert inputs.scale.item() == pytest.approx(2.576 / 448, rel=0.1) and 0.002 < line["input_clipped"] < 0.02
    searched, _ = static_input(Fp8("tensor", Mse()), histogram(X_TK))

    def error(params):
        return (Fp8("tensor").fake_quantize(X_TK, params) - X_TK).square().sum()

    assert error(searched) <= error(static_input(Fp8("tensor"), histogram(X_TK))[0])


def test_the_divisor_of_nvfp4_inputs_is_that_of_the_largest_value():
    X_TK = torch.randn(100, 32)
    inputs, line = static_input(Nvfp4(), histogram(X_TK))
    assert inputs.divisor.item() == pytest.approx(448 * 6 / X_TK.abs().max().item()) and line == {}
    assert inputs.scale.item() == pytest.approx(1 / inputs.divisor.item())
    error = (Nvfp4().fake_quantize(X_TK, inputs) - X_TK).norm() / X_TK.norm()
    assert error < 0.12
    zeros, _ = static_input(Nvfp4(), histogram(torch.zeros(3, 32)))
    assert torch.equal(Nvfp4().fake_quantize(torch.zeros(3, 32), zeros), torch.zeros(3, 32))


def test_which_grids_of_inputs_calibration_fixes():
    static = [Scheme(Fp8(), g).static for g in (Fp8(), Fp8("tensor"), Fp8(128), Nvfp4(), Mxfp4(), Mxfp8(), None)]
    assert static == [False, True, False, True, False, False, False]
    for grid in (Fp8("tensor"), Nvfp4()):
        with pytest.raises(ValueError, match="calibration chose"):
            grid.fake_quantize(torch.ones(2, 32))
