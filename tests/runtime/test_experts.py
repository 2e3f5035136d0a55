"""The experts of a layer as two products: what they compute, the file's tensors, launches, and when they are let go."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from _launches import BACKENDS, TorchLaunches, counted
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import llmq
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.nvfp4 import Nvfp4
from llmq.integrations.compiled import compile_for_generation
from llmq.model.experts import Experts
from llmq.runtime.backends.floatloop import FloatLoop
from llmq.runtime.experts import Layer, group_experts
from llmq.runtime.joining import join_sites
from llmq.runtime.linear import QuantLinear
from llmq.types import LinearSpec, QTensor, Scheme

E, TOP, T, H, INNER = 5, 2, 9, 96, 64
W4 = Int(4, False, 32)
W8 = Int(8, True, "channel")
FLOATS = {"nvfp4": Nvfp4(), "mxfp4": Mxfp4()}
CLASSES = {
    "gates": ("qwen3_moe", "Qwen3MoeExperts"),
    "biases, interleaved": ("gpt_oss", "GptOssExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "batched": ("llama4", "Llama4TextExperts"),
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let the back-ends for GPUs take CPU tensors."""
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "devices", frozenset({"cpu"}))


class Config:
    """A config that has whatever a class of experts asks for."""

    _experts_implementation = "eager"
    moe_latent_size = None

    def __getattr__(self, name):
        sizes = {"limit": 7.0, "alpha": 1.702, "experts": E, "intermediate": INNER}
        known = [size for part, size in {"act": "silu", **sizes, "hidden": H}.items() if part in name]
        if not known or name.startswith("__"):
            raise AttributeError(name)
        return known[0]


def packed(kind="gates", grid=W4, other=None, activation=None):
    """Return experts taken apart whose linears are packed and prepacked; `other` is the grid of one down projection."""
    module, name = CLASSES[kind]
    fused = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)(Config())
    experts, draw = Experts(fused), torch.Generator().manual_seed(0)
    for path, linear in list(experts.named_modules()):
        if isinstance(linear, nn.Linear):
            N, K = linear.weight.shape
            of_this = other if other is not None and path == "3.down_proj" else grid
            q = QTensor.rounded(torch.randn(N, K, generator=draw), of_this)
            spec, fmt = LinearSpec(path, N, K, Scheme(of_this, activation)), CompressedTensors()
            new = QuantLinear(fmt, spec, linear.bias is not None)
            bias = {"bias": torch.randn(N, generator=draw)} if linear.bias is not None else {}
            new.load_state_dict(fmt.pack(q, spec) | bias, assign=True)
            new.prepack()
            experts.set_submodule(path, new)
    return experts


