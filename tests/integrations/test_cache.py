"""QuantizedCache in transformers: generation, batches, beams, cropping, and the attention that reads it packed."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llmq
from llmq.integrations.cache import packed_attention, static_scales
from llmq.runtime import triton_kv
from llmq.runtime.kv import KVGrid, Store
from llmq.runtime.triton_kv import KernelStore
from llmq.types import LlmqError

IDS = torch.arange(2, 302).reshape(2, 150)
KINDS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4_token": {"bits": 4, "keys": "token"},
    "no_window": {"window": 0},
}


def feed(model, cache, size: int, ids=IDS, **options) -> torch.Tensor:
    """Return the logits of a text fed in pieces."""
    with torch.no_grad():
        return torch.cat(
            [
                model(ids[:, i : i + size], past_key_values=cache, **options).logits
                for i in range(0, ids.shape[1], size)
            ],
            1,
        )


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def truth(model):
    return feed(model, DynamicCache(config=model.config), 150)


@pytest.fixture(scope="module")
def decibel():
    def db(got, want):
        return float(10 * torch.log10(want.square().sum() / (got - want).square().sum().clamp(min=1e-30)))

    return db


@pytest.mark.parametrize("size", [1, 32, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_near_those_of_a_float_cache(kind, size, model, truth, decibel):
    cache = llmq.QuantizedCache(model.config, **KINDS[kind])
    got = decibel(feed(model, cache, size), truth)
    assert cache.get_seq_length() == 150
    low, high = (38, 60) if KINDS[kind].get("bits", 8) == 8 else (16, 38)
    assert low < got < high  # near, and not by keeping everything in float


def test_the_first_call_reads_quantized_entries_too(model, truth, decibel):
    two = decibel(feed(model, llmq.QuantizedCache(model.config, bits=2), 150), truth)
    assert two < 15


@pytest.mark.parametrize("size", [1, 32, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_attention_equals_decoding(kind, size, model, decibel):
    want = feed(model, llmq.QuantizedCache(model.config, **KINDS[kind]), size)
    cache = llmq.QuantizedCache(model.config, **KINDS[kind])
    with packed_attention(model):
        got = feed(model, cache, size)
    assert decibel(got, want) > 70  # float32 rounding, and codes that it tips over an edge
    assert cache.layers[0].keys.shape[2] <= cache.window


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' store and attention, on the CPU by their references."""
    monkeypatch.setattr(KernelStore, "devices", frozenset({"cpu"}))


@pytest.mark.parametrize("size", [1, 32, 150])
@pytest.mark.parametrize("kind", ["int8", "int4_token", "no_window"])
def test_the_store_of_the_kernels(kernels, kind, size, model, truth, decibel):
    """Near the float cache, read as packed as decoded, and as good as the store without kernels."""
    caches = [llmq.QuantizedCache(model.config, **KINDS[kind]) for _ in range(2)]
    decoded = feed(model, caches[0], size)
    calls = []
    attend = triton_kv.attend
    with packed_attention(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kv, "attend", lambda *args: calls.append(0) or attend(*args))
        packed = feed(model, caches[1], size)
    assert calls or size > 1
    assert not calls or size <= 32  # more queries are a prefill
    assert isinstance(caches[1].layers[0]._quantized_keys, KernelStore)
    assert decibel(packed, decoded) > 60
    low, high = (38, 60) if KINDS[kind].get("bits", 8) == 8 else (14, 38)
    assert low < decibel(decoded, truth) < high
    caches[0].crop(-40)
    caches[0].reorder_cache(torch.tensor([1, 0]))
    again = feed(model, caches[0], 40, ids=IDS.flip(0)[:, 110:])
    assert decibel(again, decoded.flip(0)[:, 110:]) > 30 if size == 150 else again.isfinite().all()
    caches[0].reset()
    assert decibel(feed(model, caches[0], size), decoded) > 100


def test_both_stores_hold_the_same():
    x = torch.randn(2, 2, 140, 80, generator=torch.Generator().manual_seed(3))
    static = torch.tensor([0.01]), torch.tensor([[[0.01]], [[0.03]]])
    for grid in (KVGrid(8), KVGrid(4), *(KVGrid(8, static=s) for s in static)):
        stores = Store(grid), KernelStore(grid)
        for store in stores:
            store.append(x[:, :, :90])
            store.append(x[:, :, 90:])
        want, got = (s.decode(torch.float32) for s in stores)
        assert torch.equal(got, want) and want.abs().max() > 1
        assert torch.equal(stores[1].decode(torch.float32, 60, 130), want[:, :, 60:130])


