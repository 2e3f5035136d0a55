"""The GPU's back-ends of small floats, without one: on CPU tensors, on simulated sm_80 code, on GPUs that are made up.

On CPU tensors the operators go to their references, which shows everything around the kernels; the kernels themselves:
tests/kernels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptxsim.launch import SimulatedKernel

import llmq
from llmq.gpu import refuses_fp8
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.runtime.backends.e4m3 import E4M3
from llmq.runtime.backends.floatloop import FloatLoop
from llmq.runtime.backends.scaled_mm import ScaledMM
from llmq.runtime.backends.triton_e2m1 import TritonE2M1
from llmq.runtime.linear import QuantLinear
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor, Scheme

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SOURCES = {  # back-end, grid, activation, N, K
    "nvfp4": (TritonE2M1, Nvfp4(), None, 40, 208),
    "mxfp4": (TritonE2M1, Mxfp4(), None, 33, 96),
    "mxfp4 inputs": (TritonE2M1, Mxfp4(), Mxfp4(), 33, 96),
    "fp8 channel": (E4M3, Fp8(), None, 33, 70),
    "fp8 tensor": (E4M3, Fp8("tensor", scale_dtype=torch.bfloat16), None, 32, 64),
    "fp8 block": (E4M3, Fp8("128x128"), Fp8("128"), 140, 256),
    "mxfp8": (E4M3, Mxfp8(), Mxfp8(), 24, 96),
    "fp8 token": (ScaledMM, Fp8(), Fp8(), 48, 64),
    "fp8 token, tensor": (ScaledMM, Fp8("tensor"), Fp8(), 48, 64),
}
every_source = pytest.mark.parametrize("name", SOURCES)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let the back-ends for GPUs take CPU tensors."""
    for backend in (TritonE2M1, E4M3, ScaledMM):
        monkeypatch.setattr(backend, "devices", frozenset({"cpu", "cuda"}))


def solved(name):
    """The back-end of a source, its weight and its spec."""
    backend, grid, activation, N, K = SOURCES[name]
    torch.manual_seed(0)
    W = torch.randn(N, K) * torch.logspace(-2, 1, N)[:, None]
    W[3, :64] = 0
    spec = LinearSpec("model.layers.0.mlp.up_proj", N, K, Scheme(grid, activation))
    return backend, QTensor.rounded(W, grid), spec


def same(a, b):
    """Whether two weights have equal tensors of equal dtypes."""
    ours, theirs = ({"codes": q.codes} | q.params.tensors() for q in (a, b))
    alike = all(torch.equal(t, theirs[n]) and t.dtype == theirs[n].dtype for n, t in ours.items())
    return alike and ours.keys() == theirs.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_source
def test_what_it_computes_and_gives_back(name, dtype, decibel):
    backend, q, spec = solved(name)
    assert backend.refuses(spec, CPU) is None
    assert backend.holds(q)
    w = backend(q, spec)
    x = torch.randn(2, 5, spec.K).to(dtype)
    y = w(x)
    assert y.dtype == dtype
    assert y.shape == (2, 5, spec.N)
    activation = spec.scheme.activation
    rounded = x if activation is None else activation.fake_quantize(x)
    exact = rounded.double() @ q.dequantize().double().T
    assert decibel(y, exact) > {torch.float16: 60, torch.bfloat16: 42, torch.float32: 110}[dtype]
    assert same(w.restore(), q)
    assert sum(t.nbytes for t in w.buffers()) >= q.codes.numel() * q.grid.bits // 8


@pytest.mark.parametrize("name", ["fp8 channel", "fp8 block", "mxfp8"])
def test_e4m3_is_decoded_exactly(name):
    backend, q, spec = solved(name)
    w = backend(q, spec)
    assert torch.equal(w.decoded(torch.float32), q.dequantize())
    assert torch.equal(w.decoded(torch.bfloat16), q.dequantize().bfloat16())


@pytest.mark.parametrize("name", ["fp8 token", "fp8 token, tensor"])
def test_a_static_scale_of_the_input(name, decibel):
    backend, q, spec = solved(name)
    static = FloatParams(torch.tensor([0.02]))
    spec = dataclasses.replace(spec, scheme=Scheme(spec.scheme.weight, Fp8("tensor")))
    w = backend(dataclasses.replace(q, input=static), spec)
    x = torch.randn(5, spec.K) * 4
    x_fp8 = (x / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).double() * 0.02
    assert decibel(w(x), x_fp8 @ q.dequantize().double().T) > 110
    assert torch.equal(w.restore().input.scale, static.scale)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_on_simulated_machine_code(name, monkeypatch, decibel):
    from llmq_kernels import e2m1, product

    launches: list = []
    monkeypatch.setattr(product, "runs_on", lambda x: True)
    for module, kernel in ((e2m1, "e2m1_kernel"), (product, "sum_splits_kernel"), (e2m1, "decode_kernel")):
        monkeypatch.setattr(module, kernel, SimulatedKernel(getattr(module, kernel), launches))
    backend, q, spec = solved(name)
    w = backend(q, spec)
    for rows in (3, e2m1.FEW + 1):
        x = torch.randn(rows, spec.K).bfloat16()
        assert decibel(w(x), x.double() @ q.dequantize().double().T) > 48
    assert [launched.name for launched in launches] == ["e2m1_kernel", "decode_kernel"]
    assert not any(launched.run.faults for launched in launches)


