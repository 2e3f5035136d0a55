"""Linears that read one activation as one product: its parts, the file's tensors, and what is launched for a token."""

from __future__ import annotations

import copy

import pytest
import torch
from _launches import BACKENDS, counted
from torch import nn

import llmq
from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.runtime.backends._triton import Site, TritonPrepacked
from llmq.runtime.backends.floatloop import FloatLoop
from llmq.runtime.joining import join_sites
from llmq.runtime.linear import QuantLinear
from llmq.types import LinearSpec, QTensor, Scheme

W8 = Int(8, True, "channel")
GRIDS = {
    "int4": (Int(4, False, 32), None),
    "int3": (Int(3, True, 32), None),
    "w8a8": (W8, W8),
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Let the back-ends for GPUs take CPU tensors."""
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "devices", frozenset({"cpu"}))


@pytest.fixture
def block(solved, layer):
    """`block(grid, bias, **grids)`: a module with q, k and v of 40, 130 and 33 features on 96, prepacked."""

    def make(name, bias=False, sizes=(40, 130, 33), **other):
        module = nn.Module()
        for seed, (leaf, N) in enumerate(zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)):
            grid, activation = other.get(leaf, GRIDS[name])
            linear = layer(*solved(N, 96, grid, activation, seed=seed), CompressedTensors(), bias)
            linear.prepack()
            assert isinstance(linear.prepacked, TritonPrepacked)
            setattr(module, leaf, linear)
        return module

    return make


def outputs(module, x):
    return [module.q_proj(x), module.k_proj(x), module.v_proj(x)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_parts_are_the_products_of_each_and_the_file_s_tensors_stay(name, bias, block):
    module, x = block(name, bias), torch.randn(2, 3, 96)
    want, before = outputs(module, x), {k: t.clone() for k, t in module.state_dict().items()}
    assert join_sites(module) == 1
    site = module.q_proj.prepacked.site
    for _ in range(2):
        for y, wanted in zip(outputs(module, x), want, strict=True):
            assert y.shape == wanted.shape
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        assert site._left is None  # nothing is kept once all have had their part
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in after.items())
    assert join_sites(module) == 0  # it is


def test_words_are_held_once(block):
    module = block("int4")
    join_sites(module)
    whole = module.q_proj.prepacked.site.whole.words
    for leaf in ("q_proj", "k_proj", "v_proj"):
        words = getattr(module, leaf).prepacked.words
        assert words.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_only_the_same_untouched_tensor_is_shared(block, monkeypatch):
    module, x = block("int4"), torch.randn(2, 96)
    want = outputs(module, x), outputs(module, 2 * x)
    join_sites(module)
    made = []
    product = type(module.q_proj.prepacked).multiply
    monkeypatch.setattr(
        type(module.q_proj.prepacked), "multiply", lambda self, x, w, b: (made.append(w), product(self, x, w, b))[1]
    )
    module.q_proj(x)
    torch.testing.assert_close(module.k_proj(2 * x), want[1][1])
    x.mul_(2)
    for leaf, wanted in zip(("v_proj", "q_proj", "k_proj"), [want[1][i] for i in (2, 0, 1)], strict=True):
        torch.testing.assert_close(getattr(module, leaf)(x), wanted)
    assert len(made) == 3
    again = module.v_proj(x)
    assert len(made) == 4 and torch.equal(again, module.v_proj(x)) and len(made) == 5
    with torch.inference_mode():
        y = torch.randn(2, 96)
        assert len({id(t) for t in outputs(module, y)}) == 3 and len(made) == 6


def test_what_is_not_alike_stays_alone_and_two_of_three_go_together(block):
    module, x = block("int4", q_proj=(Int(8, True, 32), None)), torch.randn(2, 96)
    want = outputs(module, x)
    assert join_sites(module) == 1
    assert module.q_proj.prepacked.site is None
    assert module.k_proj.prepacked.site is module.v_proj.prepacked.site
    for y, wanted in zip(outputs(module, x), want, strict=True):
        torch.testing.assert_close(y, wanted)
    assert join_sites(block("int4", k_proj=(W8, None), v_proj=(W8, W8))) == 0


def test_joined_e2m1_comes_back_bit_for_bit(layer, monkeypatch):
    """Of MXFP4, whose scales' words have one row where K is small."""
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    module, x = nn.Module(), torch.randn(2, 96)
    for leaf, N in (("gate_proj", 40), ("up_proj", 72)):
        q = QTensor.rounded(torch.randn(N, 96), Mxfp4())
        linear = layer(q, LinearSpec(leaf, N, 96, Scheme(q.grid, None)), CompressedTensors())
        linear.prepack()
        setattr(module, leaf, linear)
    want, before = (module.gate_proj(x), module.up_proj(x)), {k: t.clone() for k, t in module.state_dict().items()}
    assert module.gate_proj.backend == "triton_e2m1" and join_sites(module) == 1
    torch.testing.assert_close((module.gate_proj(x), module.up_proj(x)), want)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_act_order_stays_alone(solved, layer):
    from llmq.formats.gptq import GPTQ

    module = nn.Module()
    for leaf in ("gate_proj", "up_proj"):
        linear = layer(*solved(64, 96, Int(4, True, 32), None, True), GPTQ(desc_act=True))
        linear.prepack()
        setattr(module, leaf, linear)
    assert join_sites(module) == 0


def test_a_site_survives_copies_and_gives_way_to_changes(block):
    module, x = block("int4", bias=True), torch.randn(2, 96)
    join_sites(module)
    want = outputs(module, x)
    twin = copy.deepcopy(module)
    assert twin.q_proj.prepacked.site is not module.q_proj.prepacked.site
    assert twin.q_proj.prepacked.site.members[1] is twin.k_proj.prepacked
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, x), want, strict=True))
    twin.k_proj.bias += 1
    torch.testing.assert_close(twin.k_proj(x), want[1] + 1)  # though it was joined with the others'
    moved = copy.deepcopy(module)
    moved.k_proj.prepacked._apply(lambda t: t.clone())
    torch.testing.assert_close(outputs(moved, x), want)  # alone again, each
    module.k_proj.undo_prepack()
    torch.testing.assert_close(outputs(module, x), want, rtol=1e-4, atol=1e-4)