def test_keys_per_channel_are_not_for_the_kernels(kernels, model):
    cache = llmq.QuantizedCache(model.config, bits=4)
    feed(model, cache, 150)
    assert isinstance(cache.layers[0]._quantized_keys, Store)
    grids = KVGrid(4, "channel"), KVGrid(4)
    assert "keys='token'" in KernelStore.refuses(grids, torch.zeros(1, 1, 1, 64))


def test_packed_attention_reads_padding_and_leaves_other_caches_to_sdpa(model, decibel):
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    want = feed(model, DynamicCache(config=model.config), 150, attention_mask=mask)
    with packed_attention(model):
        again = feed(model, DynamicCache(config=model.config), 150, attention_mask=mask)
        packed = feed(model, llmq.QuantizedCache(model.config), 150, attention_mask=mask)
    assert torch.equal(again, want)
    assert decibel(packed[0, 20:], want[0, 20:]) > 38


def test_packed_attention_is_undone(model):
    def state():
        return list(ALL_ATTENTION_FUNCTIONS), list(ALL_MASK_ATTENTION_FUNCTIONS), model.config._attn_implementation

    before = state()
    with packed_attention(model):
        assert state() != before
        with packed_attention(model):
            pass
        assert model.config._attn_implementation == "llmq"
        assert "llmq" in ALL_ATTENTION_FUNCTIONS
    assert state() == before
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        _ = 1 / 0
    assert state() == before


def test_a_packed_cache_given_to_another_attention_is_an_error(model, tiny_llama):
    other = tiny_llama()
    with packed_attention(model), pytest.raises(LlmqError) as refused:
        other(IDS, past_key_values=llmq.QuantizedCache(model.config))
    assert "packed" in str(refused.value)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_generate(packed, beams, model):
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(IDS, pad_token_id=0, **options)
    cache = llmq.QuantizedCache(model.config, bits=8)
    if packed:
        with packed_attention(model):
            got = model.generate(IDS, pad_token_id=0, past_key_values=cache, **options)
    else:
        got = model.generate(IDS, pad_token_id=0, past_key_values=cache, **options)
    assert got.shape == want.shape
    assert (got == want).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [149, 110, 64, 5])
def test_crop_forgets_the_latest_tokens(kind, kept, model, decibel):
    cache = llmq.QuantizedCache(model.config, **KINDS[kind])
    feed(model, cache, 150)
    cache.crop(kept - 150)
    assert cache.get_seq_length() == kept
    with torch.no_grad():
        got = model(IDS[:, kept : kept + 1], past_key_values=cache).logits
        want = model(IDS[:, : kept + 1]).logits[:, -1:]
    assert decibel(got, want) > (30 if KINDS[kind].get("bits", 8) == 8 else 10)


def test_batches_are_selected_repeated_and_reordered(model):
    cache = llmq.QuantizedCache(model.config, bits=4)
    feed(model, cache, 150)
    keys = cache.layers[1]._whole(cache.layers[1]._quantized_keys, cache.layers[1].keys)
    for change, index in (
        (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda: cache.batch_repeat_interleave(2), [1, 1, 0, 0]),
        (lambda: cache.batch_select_indices(torch.tensor([3])), [0]),
    ):
        change()
        layer = cache.layers[1]
        assert torch.equal(layer._whole(layer._quantized_keys, layer.keys), keys[index])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert feed(model, cache, 150).shape == (2, 150, 320)


def test_it_is_small(model):
    ids = torch.randint(2, 320, (1, 448))
    sizes = {}
    for bits in (8, 4):
        cache = llmq.QuantizedCache(model.config, bits=bits)
        feed(model, cache, 64, ids)
        sizes[bits] = cache.nbytes
    float_bytes = 2 * 2 * 2 * 16 * 448 * 4  # keys and values, layers, heads, channels, tokens, float32
    assert sizes[8] < 0.42 * float_bytes
    assert sizes[4] < 0.34 * float_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, tiny_llama):
    half = tiny_llama(dtype=dtype)
    for packed in (False, True):
        cache = llmq.QuantizedCache(half.config, bits=4)
        if packed:
            with packed_attention(half):
                logits = feed(half, cache, 50)
        else:
            logits = feed(half, cache, 50)
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert cache.layers[0].keys.dtype == dtype


