"""The cache with room gives what transformers' own gives, without making tensors for every token."""

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from llmq.calibration.preallocated import _PreallocatedLayer, preallocated_cache

IDS = torch.arange(2, 42).reshape(2, 20)


def feed(model, cache):
    with torch.no_grad():
        return torch.cat([model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(20)], dim=1)


def test_it_equals_the_cache_that_grows(tiny_llama):
    model = tiny_llama()
    cache = preallocated_cache(model.config, 20)
    want = feed(model, DynamicCache(config=model.config))
    assert torch.equal(feed(model, cache), want)
    assert cache.layers[0].keys.data_ptr() == cache.layers[0].rooms[0].data_ptr()
    assert cache.layers[0].rooms[0].shape[2] == cache.get_seq_length() == 20
    cache.reset()
    assert torch.equal(feed(model, cache), want)


def test_sliding_layers_keep_their_own():
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = preallocated_cache(config, 20)
    assert not any(isinstance(layer, _PreallocatedLayer) for layer in cache.layers)
    assert torch.equal(feed(model, cache), feed(model, DynamicCache(config=config)))