def quantized(tiny_checkpoint, tmp_path, *options):
    source = tiny_checkpoint(hidden_size=128, intermediate_size=256)
    llmq.quantize(source, tmp_path / "out", method="rtn", format="compressed-tensors", **dict(options))
    return tmp_path / "out"


TOKEN = {  # what a token launches in a block, joined
    "int4": ({"bits": 4, "group_size": 32}, {"weight_only_kernel": 4}),
    "w8a8": ({"bits": 8, "act_bits": 8, "group_size": "channel"}, {"quantize_kernel": 4, "int8_kernel": 4}),
    "fp8": ({"weights": "fp8", "inputs": "fp8"}, {"quantize_kernel": 4, "sum_int32_kernel": 4}),
}
INDUCTORS = {"quantize_kernel", "sum_int32_kernel"}
"""What torch.compile is given as operators of torch."""


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("name", TOKEN)
def test_a_token_launches_four_products_a_block(name, how, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    recipe, wanted = TOKEN[name]
    folder = quantized(tiny_checkpoint, tmp_path, *recipe.items())
    with counted() as counts:
        model = llmq.load(folder, device="cpu", dtype=torch.bfloat16)
        linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert sum(isinstance(m.prepacked, TritonPrepacked) for m in linears) == 14
        ids = torch.tensor([[5]])
        if how == "compiled":
            torch._dynamo.reset()
            model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        with torch.no_grad():
            model(ids, use_cache=False)
            counts.clear()
            model(ids, use_cache=False)
        if how == "compiled":
            wanted = {kernel: n for kernel, n in wanted.items() if kernel not in INDUCTORS}
        assert counts == {kernel: 2 * n for kernel, n in wanted.items()}


def test_compiled_and_eager_sites_agree(tiny_checkpoint, tmp_path):
    folder = quantized(tiny_checkpoint, tmp_path, ("bits", 4), ("group_size", 32))
    model, ids = llmq.load(folder, device="cpu"), torch.arange(2, 12)[None]
    assert sum(isinstance(getattr(m, "site", None), Site) for m in model.modules()) == 10
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, want)
        alone = llmq.load(folder, device="cpu")
        for m in alone.modules():
            if isinstance(m, TritonPrepacked):
                m.site = None
        torch.testing.assert_close(alone(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
