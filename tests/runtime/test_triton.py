"""The back-ends for GPUs, without one: in Triton's interpreter, on simulated sm_80 code, on CPU and fake tensors.

In the interpreter and on the simulated GPU the kernels run; plain CPU tensors go to the operators' own references,
which shows everything around the kernels in every dtype. What refuses a GPU is asked of GPUs that are made up.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ptxsim.launch import SimulatedKernel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import llmq
from llmq import gpu
from llmq.formats.gptq import GPTQ
from llmq.grids.int import Int
from llmq.runtime import backends
from llmq.runtime.backends.triton_w8a8 import TritonW8A8
from llmq.runtime.backends.triton_weight_only import TritonWeightOnly
from llmq.runtime.linear import QuantLinear
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
try:
    import triton_sources as sources
finally:
    sys.path.remove(str(HERE))

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GOLDEN = sorted(p.parent for p in (HERE.parent / "golden").glob("[!f]*/logits.safetensors"))  # not float
GOLDEN = [p for p in GOLDEN if "fp" not in p.name and "floats" not in p.name]
FP16_DB = 66
"""One rounding to float16 leaves 73 dB, and the sum with the bias is rounded once more; 67 was the least measured."""
FLOAT32_DB = 69
"""float32 activations of which 11 bits are kept, by the least; nothing else is rounded."""
INT8_DB = 120


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the back-ends for GPUs take CPU tensors."""
    for backend in (TritonWeightOnly, TritonW8A8):
        monkeypatch.setattr(backend, "devices", frozenset({"cpu"}))


@pytest.fixture(scope="module")
def interpreted():
    """What the layers of all sources give when their kernels run in Triton's interpreter."""
    root = HERE.parents[1]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    script = HERE / "triton_sources.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sources.SOURCES)
def test_in_the_interpreter_every_source_computes_what_it_holds(name, interpreted):
    found = interpreted[name]
    w8a8 = "w8a8" in name
    assert found["backend"] == ("triton_w8a8" if w8a8 else "triton_weight_only")
    assert found["restored"]
    assert found["file"]
    assert found["shape"]
    assert found["dtypes"] == ["torch.float16", "torch.float32"]
    assert FP16_DB < found["float16"] < 200
    assert FP16_DB < found["float16, many rows"] < 200
    assert (INT8_DB if w8a8 else FLOAT32_DB) < found["float32"] < 200


SIMULATED = {
    "gptq w4g32 asym act-order": torch.bfloat16,
    "ct w8 channel": torch.float32,
    "ct w8a8 static": torch.bfloat16,
    "ct w8a8 per token": torch.float32,
}


@pytest.mark.parametrize("name", SIMULATED)
def test_on_simulated_machine_code(name, on_cpu, monkeypatch, decibel):
    """bfloat16, which the interpreter cannot do, and float32: compiled for sm_80 and executed."""
    from llmq_kernels import activation, int8, product, weight_only

    launches: list = []
    for module in (product, int8):
        monkeypatch.setattr(module, "runs_on", lambda x: True)
    for module, kernels in (
        (weight_only, ("weight_only_kernel",)),
        (product, ("sum_splits_kernel",)),
        (activation, ("quantize_kernel",)),
        (int8, ("int8_kernel", "sum_int32_kernel")),
    ):
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, SimulatedKernel(getattr(module, kernel), launches))
    linear, q = sources.layer(name)
    linear.prepack()
    dtype = SIMULATED[name]
    x = torch.randn(1, 3, linear.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert len(launches) == (2 if "w8a8" in name else 1)
    assert not any(launched.run.faults for launched in launches)
    found = decibel(y, sources.exact(linear, q, x))
    bound = {torch.bfloat16: 48, torch.float32: INT8_DB if "w8a8" in name else FLOAT32_DB}[dtype]
    assert bound < found < 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sources.SOURCES)
def test_around_the_kernels_every_dtype_and_source(name, dtype, on_cpu, decibel):
    linear, q = sources.layer(name)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    linear.prepack()
    assert linear.backend.startswith("triton")
    x = torch.randn(2, 3, linear.in_features, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    bound = {torch.float16: FP16_DB, torch.bfloat16: 48, torch.float32: 85}[dtype]  # 85: scales cut by their zeros
    assert decibel(y, sources.exact(linear, q, x)) > bound
    assert linear(x[:0]).shape == (0, 3, linear.out_features)
    for other in (linear, copy.deepcopy(linear).to(torch.float16)):
        after = other.state_dict()
        assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items() if k != "bias")
        assert sources.same(other.prepacked.restore(), q)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