def given(kind="gates", dtype=torch.bfloat16):
    """Return what experts are called with: expert 1 has no token."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=draw)
    index = torch.tensor([0, 2, 3, 4])[torch.stack([torch.randperm(4, generator=draw)[:TOP] for _ in range(T)])]
    if kind != "batched":
        return x.to(dtype), index, torch.rand(T, TOP, generator=draw).to(dtype)
    chosen = (torch.arange(E)[:, None, None] == index).any(-1)
    return ((chosen[..., None] * x).reshape(E * T, H).to(dtype),)


def snr(found, wanted):
    noise = (found.double() - wanted.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_together_they_are_what_they_are_one_by_one_and_the_file_s_tensors_stay(kind, dtype):
    experts, args = packed(kind), given(kind, dtype)
    want, before = experts(*args), {k: t.clone() for k, t in experts.state_dict().items()}
    assert join_sites(experts) == 2 and isinstance(experts.together, Layer) and join_sites(experts) == 0
    alone = kind == "biases, interleaved" and dtype == torch.float32
    assert (experts.together(*args, *[None] * (3 - len(args))) is None) == alone
    assert snr(experts(*args), want) > (40 if dtype == torch.bfloat16 else 110)
    after = experts.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in after.items())
    words = {getattr(experts, "2").down_proj.prepacked.words, getattr(experts, "4").down_proj.prepacked.words}
    assert len({w.untyped_storage().data_ptr() for w in words}) == 1
    x = args[0][:3]
    expert = getattr(experts, "2")
    torch.testing.assert_close(expert.up_proj(x), getattr(packed(kind), "2").up_proj(x))  # one alone, as any linear


@pytest.mark.parametrize("kind", ["gates", "biases, interleaved"])
@torch.no_grad()
def test_what_is_moved_loaded_or_written_to_is_seen(kind):
    args = given(kind)

    def grouped():
        experts = packed(kind)
        group_experts(experts)
        return experts, getattr(experts, "3")

    experts, expert = grouped()
    want = experts(*args)
    twin = copy.deepcopy(experts)
    assert twin.together is not experts.together and twin.together._experts is twin
    assert torch.equal(twin(*args), want)
    twin.half()
    assert twin.together is not None  # as nothing of it was: what is packed keeps its dtypes
    expert.down_proj.prepacked._apply(lambda t: t.clone())
    assert experts.together is None and expert.up_proj.prepacked.site is None
    assert snr(experts(*args), want) > 40
    for change in (
        lambda e: e.up_proj.undo_prepack(),
        lambda e: e.up_proj.empty(),
        lambda e: e.load_state_dict({k: t.clone() for k, t in e.state_dict().items()}),
    ):
        experts, expert = grouped()
        change(expert)
        assert experts.together is None
    if kind != "gates":
        experts, expert = grouped()
        experts(*args)
        expert.down_proj.bias += 1
        assert experts.together is not None and not torch.equal(experts(*args), want)
        other = packed(kind)
        getattr(other, "3").down_proj.bias += 1
        assert snr(experts(*args), other(*args)) > 40


def test_layers_whose_experts_are_not_alike_run_one_by_one():
    for experts in (packed(other=Int(8, False, 32)), packed(other=Int(4, False, "channel"))):
        assert group_experts(experts) == 0 and experts.together is None
        assert all(m.prepacked.site is None for m in experts.modules() if isinstance(m, QuantLinear))
    assert group_experts(packed(grid=W8)) == 1


@pytest.mark.parametrize("name", FLOATS)
@torch.no_grad()
def test_small_floats_run_together_too(name, monkeypatch):
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    experts, args = packed(grid=FLOATS[name]), given()
    want, before = experts(*args), {k: t.clone() for k, t in experts.state_dict().items()}
    assert getattr(experts, "2").up_proj.backend == "triton_e2m1" and group_experts(experts) == 1
    assert snr(experts(*args), want) > 40
    assert all(torch.equal(t, before[k]) for k, t in experts.state_dict().items())


ENTERING = {"triton_w8a8": (W8, W8), "scaled_mm": (Fp8("channel"), Fp8("channel"))}
"""By back-end, weights and activations that are quantized as they enter."""


@pytest.mark.parametrize("kind", ["gates", "batched", "biases, interleaved"])
@pytest.mark.parametrize("backend", ENTERING)
@torch.no_grad()
def test_what_quantizes_its_activations_runs_together_too(kind, backend, monkeypatch):
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    grid, activation = ENTERING[backend]
    experts, args = packed(kind, grid, activation=activation), given(kind)
    want, before = experts(*args), {k: t.clone() for k, t in experts.state_dict().items()}
    assert getattr(experts, "2").up_proj.backend == backend and group_experts(experts) == 1
    assert isinstance(experts.together, Layer) and snr(experts(*args), want) > 40
    assert all(torch.equal(t, before[k]) for k, t in experts.state_dict().items())


LAYER = {"plan_kernel": 1, "grouped_kernel": 2}
AROUND = {"torch silu": 1, "torch mul": 2, "torch sum": 1}


@pytest.mark.parametrize("inner", [64, 128])
@torch.no_grad()
def test_a_layer_launches_two_products_a_plan_and_what_torch_needs(inner, monkeypatch):
    """Where 128 divides all features; else torch puts gates and ups side by side, and pads what enters the downs."""
    monkeypatch.setitem(globals(), "INNER", inner)
    monkeypatch.setitem(globals(), "H", 128)
    with counted() as counts:
        experts = packed()
        group_experts(experts)
        args = given()
        experts(*args)
        counts.clear()
        with TorchLaunches(counts):
            experts(*args)
        assert counts == LAYER | AROUND | ({} if inner == 128 else {"torch cat": 1, "torch pad": 1})


@pytest.mark.parametrize("backend", ENTERING)
@torch.no_grad()
def test_a_layer_that_quantizes_launches_two_products_what_quantizes_and_a_plan(backend, monkeypatch):
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    grid, activation = ENTERING[backend]
    with counted() as counts:
        experts, args = packed(grid=grid, activation=activation), given()
        assert group_experts(experts) == 1
        experts(*args)
        counts.clear()
        experts(*args)
        assert counts == {"plan_kernel": 1, "quantize_kernel": 2, "grouped_int8_kernel": 2}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=6, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    how = {"method": "rtn", "bits": 4, "group_size": 32, "format": "compressed-tensors"}
    llmq.quantize(tmp_path / "float", tmp_path / "out", **how)
    return tmp_path / "out"


def test_a_loaded_model_runs_them_and_compiles_whole(folder):
    ids, want = torch.arange(2, 12)[None], llmq.load(folder, device="cpu", backend="reference")
    model = llmq.load(folder, device="cpu")
    assert sum(isinstance(getattr(m, "together", None), Layer) for m in model.modules()) == 1
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = want(ids).logits
        assert snr(model(ids).logits, logits) > 35
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    theirs = want.state_dict()
    assert all(torch.equal(t, theirs[k]) for k, t in model.state_dict().items())
    compile_for_generation(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 14) and not torch._dynamo.utils.counters["graph_break"]


def test_a_token_launches_two_products_of_experts_a_block(folder):
    with counted() as counts:
        model, ids = llmq.load(folder, device="cpu"), torch.tensor([[5]])
        with torch.no_grad():
            model(ids, use_cache=False)
            counts.clear()
            model(ids, use_cache=False)
        assert counts == {"weight_only_kernel": 2} | LAYER
