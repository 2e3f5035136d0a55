"""A compiled model generates what it does uncompiled: on a CPU, by the back-end of torch.compile that only traces."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from _graphs import REPLAY, Graphs, Steps
from _inductor import launched
from _launches import BACKENDS, counted
from transformers import DynamicCache, StaticCache

import llmq
from llmq.errors import LlmqError
from llmq.integrations import compiled
from llmq.integrations.compiled import compile_for_generation, is_compiled
from llmq.runtime.backends.floatloop import FloatLoop
from llmq.runtime.backends.scaled_mm import ScaledMM
from llmq.runtime.backends.triton_w8a8 import TritonW8A8
from llmq.talk import in_torch
from llmq.talk.speaker import Sampling, opened
from llmq_kernels import activation


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    llmq.quantize(tiny_checkpoint(), tmp_path / "out", method="rtn", bits=4, group_size=32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which other tests have raised
    return tmp_path / "out"


def generate(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


def test_generate_is_compiled_and_gives_the_same_logits(folder, monkeypatch):
    """With the back-ends of a GPU: their operators, joined products and all, in one graph."""
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "devices", frozenset({"cpu"}))
    plain, model = (llmq.load(folder, device="cpu") for _ in range(2))
    ids = torch.arange(2, 12)[None]
    want = generate(plain, ids)
    compile_for_generation(model, backend="eager")
    assert is_compiled(model) and not is_compiled(plain)
    found = generate(model, ids)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
    assert isinstance(found.past_key_values, StaticCache) and isinstance(want.past_key_values, DynamicCache)
    assert not torch._dynamo.utils.counters["graph_break"]
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(generate(model, ids).sequences, want.sequences)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames  # a second answer compiles nothing
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[k]) for k, t in before.items())


KERNELS = {"weight_only_kernel": 8}


@pytest.mark.parametrize(("how", "wanted"), [("eager", KERNELS), ("compiled", KERNELS), ("graph", REPLAY)])
def test_what_python_launches_for_a_token(how, wanted, folder):
    """Two blocks. Of what lies in a graph it launches nothing, and the graph is recorded once an answer."""
    with counted() as counts:
        model, steps = llmq.load(folder, device="cpu"), Steps(counts)
        if how != "eager":
            compile_for_generation(model, backend=Graphs(counts) if how == "graph" else "eager")
        with torch.no_grad():
            model.generate(torch.arange(2, 12)[None], max_new_tokens=7, do_sample=False, streamer=steps)
        first, *others = steps.tokens
        assert others == [wanted] * 5
        assert first == (wanted if how != "graph" else {"record": 1, **KERNELS})


def test_a_quantized_head_and_a_quantized_cache_are_in_the_same_graph(tiny_checkpoint, tmp_path):
    how = {"method": "rtn", "bits": 4, "group_size": 32, "lm_head": True, "format": "compressed-tensors"}
    llmq.quantize(tiny_checkpoint(tie_word_embeddings=False), tmp_path / "out", **how)
    torch._dynamo.reset()
    with counted() as counts:
        model, steps = llmq.load(tmp_path / "out", device="cpu"), Steps(counts)
        compile_for_generation(model, backend=Graphs(counts))
        cache = llmq.QuantizedCache(model.config, bits=4, max_cache_len=32)
        given = {"past_key_values": cache, "cache_implementation": None, "max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            model.generate(torch.arange(2, 12)[None], streamer=steps, **given)
    assert steps.tokens == [{"record": 1, "weight_only_kernel": 9}, *[REPLAY] * 4]


def test_graphs_are_replayed_for_the_same_tokens(folder):
    counts = Counter()
    plain, model = (llmq.load(folder, device="cpu") for _ in range(2))
    compile_for_generation(model, backend=Graphs(counts))
    cache, ids = StaticCache(model.config, max_cache_len=32), torch.arange(2, 12)[None]
    want = generate(plain, ids).sequences
    for answer in (1, 2):
        steps = Steps(counts)
        given = {"past_key_values": cache, "cache_implementation": None, "max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            assert torch.equal(model.generate(ids, streamer=steps, **given), want)
        assert steps.tokens[1:] == [REPLAY] * 4
        assert steps.tokens[0] == (REPLAY if answer == 2 else {"record": 1})  # the cache is where it was
        cache.reset()


def test_a_graph_that_moves_or_changes_what_moves_is_found_out():
    counts = Counter()

    def add(x, to):
        to.add_(x)
        return to * 2

    x, fixed = torch.ones(2), (torch.zeros(2), torch.zeros(2))
    for _ in range(3):
        torch.compile(add, backend=Graphs(counts))(x, torch.ones(2))
    assert not counts  # it changes an input of no fixed address: there is no graph
    for to in fixed:
        torch._dynamo.mark_static_address(to)
    torch._dynamo.reset()
    compiled = torch.compile(add, backend=Graphs(counts))
    seen = [compiled(x, to).clone() for to in (fixed[0], fixed[0], fixed[1], fixed[1], fixed[0])]
    assert counts == {"record": 2, "replay": 3, "input copied": 3}
    assert [int(y[0]) for y in seen] == [2, 4, 2, 4, 6]


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_a_chat_keeps_one_static_cache_and_says_the_same(kv_bits, folder, monkeypatch):
    monkeypatch.setattr(in_torch, "_ROOM", 64)
    how, given = Sampling(6, temperature=0), {"kv_bits": kv_bits}
    with opened(str(folder), "cpu", **given) as plain, opened(str(folder), "cpu", **given) as speaker:
        assert not is_compiled(speaker._model)  # a CPU is not
        compile_for_generation(speaker._model, backend="eager")
        first = speaker.encode("The first city")
        assert "".join(speaker.answer(first, how)) == "".join(plain.answer(first, how))
        kept = speaker._cache
        assert isinstance(kept, llmq.QuantizedCache if kv_bits else StaticCache)
        assert isinstance(plain._cache, llmq.QuantizedCache if kv_bits else DynamicCache)
        assert kept.layers[0].max_cache_len == 64
        longer = [*speaker._held, *speaker.encode("and the war")]
        for ids in (longer, first):  # one that goes on, one that does not
            assert "".join(speaker.answer(ids, how)) == "".join(plain.answer(ids, how))
            assert speaker._cache is kept
        long = speaker.encode("The first city and the war " * 12)
        assert len(long) > 64
        assert "".join(speaker.answer(long, how)) == "".join(plain.answer(long, how))
        assert speaker._cache is not kept
        if kv_bits:
            assert speaker.memory()["key-value cache"] == speaker._cache.nbytes > 0


def test_what_cannot_be_compiled_is_said(folder):
    with pytest.raises(LlmqError, match="this is for a CPU"):
        llmq.load(folder, device="cpu", compile=True)
    model = llmq.load(folder, device="cpu")
    model._can_compile_fullgraph = False
    with pytest.raises(LlmqError, match="a llama model cannot be compiled with a static cache"):
        compile_for_generation(model)


def test_the_mlps_of_ten_blocks_are_compiled_once_and_give_the_same(tiny_checkpoint, tmp_path, monkeypatch):
    """For prompts of any length; more blocks than torch compiles anew before it gives up."""
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "devices", frozenset({"cpu"}))
    source = tiny_checkpoint(num_hidden_layers=10)
    llmq.quantize(source, tmp_path / "out", method="rtn", bits=4, group_size=32)
    plain, model = (llmq.load(tmp_path / "out", device="cpu") for _ in range(2))
    torch._dynamo.reset()
    compile_for_generation(model, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for tokens in (10, 17):
            ids = torch.arange(2, 2 + tokens)[None]
            assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("device", "compiled", "told"), [("cuda", True, 1), ("cuda", False, 0), ("cpu", True, 0)])
def test_a_speaker_on_a_gpu_is_compiled_unless_it_is_not_to_be(folder, monkeypatch, device, compiled, told):
    model = llmq.load(folder, device="cpu")
    as_if = SimpleNamespace(
        device=torch.device(device),
        _can_compile_fullgraph=True,
        _supports_default_dynamic_cache=lambda: True,
        config=model.config,
        parameters=list,
        buffers=list,
    )
    calls = []
    monkeypatch.setattr(in_torch, "load", lambda *args, **named: as_if)
    monkeypatch.setattr(in_torch, "compile_for_generation", calls.append)
    with opened(str(folder), device, compiled=compiled):
        assert len(calls) == told


inductor = pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor's insides, of torch 2.13")


@inductor
def test_inductor_quantizes_inputs_in_the_launches_that_make_them(tiny_checkpoint, tmp_path, monkeypatch):
    """Of the four of a block: after two norms, with the residual's sum before them, and after the gate; q, k, v and
    gate, up are one product each. What attention gives back is quantized in a launch of its own."""
    source = tiny_checkpoint(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    how = {"method": "rtn", "format": "compressed-tensors", "bits": 8, "act_bits": 8, "group_size": "channel"}
    llmq.quantize(source, tmp_path / "out", **how)
    int8_linear = torch.ops.llmq.int8_linear
    with counted():
        model = llmq.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
        model.set_attn_implementation("eager")  # a CPU's own attention is no GPU's
        fused = launched(model.forward, torch.tensor([[5]]), use_cache=False)
        monkeypatch.setattr(
            TritonW8A8, "multiply", lambda self, x, w, bias: int8_linear(x, w.q, w.scale, None, bias, w.N, w.K)
        )
        alone = launched(model.forward, torch.tensor([[5]]), use_cache=False)
    assert fused["int8_product"] == alone["int8_linear"] == 4
    assert fused["torch"] == alone["torch"] + 1  # where an operator has two launches
    assert fused.total() == alone.total() + alone["int8_linear"] - 3


@inductor
def test_a_compiled_block_of_fp8_has_four_products(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(FloatLoop, "refuses", lambda spec, device: "it is not asked")
    monkeypatch.setattr(ScaledMM, "devices", frozenset({"cpu"}))
    source = tiny_checkpoint(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    how = {"method": "rtn", "format": "compressed-tensors", "weights": "fp8", "inputs": "fp8"}
    llmq.quantize(source, tmp_path / "out", **how)
    model = llmq.load(tmp_path / "out", device="cpu", dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    found = launched(model.forward, torch.tensor([[5]]), use_cache=False)
    assert found["_scaled_mm"] == 4
    assert found["torch"] < 10  # attention's, the mask's, the last norm's, and one before each product


@inductor
def test_inductor_reduces_rows_of_any_length_in_one_launch_with_the_options_of_a_compiled_model():
    assert torch._inductor.list_mode_options("reduce-overhead") | compiled._ROWS == compiled._GRAPH

    def gated(both):
        gate, up = both.chunk(2, -1)
        return activation.quantize_reference(torch.nn.functional.silu(gate) * up)

    def normed(x):
        return activation.quantize_reference(x * torch.rsqrt(x.float().square().mean(-1, keepdim=True)).bfloat16())

    for make, x, launches in ((gated, torch.zeros(1, 1, 28672), 3), (normed, torch.zeros(1, 1, 16384), 5)):
        assert launched(make, x.bfloat16())["torch"] >= launches  # each of them more than an operator of ours adds
        with torch._inductor.config.patch(compiled._ROWS):
            assert launched(make, x.bfloat16()) == {"torch": 1}
