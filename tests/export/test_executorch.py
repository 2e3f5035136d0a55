"""What XNNPACK does not compute with is refused before any work; scripts/interop.sh runs what is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmq.export import executorch
from llmq.export._run import export
from llmq.export._target import open_packed
from llmq.grids.int import Int
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme

GOLDEN = Path(__file__).parents[1] / "golden"


def test_without_the_packages_the_way_to_them_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"pip install 'llmq-quant\[executorch\]'"):
        export(str(GOLDEN / "ct_pack_w4g32_sym"), tmp_path / "out", to="executorch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [("ct_pack_w4g32_asym", "symmetric integers of 4 bits"), ("ct_pack_w3g32", "symmetric integers of 4 bits"),
     ("ct_fp8_static", "symmetric integers of 4 bits"), ("gptq_v1_w4_perchannel", "groups of a multiple of 32"),
     ("ct_int_w8a8_static", "symmetric integers of 4 bits")],
)  # fmt: skip
def test_other_grids_are_refused_with_what_to_do(name, said):
    with pytest.raises(LlmqError, match=f"model.layers.0.* XNNPACK computes with {said}.*--for executorch"):
        executorch.ExecuTorch().check(open_packed(str(GOLDEN / name)))


def test_inputs_by_scales_of_the_checkpoint_are_refused():
    four, eight = Int(4, True, 32), Int(8, True, "tensor")
    assert executorch.obstacle(LinearSpec("x", 8, 64, Scheme(four))) is None
    assert "inputs that it rounds itself" in str(executorch.obstacle(LinearSpec("x", 8, 64, Scheme(four, eight))))


def test_scales_that_bfloat16_does_not_hold_are_refused_and_others_kept():
    q = QTensor.rounded(torch.randn(8, 64), Int(4, True, 32, "minmax"))
    with pytest.raises(LlmqError, match="x: XNNPACK rounds scales to bfloat16, and 1. are none"):
        executorch.levels("x", q)
    exact = replace(q, params=replace(q.params, scale=q.params.scale.bfloat16()))
    codes, scale = executorch.levels("x", exact)
    assert torch.equal(codes.float() * scale.repeat_interleave(32, 1), exact.dequantize())
    with pytest.raises(LlmqError, match="activation order"):
        executorch.levels("x", replace(exact, g_idx=torch.randperm(64) // 32))


def test_negative_scales_are_refused_by_name(monkeypatch):
    opened = open_packed(str(GOLDEN / "ct_pack_w4g32_sym"))
    name = next(iter(opened.packed.linears))
    falling = opened.packed.qtensor(name)
    falling = replace(falling, params=replace(falling.params, scale=-falling.params.scale))
    monkeypatch.setattr(opened.packed, "qtensor", lambda _: falling)
    with pytest.raises(LlmqError, match=f"{name}: .* scales are negative, which XNNPACK does not hold.*shift=false"):
        executorch.ExecuTorch().refuse_falling(opened)
