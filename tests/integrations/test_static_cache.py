"""A quantized cache in fixed memory holds what the one that grows holds, bit for bit, and a graph can replay it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from _graphs import REPLAY, Graphs, Steps
from _inductor import launched
from hypothesis import given
from hypothesis import strategies as st
from transformers import StaticCache

import llmq
from llmq.errors import LlmqError
from llmq.integrations.compiled import compile_for_generation
from llmq.integrations.static_cache import StaticQuantizedLayer

ROOM = 200
SCALES = {i: (torch.full((2, 1, 1), 0.02), torch.tensor([0.03])) for i in range(2)}
KINDS = {
    "int8": {"bits": 8},
    "int8, no window": {"bits": 8, "window": 0},
    "int8, static scales": {"bits": 8, "scales": SCALES},
    "fp8": {"bits": 8, "scales": SCALES, "fp8": True},
    "int4": {"bits": 4},
    "int4, a wider window": {"bits": 4, "window": 128},
    "int4 by token, an odd window": {"bits": 4, "keys": "token", "window": 5},
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(st.integers(1, 150), min_size=1, max_size=12), half=st.booleans())
def test_it_holds_what_a_cache_that_grows_holds(kind, pieces, half, tiny_config):
    """After every piece, whatever their lengths; what has not come yet is finite."""
    caches = [llmq.QuantizedCache(tiny_config(), **KINDS[kind], max_cache_len=room) for room in (None, ROOM)]
    x = torch.randn(2, 2, ROOM, 16, generator=torch.Generator().manual_seed(sum(pieces)))
    x, end = x.bfloat16() if half else x, 0
    for piece in pieces:
        begin, end = end, min(end + piece, ROOM)
        if begin == end:
            break
        new = x[:, :, begin:end], x.flip(0)[:, :, begin:end] * 3 + 1
        grown, fixed = (cache.update(*new, 0) for cache in caches)
        for want, got in zip(grown, fixed, strict=True):
            assert got.shape == (2, 2, ROOM, 16) and got.dtype == want.dtype and got.isfinite().all()
            assert torch.equal(got[:, :, :end], want)
        assert int(caches[1].get_seq_length()) == caches[0].get_seq_length() == end


def generate(model, cache, ids, new, **how):
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, cache_implementation=None, max_new_tokens=new,
            do_sample=False, pad_token_id=0, eos_token_id=None, **how,
        )  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_are_those_of_a_cache_that_grows(beams, model):
    ids = torch.arange(2, 242).reshape(2, 120)
    for kind in ("int8", "int4"):
        fixed, grown = (llmq.QuantizedCache(model.config, **KINDS[kind], max_cache_len=n) for n in (ROOM, None))
        want = generate(model, grown, ids, 12, num_beams=beams)
        for _ in range(2):
            assert torch.equal(generate(model, fixed, ids, 12, num_beams=beams), want)
            fixed.reset()
            assert int(fixed.get_seq_length()) == 0


@pytest.mark.parametrize("kind", ["int8", "int8, static scales", "int4"])
def test_a_token_replays_one_graph_and_is_the_same(kind, tiny_llama):
    """From token 129 on the ring of 64 holds others, and 64 more have left it."""
    model, counts, ids = tiny_llama(), Counter(), torch.arange(2, 122)[None]
    want = generate(model, llmq.QuantizedCache(model.config, **KINDS[kind]), ids, 12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_for_generation(model, backend=Graphs(counts))
    cache = llmq.QuantizedCache(model.config, **KINDS[kind], max_cache_len=ROOM)
    for answer in (1, 2):
        steps = Steps(counts)
        assert torch.equal(generate(model, cache, ids, 12, streamer=steps), want)
        assert steps.tokens == [*([{"record": 1}] if answer == 1 else [REPLAY]), *[REPLAY] * 10]
        cache.reset()
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Inductor's insides, of torch 2.13")
def test_a_graph_of_a_gpu_has_four_more_launches_a_block(tiny_llama):
    """Decoding, and the choice between what is packed and the ring, is one launch each for keys and values."""
    model = tiny_llama(num_hidden_layers=1, dtype=torch.bfloat16)
    model.set_attn_implementation("eager")  # a CPU's own attention is no GPU's
    totals = []
    for cache in (StaticCache(model.config, 64), llmq.QuantizedCache(model.config, max_cache_len=64)):
        with torch.no_grad():
            model(torch.arange(2, 12)[None], past_key_values=cache)
        totals.append(launched(model.forward, torch.tensor([[5]]), past_key_values=cache).total())
    assert totals[1] - totals[0] == 4


def test_memory_is_taken_once_and_is_small(model):
    sizes = {}
    for bits in (8, 4):
        cache = llmq.QuantizedCache(model.config, bits=bits, max_cache_len=512)
        with torch.no_grad():
            model(torch.arange(2, 12)[None], past_key_values=cache)
            before = cache.nbytes, [t.data_ptr() for layer in cache.layers for t in layer._tensors()]
            model(torch.arange(2, 202)[None], past_key_values=cache)
        assert before == (cache.nbytes, [t.data_ptr() for layer in cache.layers for t in layer._tensors()])
        sizes[bits] = cache.nbytes
    float_bytes = 2 * 2 * 2 * 16 * 512 * 4  # keys and values, layers, heads, channels, tokens, float32
    assert sizes[8] < 0.45 * float_bytes and sizes[4] < 0.37 * float_bytes


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(LlmqError, match="max_cache_len is 0"):
        llmq.QuantizedCache(model.config, max_cache_len=0)
    cache = llmq.QuantizedCache(model.config, max_cache_len=8)
    with pytest.raises(LlmqError, match="9 tokens do not fit a cache of max_cache_len=8"):
        model(torch.arange(9)[None], past_key_values=cache)
    with torch.no_grad():
        model(torch.arange(8)[None], past_key_values=cache)
        with pytest.raises(IndexError):
            model(torch.arange(1)[None], past_key_values=cache)
    assert isinstance(cache.layers[0], StaticQuantizedLayer)