def test_the_peers_checkpoints_load_into_it(folder, on_cpu):
    want = llmq.load(folder, device="cpu", dtype=torch.float32, backend="reference")
    model = llmq.load(folder, device="cpu", dtype=torch.float32)
    found = {m.backend for m in model.modules() if isinstance(m, QuantLinear)}
    assert found <= {"triton_weight_only", "triton_w8a8"}
    ids = torch.arange(2, 26)[None]
    room = 0.1 if "w8a8" in folder.name else 1e-3  # an activation may fall on the other side of a rounding edge
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want(ids).logits, rtol=0, atol=room)
    theirs = want.state_dict()
    assert all(torch.equal(t, theirs[k]) for k, t in model.state_dict().items())


def spec(grid, activation=None, N=64, K=128):
    return LinearSpec("model.layers.0.mlp.up_proj", N, K, Scheme(grid, activation))


W4, W8 = Int(4, True, 32), Int(8, True, "channel")
REFUSED = {  # back-end, spec, device, reason
    "cpu": (TritonWeightOnly, spec(W4), CPU, "on a GPU, not on cpu"),
    "mps": (TritonW8A8, spec(W8, Int(8, True, "channel")), torch.device("mps"), "on a GPU, not on mps"),
    "group 16": (TritonWeightOnly, spec(Int(4, True, 16)), CUDA, "32 does not divide the group size 16"),
    "group and K": (TritonWeightOnly, spec(Int(4, True, 96)), CUDA, "96 does not divide K = 128"),
    "8-bit activations": (TritonWeightOnly, spec(W8, Int(8, True, "channel")), CUDA, "float activations"),
    "zero points": (TritonW8A8, spec(W8, Int(8, False, "channel")), CUDA, "symmetric activations"),
    "float activations": (TritonW8A8, spec(W8), CUDA, "8-bit activations"),
    "4-bit W8A8": (TritonW8A8, spec(Int(4, True, "channel"), Int(8, True, "channel")), CUDA, "symmetric 8-bit"),
    "K": (TritonW8A8, spec(W8, Int(8, True, "channel"), K=131072), CUDA, "int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why(case):
    backend, linear, device, reason = REFUSED[case]
    assert reason in str(backend.refuses(linear, device))


def gpu_of(monkeypatch, *, available=True, hip=None, **found):
    """Make up a GPU."""
    properties = SimpleNamespace(**({"name": "GPU X", "major": 9, "minor": 0, "gcnArchName": ""} | found))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)


GPUS = {
    "none": ({"available": False}, "no GPU here"),
    "sm_75": ({"major": 7, "minor": 5}, "GPU X has compute capability 7.5; the kernels need 8.0"),
    "gfx1100": ({"hip": "7.0", "gcnArchName": "gfx1100"}, "GPU X is gfx1100; the kernels are made for gfx90a, gfx942"),
    "sm_80": ({"major": 8}, None),
    "gfx942": ({"hip": "7.0", "gcnArchName": "gfx942:sramecc+:xnack-"}, None),
}


@pytest.mark.parametrize("case", GPUS)
def test_the_gpu_is_asked_what_it_can_do(case, monkeypatch):
    found, reason = GPUS[case]
    gpu_of(monkeypatch, **found)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    for backend, linear in ((TritonWeightOnly, spec(W4)), (TritonW8A8, spec(W8, Int(8, True, "channel")))):
        said = backend.refuses(linear, CUDA)
        assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize("missing", ["triton", "llmq_kernels"])
def test_a_missing_package_is_named(missing, monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"{missing} is not installed: pip install" in str(TritonWeightOnly.refuses(spec(W4), CUDA))


def test_a_missing_compiler_is_named(monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert "install gcc" in str(TritonWeightOnly.refuses(spec(W4), CUDA))


def test_values_that_no_kernel_holds_are_left_to_others(on_cpu, solved, layer, decibel):
    q, linear = solved(64, 128, Int(4, False, 64))
    uneven = QTensor(q.codes, q.params, q.grid, torch.tensor([0] * 65 + [1] * 63, dtype=torch.int32))
    assert TritonWeightOnly.holds(q)
    assert not TritonWeightOnly.holds(uneven)
    q.params.zero[3, 1] = 16
    assert not TritonWeightOnly.holds(q)
    w8a8, _ = solved(64, 128, W8, Int(8, True, "channel"))
    assert TritonW8A8.holds(w8a8)
    w8a8.params.zero[3] = 127
    assert not TritonW8A8.holds(w8a8)
    with pytest.raises(LlmqError, match=r"up_proj: g_idx does not put 64 columns"):
        TritonWeightOnly(uneven, linear)


def test_what_runs_the_reference_on_a_gpu_is_logged_once_with_its_reason(caplog, monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.setattr(backends, "_warned", set())
    q = SimpleNamespace(codes=SimpleNamespace(device=CUDA))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert backends.choose(spec(Int(4, True, 16)), q) is None
    (record,) = caplog.records
    assert "layers.0.mlp.up_proj" in record.getMessage()
    assert "group size 16" in record.getMessage()
    assert "int4pack" not in record.getMessage()
    with caplog.at_level(logging.WARNING):
        assert backends.choose(spec(Int(3, True, 16)), SimpleNamespace(codes=SimpleNamespace(device=CPU))) is None
    assert len(caplog.records) == 1
    assert backends.why_reference(spec(W4), torch.device("mps")) == "none is for mps"


@pytest.mark.parametrize("name", ["gptq w4g64 asym", "ct w8a8 per token"])
def test_what_a_kernel_cannot_take_is_an_error_for_the_linear(name, on_cpu, monkeypatch):
    from llmq_kernels import int8, product

    for module in (int8, product):
        monkeypatch.setattr(module, "runs_on", lambda x: True)
    linear, _ = sources.layer(name)
    linear.prepack()
    with pytest.raises(LlmqError, match=r"up_proj: .*40 features, the packed weight .*backend='reference'") as caught:
        linear(torch.randn(2, 40).half())
    assert "\n" not in str(caught.value)
    with pytest.raises(LlmqError, match=r"up_proj: .*float64.*load the model with dtype=torch.bfloat16"):
        linear(torch.zeros(2, linear.in_features, dtype=torch.float64))


@pytest.mark.parametrize("name", ["gptq w4g32 asym act-order", "ct w3g96", "ct w8a8 static"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(name, backend, on_cpu):
    linear, _ = sources.layer(name)
    linear.prepack()
    torch._dynamo.reset()
    compiled = torch.compile(linear, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 70):
            x = torch.randn(rows, linear.in_features, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("name", sources.SOURCES)
def test_fake_tensors_on_a_gpu_pass_through(name, on_cpu):
    linear, _ = sources.layer(name)
    linear.prepack()
    mode = FakeTensorMode()

    def fake(t):
        return FakeTensor(mode, t.to("meta"), torch.device("cuda:0"))

    moved = copy.deepcopy(linear)
    for module in (moved, moved.prepacked):
        for local, t in list(module.named_buffers(recurse=False)):
            module._buffers[local] = fake(t)
    with mode:
        y = moved(fake(torch.empty(2, 5, linear.in_features, dtype=torch.bfloat16)))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, linear.out_features), torch.bfloat16, "cuda")


def test_a_move_to_another_kind_of_device_prepacks_anew(solved, layer):
    linear = layer(*solved(64, 128, Int(4, True, 32)), GPTQ(), bias=True)
    linear.prepack()
    first, x = linear.prepacked, torch.randn(3, 128)
    want, before = linear(x), {k: v.clone() for k, v in linear.state_dict().items()}
    linear._apply(lambda t: t if t.numel() else t.to("meta"))  # as if the empty tensor had gone to another device
    assert linear.backend == first.name
    assert linear.prepacked is not first
    assert torch.equal(linear(x), want)
    assert all(torch.equal(t, before[k]) for k, t in linear.state_dict().items())


def test_nothing_imports_triton_before_a_gpu_is_there():
    code = (
        "import sys, llmq, llmq.runtime.linear\n"
        "from llmq.runtime.backends import backends\n"
        "names = [b.name for b in backends()]\n"
        "print(names[:2], [m for m in ('triton', 'llmq_kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['triton_weight_only', 'triton_w8a8'] []"