def test_another_family_with_query_norms():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    want = feed(model, DynamicCache(config=config), 150)
    with packed_attention(model):
        got = feed(model, llmq.QuantizedCache(config, bits=8), 32)
    assert 10 * torch.log10(want.square().sum() / (got - want).square().sum()) > 35


BAD = {
    "bits": ({"bits": 3}, "8 or 4, not 3"),
    "keys": ({"keys": "head"}, "'head'"),
    "window": ({"bits": 4, "window": 100}, "multiple of 64"),
    "negative": ({"window": -1}, "0 or more"),
    "scales": ({"bits": 4, "scales": {}}, "static scales"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused(name, model):
    options, message = BAD[name]
    with pytest.raises(LlmqError, match=message):
        llmq.QuantizedCache(model.config, **options)


@pytest.mark.parametrize("size", [1, 32, 150])
def test_layers_with_a_window_see_as_far_back_as_they_do(size, decibel):
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 32}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads, sliding_window=24, layer_types=kinds)).eval()
    want = feed(model, DynamicCache(config=model.config), 150)
    whole = Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads, layer_types=["full_attention"] * 3)).eval()
    whole.load_state_dict(model.state_dict())
    assert decibel(feed(whole, DynamicCache(config=whole.config), 150), want) < 25  # the windows count
    decoded = feed(model, llmq.QuantizedCache(model.config, bits=8), size)
    assert decibel(decoded, want) > 38
    with packed_attention(model):
        packed = feed(model, llmq.QuantizedCache(model.config, bits=8), size)
    assert decibel(packed, decoded) > 60


def test_layers_without_keys_are_refused():
    kinds = ["linear_attention", "full_attention"]
    with pytest.raises(LlmqError, match="takes attention in every layer, not linear_attention"):
        llmq.QuantizedCache(Qwen3NextConfig(num_hidden_layers=2, layer_types=kinds))


def test_static_scales_are_found_and_used(tiny_llama, decibel):
    model = tiny_llama()
    assert static_scales(model) is None
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    model.config.quantization_config = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    with pytest.raises(LlmqError, match=r"layers\.0\.self_attn\.k_scale is missing"):
        static_scales(model)
    seen = DynamicCache(config=model.config)
    want = feed(model, seen, 150)
    for layer, kept in zip(model.model.layers, seen.layers, strict=True):
        for name, states in (("k_scale", kept.keys), ("v_scale", kept.values)):
            layer.self_attn.register_buffer(name, states.abs().max()[None] / 127.5)
    scales = static_scales(model)
    assert set(scales) == {0, 1}
    good = decibel(feed(model, llmq.QuantizedCache(model.config, scales=scales), 32), want)
    assert 30 < good < 55
    wrong = {i: (k * 20, v * 20) for i, (k, v) in scales.items()}
    assert decibel(feed(model, llmq.QuantizedCache(model.config, scales=wrong), 32), want) < good - 10
    scheme["num_bits"] = 4
    with pytest.raises(LlmqError, match="num_bits"):
        static_scales(model)
    model.config.quantization_config["kv_cache_scheme"] = 8
    with pytest.raises(LlmqError, match="kv_cache_scheme is 8; it must be of type dict"):
        static_scales(model)


@pytest.mark.parametrize(("kv", "entry"), [("tensor", "fp8"), ("head", "fp8"), ("tensor", "int8"), ("head", "int8")])
def test_static_scales_mean_what_stock_transformers_takes_them_for(kv, entry, tiny_checkpoint, prose, tmp_path):
    """compressed-tensors simulates the cache; with everything quantized ours gives the same bits."""
    from transformers import AutoModelForCausalLM

    from llmq.pipeline.plan import prepare
    from llmq.pipeline.run import quantize
    from llmq.recipe import Recipe

    text = tmp_path / "text.txt"
    text.write_text(prose(800))
    options = {"method": "rtn", "bits": 8, "group_size": 32, "kv_bits": 8, "kv": kv, "kv_dtype": entry}
    recipe = Recipe(**options, calib=str(text), samples=4, seq_len=64)
    quantize(prepare(str(tiny_checkpoint()), recipe, "cpu"), tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = llmq.load(tmp_path / "out", dtype=torch.float32, device="cpu", backend="reference")
    with torch.no_grad():
        want = stock(IDS).logits
        got = ours(IDS, past_key_values=llmq.QuantizedCache.for_model(ours, window=0)).logits
        plain = ours(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (plain - want).abs().max() > 1e-3
