"""compressed-tensors: a scheme for each group of modules, each stored in a way of its own.

    pack-quantized, int-quantized                                 integers          _ct_integers.py
    float-quantized, mxfp8-quantized                              small floats      _ct_floats.py
    nvfp4-pack-quantized, mxfp4-pack-quantized

Config: `config_groups.group_N` has `targets` (module names, `re:` patterns, or a class, "Linear") and a scheme;
`ignore` takes modules out again. Where blocks have several schemes all linears are listed by name, none by class: vLLM
looks for the class of a fused q/k/v before the names of its parts, and would take the wrong scheme. An output head is
always listed by name: it is no "Linear" in vLLM. Embeddings are the class "Embedding", symmetric integers alone;
where the head is tied to one, that one's tensors are the head's too.

Key-value cache, E4M3 or int8 with static scales: `kv_cache_scheme` in the config, and beside each attention's linears
    k_scale, v_scale   float [1] (strategy "tensor") or [H, 1, 1] ("attn_head"), of rotated keys and of values

Not here: the tensors of a linear (_ct_*.py), reading and writing `config_groups` (_config_groups.py), what runtimes
take (_ct_limits.py), how the scales of the cache are found (kv_scales.py) and read back (integrations/cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from llmq.formats import _common, _ct_floats, _ct_integers, _ct_limits, _reading
from llmq.formats._config_groups import EMBEDDING, LINEAR, Group, Lookup, new_groups, read_group
from llmq.formats._ct_arguments import same_scheme
from llmq.formats._folder import Folder
from llmq.granularity import PerBlock, PerTensor
from llmq.grids._float import FloatGrid
from llmq.readers import Limit, Reader, readers, told
from llmq.types import AffineGrid, LinearSpec, LlmqError, QTensor, Scheme

_NAME = "compressed-tensors"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_EXTRA: dict[str, Any] = {
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
}


@dataclass
class CompressedTensors(Folder):
    """The compressed-tensors checkpoint format: integers and small floats, each module its own scheme.

    kv: the strategy of the key-value cache's static scales, "tensor" or "attn_head", None without.
    kv_dtype: of its entries, "fp8" or "int8".
    scales: the dtype of scales, as XNNPACK holds bfloat16 alone; None is the model's.
    groups, ignore: what is quantized how, as read from a checkpoint.
    extra: what llmq does not interpret of the config.
    """

    kv: str | None = None
    kv_dtype: str = "fp8"
    scales: Literal["bfloat16", "float16", "float32"] | None = None
    quant_method: str = field(default=_NAME, init=False)
    embeddings: ClassVar[bool] = True
    groups: tuple[Group, ...] = field(default=(), init=False, repr=False)
    ignore: list[str] = field(default_factory=list, init=False, repr=False)
    extra: dict[str, Any] = field(default_factory=lambda: dict(_EXTRA), init=False, repr=False)

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset({"weight_shape"})

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype, as the peers do, unless another is asked for."""
        return model_dtype if self.scales is None else _DTYPES[self.scales]

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what the files cannot hold; return warnings about readers. Raises LlmqError."""
        _common.refuse_none(linears)
        for spec in linears:
            _storage(spec).refuse(spec)
            if spec.embedding:
                _refuse_table(spec.name, spec.scheme)
        _common.refuse_misfits(linears, self.misfit)
        return told(self._limits(linears, skipped))

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return readers(_ct_limits.READERS, self._limits(linears, skipped))

    def _limits(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
        read = _reading.optional(self.extra, "kv_cache_scheme", dict, {})
        strategy = self.kv or read.get("strategy")
        dtype = "fp8" if read.get("type") == "float" else "int8" if read else self.kv_dtype
        return [*_ct_limits.limits(linears, skipped), *_ct_limits.of_cache(strategy, dtype)]

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear, scales in the dtype they have.

        Raises LlmqError for a weight in activation order.
        """
        if q.g_idx is not None:
            raise LlmqError(
                "compressed-tensors (0.20) has no weights in activation order; leave desc_act out, or use "
                "--format gptq:desc_act=true, which GPTQModel and llmq read and vLLM does not"
            )
        return _storage(spec).pack(q, spec)

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor."""
        return _storage(spec).unpack(_reading.checked(tensors, self.layout(spec), spec, self.derived), spec)

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
        return _storage(spec).layout(spec)

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`.

        Targets and ignore lists read from a checkpoint are kept while they still say what each module becomes, else
        written anew.
        """
        groups, ignore = self.groups, self.ignore
        scheme_of = Lookup(groups, ignore)
        same = all(same_scheme(scheme_of(s.name, _kind(s)), s.scheme) for s in linears)
        same = same and not any(map(scheme_of, skipped))
        if not same or not groups:
            groups, ignore = new_groups(linears), list(skipped)
        formats = {group.format for group in groups}
        return (
            self.extra
            | _kv_scheme(self.kv, self.kv_dtype)
            | {
                "quant_method": _NAME,
                "quantization_status": "compressed",
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "config_groups": {group.name: group.config() for group in groups},
                "ignore": ignore,
            }
        )

    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `Format.stacked`; one shape is that of all."""
        found = super().stacked(parts)
        if "weight_shape" in found:
            N, K = found["weight_shape"].view(-1, 2).T
            found["weight_shape"] = torch.stack([N.sum(), K[0]])
        return found

    def embedding(self, name: str) -> Scheme | None:
        """See `Format.embedding`. Raises LlmqError for one that is no symmetric integers."""
        scheme = Lookup(self.groups, self.ignore)(name, EMBEDDING)
        if scheme is not None:
            _refuse_table(name, scheme)
        return scheme

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[CompressedTensors, Callable[[str], Scheme | None]]:
        """Return the format of a compressed-tensors `quantization_config` and the scheme of each linear by its name.

        Raises LlmqError for other formats than those above, sparsity, transforms, activation order with g_idx, targets
        that are no linears, and activations of other kinds than llmq quantizes them to.
        """
        sparsity = _reading.optional(config, "sparsity_config", dict, {})
        if (sparsity.get("format") or "dense") != "dense" or config.get("transform_config"):
            raise LlmqError(
                f"quantization_config has sparsity or transforms, which llmq does not read; {_reading.REQUANTIZE}"
            )
        form = cls()
        groups = _reading.optional(config, "config_groups", dict, {})
        form.groups = tuple(read_group(n, g, config) for n, g in groups.items())
        form.ignore = _reading.strings(config, "ignore")
        _reading.optional(config, "kv_cache_scheme", dict, {})
        interpreted = {"quant_method", "quantization_status", "format", "config_groups", "ignore"}
        form.extra = {k: v for k, v in config.items() if k not in interpreted}
        lookup = Lookup(form.groups, form.ignore)
        return form, lookup


def _kind(spec: LinearSpec) -> str:
    return EMBEDDING if spec.embedding else LINEAR


def _refuse_table(name: str, scheme: Scheme) -> None:
    """Raise LlmqError for an embedding whose rows cannot be looked up one by one: zeros are packed across them."""
    grid, by = scheme.weight, scheme.weight.granularity
    if not isinstance(grid, AffineGrid) or not grid.sym or scheme.activation or isinstance(by, PerTensor | PerBlock):
        raise LlmqError(
            f"{name}: an embedding is symmetric integers with scales per row or group, not {type(grid).__name__} "
            f"{by}; say --embeddings 8, or int:bits=4:group=32"
        )


class Storage(Protocol):
    """A way in which linears are stored: what `Format` asks of one linear, its tensors checked already."""

    def refuse(self, spec: LinearSpec) -> None:
        """Raise LlmqError for a scheme that cannot be stored so."""

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """See `Format.layout`."""

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See `Format.pack`."""

    def unpack(self, found: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """See `Format.unpack`."""


def _storage(spec: LinearSpec) -> Storage:
    return _ct_floats if isinstance(spec.scheme.weight, FloatGrid) else _ct_integers


def _kv_scheme(strategy: str | None, dtype: str) -> dict[str, Any]:
    if strategy is None:
        return {}
    args: dict[str, Any] = {"num_bits": 8, "type": "float" if dtype == "fp8" else "int", "symmetric": True}
    args["dynamic"] = False
    args |= {"strategy": strategy, "group_size": None, "block_structure": None, "actorder": None}
    return {"kv_cache_scheme": args}
