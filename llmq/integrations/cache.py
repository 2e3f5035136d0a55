"""transformers: a quantized key-value cache, and an attention function that reads it packed.

    cache = llmq.QuantizedCache(model.config, bits=8)
    model.generate(**inputs, past_key_values=cache)

`QuantizedCache` is a `Cache` whose layers derive from transformers' `DynamicLayer`. What attention sees is always
what the cache holds, in the first call too: the latest tokens in float, all others as they were quantized.

By default `update` decodes the store for whatever attention the model has. `packed_attention(model)` registers the
attention implementation "llmq" and sets it on the model, until the `with` statement ends: attention then reads the
packed store a tile at a time, and the float keys and values never exist as a whole. On a GPU the store is that of our
Triton kernels where they can hold it, and they read it for a step of decode.
Not here: the arithmetic (runtime/kv.py, runtime/triton_kv.py), static scales on disk (formats/compressed_tensors.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmq.guard.reading import field
from llmq.integrations.static_cache import StaticQuantizedLayer
from llmq.model.config import head_dim
from llmq.runtime import triton_kv
from llmq.runtime.kv import RUN, TILE, KVGrid, Store, attend
from llmq.runtime.triton_kv import KernelStore
from llmq.types import LlmqError

ATTENTION = "llmq"
"""The name of the attention implementation."""
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
_FEW = 32  # queries for which the kernels read the cache: more are a prefill, for which tiles are decoded once
WINDOW = 64
"""How many of the latest tokens may stay in float, if nothing else is asked for."""


class QuantizedCache(Cache):
    """A key-value cache of int8 or int4 entries, for `past_key_values=`.

    config: the model's. A layer with a window keeps all tokens, as one without does; its mask is what shuts them out.
        Raises LlmqError where a layer has no keys and values (linear attention) or a head cannot be packed.
    bits: 8 or 4 (2 exists to be measured: it is not usable).
    keys: "token", a scale for each token and head, or "channel", one for each channel of 64 tokens; None is "token" for
        8 bits and "channel" below. Values are quantized per token and head.
    window: at most so many of the latest tokens are in float; a multiple of 64 with keys per channel.
    scales: static scales by layer, `(keys, values)`, each `[1]` or `[H, 1, 1]`; 8 bits only. See `static_scales`.
    fp8: whether those are for E4M3 entries, not for int8.
    max_cache_len: take room for so many tokens at once and stay there, so that a compiled `generate` can record a step;
        attention then decodes all of it (static_cache.py). None grows as tokens come.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 8,
        *,
        keys: str | None = None,
        window: int = WINDOW,
        scales: Mapping[int, tuple[Tensor, Tensor]] | None = None,
        fp8: bool = False,
        max_cache_len: int | None = None,
    ) -> None:
        text = config.get_text_config(decoder=True)
        axis = keys or ("token" if bits == 8 or scales else "channel")
        _check(text, bits, axis, window, scales)
        if max_cache_len is not None and max_cache_len < 1:
            raise LlmqError(f"max_cache_len is {max_cache_len}; it must be at least 1")
        layers: list[Any] = []
        for i in range(len(_kinds(text))):
            static = (None, None) if scales is None else scales[i]
            grids = KVGrid(bits, axis, static[0], fp8), KVGrid(bits, "token", static[1], fp8)
            if max_cache_len is None:
                layers.append(QuantizedLayer(*grids, window, text))
            else:
                layers.append(StaticQuantizedLayer(*grids, window, max_cache_len))
        super().__init__(layers=layers)
        self.bits, self.window = bits, window

    @classmethod
    def for_model(cls, model: PreTrainedModel, bits: int = 8, **options: Any) -> QuantizedCache:
        """Return an empty cache for `model`, with the static scales that its checkpoint came with at 8 bits."""
        scales = static_scales(model) if bits == 8 else None
        fp8 = scales is not None and _scheme(model)["type"] == "float"
        return cls(model.config, bits, scales=scales, fp8=fp8, **options)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, the float window and the room to grow included."""
        layers: list[Any] = self.layers
        return sum(layer.nbytes for layer in layers)


class QuantizedLayer(DynamicLayer):
    """One layer: two packed stores, and behind them a window of float tokens in `keys` and `values`."""

    is_croppable = True
    keys: Any  # tensors once there are tokens, None before
    values: Any
    _quantized_keys: Any  # a Store each, or a KernelStore
    _quantized_values: Any

    def __init__(self, key_grid: KVGrid, value_grid: KVGrid, window: int, config: Any) -> None:
        super().__init__()
        self.cumulative_length = 0
        self._grids = key_grid, value_grid
        self._quantized_keys, self._quantized_values = (Store(grid) for grid in self._grids)
        self.window = window
        self.run = max(key_grid.run, value_grid.run)
        self._config = config

    def get_seq_length(self) -> int:
        """Return how many tokens the layer holds."""
        return self.cumulative_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens `[B, H, T, D]`; return all keys and values, or a handle on them for the packed attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._quantized_keys, self._quantized_values = triton_kv.stores(self._grids, key_states)
            shape = (*key_states.shape[:2], 0)
            self.keys, self.values = (t.new_empty(*shape, t.shape[3]) for t in (key_states, value_states))
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.cumulative_length += key_states.shape[2]
        leaving = -(-max(0, self.keys.shape[2] - self.window) // self.run) * self.run
        leaving = min(leaving, self.keys.shape[2] // self.run * self.run)
        if leaving:
            self._quantized_keys.append(self.keys[:, :, :leaving])
            self._quantized_values.append(self.values[:, :, :leaving])
            self.keys, self.values = self.keys[:, :, leaving:].clone(), self.values[:, :, leaving:].clone()
        if self._config._attn_implementation == ATTENTION:
            return _Handle.of(self, key_states), _Handle.of(self, value_states)
        return self._whole(self._quantized_keys, self.keys), self._whole(self._quantized_values, self.values)

    def _whole(self, store: Store | KernelStore, window: Tensor) -> Tensor:
        return torch.cat([store.decode(self.dtype), window], dim=2) if store.length else window

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield float32 keys and values `[B, H, t, D]`, oldest first, at most `TILE` tokens at once."""
        stores = self._quantized_keys, self._quantized_values
        for start in range(0, stores[0].length, TILE):
            end = min(start + TILE, stores[0].length)
            keys, values = (s.decode(torch.float32, start, end) for s in stores)
            yield keys, values
        if self.keys.shape[2]:
            yield self.keys.float(), self.values.float()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        window = self.keys.nbytes + self.values.nbytes if self.is_initialized else 0
        return window + self._quantized_keys.nbytes + self._quantized_values.nbytes

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._quantized_keys, self._quantized_values = (Store(grid) for grid in self._grids)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest `-tokens_to_remove` tokens; with keys per channel, a cut run returns to float."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, not {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = max(0, self.cumulative_length + tokens_to_remove)
        packed = self._quantized_keys.length
        if length >= packed:
            self.keys, self.values = self.keys[:, :, : length - packed], self.values[:, :, : length - packed]
        else:
            whole = length // self.run * self.run
            rest = slice(whole, length)
            end = -(-length // self.run) * self.run
            cut = [s.decode(self.dtype, whole, end) for s in (self._quantized_keys, self._quantized_values)]
            self.keys, self.values = (t[:, :, : rest.stop - rest.start] for t in cut)
            self._quantized_keys.truncate(whole)
            self._quantized_values.truncate(whole)
        self.cumulative_length = length

    def _map(self, f: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = f(self.keys), f(self.values)
            self._quantized_keys.map(f)
            self._quantized_values.map(f)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._map(lambda t: t[indices, ...])

    def offload(self) -> None:
        """Move the layer to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the layer back to its device."""
        if self.is_initialized and self.keys.device != self.device:
            self._map(lambda t: t.to(self.device, non_blocking=True))


class _Handle(Tensor):
    """Stands for a layer's keys or values on the way to the packed attention; every other use is an error."""

    layer: QuantizedLayer

    @classmethod
    def of(cls, layer: QuantizedLayer, states: Tensor) -> Any:
        handle = states.as_subclass(cls)
        handle.layer = layer
        return handle

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LlmqError(
            f"{getattr(func, '__name__', func)} was called on packed keys or values: this model does not use the "
            f"attention implementation {ATTENTION!r} that its config names; leave packed_attention() out"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to a `QuantizedCache` without decoding it whole; registered in transformers as "llmq".

    Without such a cache it hands over to transformers' own "sdpa". Returns `[B, Q, Hq, D]` and no weights.
    Raises LlmqError for dropout and for soft-capped scores.
    """
    if not isinstance(key, _Handle):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout or kwargs.get("softcap") is not None:
        raise LlmqError(
            "the attention implementation 'llmq' has neither dropout nor soft-capped scores; use model.eval()"
        )
    layer = key.layer
    length, Q = layer.get_seq_length(), query.shape[2]
    position = torch.arange(length - Q, length, device=query.device)[:, None]

    def visible(start: int, end: int) -> Tensor | None:
        if attention_mask is not None:
            return attention_mask[..., start:end]
        if end <= length - Q + 1:
            return None
        return torch.arange(start, end, device=query.device)[None] <= position

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = layer._quantized_keys, layer._quantized_values
    if isinstance(keys, KernelStore) and keys.length and attention_mask is None and Q <= _FEW:
        y = triton_kv.attend(query, keys, values, (layer.keys, layer.values), scale)
        return y.transpose(1, 2).contiguous(), None
    return attend(query, layer.tiles(), scale, visible).transpose(1, 2).contiguous(), None


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Let `model` read a `QuantizedCache` packed for the body of a `with` statement; then everything is as before.

    Raises LlmqError for a model that does not take its attention from transformers' interface.
    """
    before = model.config._attn_implementation
    registries: tuple[tuple[Any, Any], ...] = (
        (ALL_ATTENTION_FUNCTIONS, attention),
        (ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask),
    )
    replaced = [(registry, registry._global_mapping.get(ATTENTION)) for registry, _ in registries]
    for registry, function in registries:
        registry.register(ATTENTION, function)
    try:
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise LlmqError(f"{type(model).__name__} does not take its attention from transformers' interface")
        yield model
    finally:
        model.set_attn_implementation(before)
        for registry, found in replaced:
            if found is None:
                registry._global_mapping.pop(ATTENTION, None)
            else:
                registry.register(ATTENTION, found)


def static_scales(model: PreTrainedModel) -> dict[int, tuple[Tensor, Tensor]] | None:
    """Return the static scales of keys and values that a checkpoint came with, by layer; None where it has none.

    compressed-tensors' `kv_cache_scheme`, fp8 or int8: `k_scale`, `v_scale` of each attention, `[1]` or `[H, 1, 1]`.
    Raises LlmqError for another scheme, and where a layer lacks its scales.
    """
    if not _scheme(model):
        return None
    found = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if index is not None and hasattr(module, "k_proj"):
            missing = [s for s in ("k_scale", "v_scale") if not isinstance(getattr(module, s, None), Tensor)]
            if missing:
                raise LlmqError(
                    f"{name}.{missing[0]} is missing, but config.json has a kv_cache_scheme: quantize again, or "
                    "remove it"
                )
            found[index] = (module.k_scale, module.v_scale)
    return found


def _scheme(model: PreTrainedModel) -> Mapping[str, Any]:
    """Return the `kv_cache_scheme` of a model's config; nothing where there is none. Raises as `static_scales`."""
    said = dict(getattr(model.config, "quantization_config", None) or {})
    if not said.get("kv_cache_scheme"):
        return {}
    scheme = {"type": "int"} | field(said, "kv_cache_scheme", dict, "quantization_config")
    possible = {"num_bits": (8,), "type": ("int", "float"), "symmetric": (True,), "dynamic": (False,)}
    for key, values in possible.items():
        if scheme.get(key, values[0]) not in values:
            raise LlmqError(f"kv_cache_scheme.{key} is {scheme[key]!r}; llmq reads static symmetric int8 and fp8")
    return scheme


def _kinds(config: Any) -> list[str]:
    """Return what each layer that has a cache of its own computes, as transformers calls it."""
    return list(get_layer_types_and_kwargs(config)[0])


def check_bits(bits: int) -> None:
    """Raise LlmqError for bits that no cache has."""
    if bits not in (8, 4, 2):
        raise LlmqError(f"bits of a cache are 8 or 4, not {bits}")


def _check(config: Any, bits: int, keys: str, window: int, scales: Mapping[int, Any] | None) -> None:
    if others := set(_kinds(config)) - _ATTENDING:
        raise LlmqError(f"a quantized cache takes attention in every layer, not {', '.join(sorted(others))}")
    check_bits(bits)
    if keys not in ("token", "channel"):
        raise LlmqError(f"keys are quantized per 'token' or per 'channel', not {keys!r}")
    if window < 0 or (keys == "channel" and (window < RUN or window % RUN)):
        raise LlmqError(
            f"with keys per {keys} the window is {f'a multiple of {RUN}' if keys == 'channel' else '0 or more'}"
        )
    D = head_dim(config)
    if D * bits % 8:
        raise LlmqError(f"a head of {D} channels does not fill whole bytes at {bits} bits; use bits=8")
    if scales is not None and (bits != 8 or keys != "token" or set(scales) != set(range(len(_kinds(config))))):
        raise LlmqError("static scales are for 8 bits, keys per token, and one pair for each layer")