GOLDEN = {  # what the library wrote: the back-ends that take it
    "ct_nvfp4": {"triton_e2m1"},
    "ct_mxfp4": {"triton_e2m1"},
    "ct_mxfp8a16": {"e4m3"},
    "ct_fp8_block": {"e4m3"},
    "ct_fp8_dynamic": {"scaled_mm"},
    "ct_fp8_static": {"scaled_mm"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_librarys_checkpoints_load_into_it(name, monkeypatch, decibel):
    monkeypatch.setattr(FloatLoop, "devices", frozenset())
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "not this one")
    folder = Path(__file__).parents[1] / "golden" / name
    want = llmq.load(folder, device="cpu", dtype=torch.float32, backend="reference")
    model = llmq.load(folder, device="cpu", dtype=torch.float32)
    assert {m.backend for m in model.modules() if isinstance(m, QuantLinear)} == GOLDEN[name]
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        assert decibel(model(ids).logits, want(ids).logits) > (15 if "fp4" in name else 40)  # inputs on another edge
    theirs = want.state_dict()
    assert all(torch.equal(t, theirs[k]) for k, t in model.state_dict().items())


REFUSED = {
    "integers": (TritonE2M1, Scheme(Int(4)), 64, 64, "small floats"),
    "8 bits": (TritonE2M1, Scheme(Fp8()), 64, 64, "E2M1 in groups of 16 or 32"),
    "4 bits": (E4M3, Scheme(Nvfp4()), 64, 64, "8 bits"),
    "blocks": (ScaledMM, Scheme(Fp8("128x128"), Fp8("128")), 128, 128, "per channel or tensor"),
    "weights alone": (ScaledMM, Scheme(Fp8()), 64, 64, "FP8 activations"),
    "columns": (ScaledMM, Scheme(Fp8(), Fp8()), 64, 72, "16 does not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why(case):
    backend, scheme, N, K, reason = REFUSED[case]
    assert reason in str(backend.refuses(LinearSpec("x", N, K, scheme), CPU))


def test_none_is_for_another_device():
    for backend, grid in ((TritonE2M1, Nvfp4()), (E4M3, Fp8()), (ScaledMM, Fp8())):
        said = backend.refuses(LinearSpec("x", 64, 64, Scheme(grid)), torch.device("mps"))
        assert "on a GPU, not on mps" in str(said)


GPUS = {
    "sm_80": ({"major": 8, "minor": 0}, None, "GPU X has compute capability 8.0; FP8 products need 8.9"),
    "sm_89": ({"major": 8, "minor": 9}, None, None),
    "gfx942": ({"gcnArchName": "gfx942:sramecc+"}, "7.0", "GPU X is gfx942; torch's FP8 needs gfx950"),
    "gfx950": ({"gcnArchName": "gfx950"}, "7.0", None),
}


@pytest.mark.parametrize("case", GPUS)
def test_the_gpu_is_asked_whether_it_multiplies_fp8(case, monkeypatch):
    found, hip, reason = GPUS[case]
    properties = SimpleNamespace(**({"name": "GPU X", "major": 9, "minor": 0, "gcnArchName": ""} | found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert refuses_fp8(CUDA) == reason
    assert ScaledMM.refuses(LinearSpec("x", 64, 64, Scheme(Fp8(), Fp8())), CUDA) == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU here" in str(refuses_fp8(CUDA))


def test_scales_that_are_no_positive_numbers_are_left_to_the_reference():
    _, q, _ = solved("nvfp4")
    stored = q.params.stored.clone()
    stored[2, 1] |= 0x80
    scale = torch.where(stored > 127, -q.params.scale, q.params.scale)
    assert not TritonE2M1.holds(
        dataclasses.replace(q, params=dataclasses.replace(q.params, stored=stored, scale=scale))
    )


def test_what_a_kernel_cannot_take_is_an_error_for_the_linear():
    backend, q, spec = solved("nvfp4")
    with pytest.raises(LlmqError, match=r"up_proj: .*40 features, the packed weight 208"):
        backend(q, spec)(torch.randn(2, 40).half())


@every_source
def test_torch_compile(name):
    backend, q, spec = solved(name)
    w = backend(q, spec)
    torch._dynamo.reset()
    compiled = torch.compile(w, backend="eager", dynamic=True)
    with torch.no_grad():
        x = torch.randn(3, spec.K)
        torch.testing.assert_close(compiled(x), w(x))
