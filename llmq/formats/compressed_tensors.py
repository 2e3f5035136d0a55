"""compressed-tensors: a scheme for each group of modules, weights packed along K or kept as int8.

pack-quantized (weights only), b bits:
    weight_packed      int32 [N, ceil(K*b/32)]   row n: codes of k = 0, 1, ... from the lowest bit on, dense
    weight_scale       float [N, G]              [1] for one scale per tensor
    weight_shape       int64 [2]                 N, K
    weight_zero_point  int32 [ceil(N*b/32), G]   asymmetric: packed along N;  int8 [1], unpacked, per tensor
int-quantized (weights and int8 activations):
    weight             int8  [N, K]
    weight_scale       float [N, G] or [1]
    weight_zero_point  int8, shaped as the scale   asymmetric
    input_scale        float [1]                   static activations

The library's integers are signed: w = scale * (q - zero_point) with q = code - 2^(b-1), zero_point = zero - 2^(b-1).
Packing adds 2^(b-1) back, so what is packed are the unsigned codes and zeros themselves. The dense packing of widths
that do not divide 32 is that of compressed-tensors 0.19 and later (0.17 put ten 3-bit codes in a word), vLLM 0.32.

Config: `config_groups.group_N` has `targets` (module names, `re:` patterns, or the class "Linear") and a scheme;
`ignore` takes modules out again. Where a model has several schemes all its modules are listed by name, none by class:
vLLM looks for the class of a fused q/k/v before the names of its parts, and would take the wrong scheme. An output head
is always listed by name: it is no "Linear" in vLLM.

Key-value cache, int8 with static scales: `kv_cache_scheme` in the config, and beside the linears of each attention
    k_scale, v_scale   float [1] (strategy "tensor") or [H, 1, 1] ("attn_head"), of rotated keys and of values

Not here: how the scales of the cache are found (kv_scales.py) and read back (integrations/cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.errors import printable
from llmq.formats import _common, _reading
from llmq.formats._bits import pack_words, unpack_words, width
from llmq.grids.int import Int
from llmq.types import ActivationGrid, LinearSpec, LlmqError, Params, QTensor, Scheme

_EXTRA: dict[str, Any] = {
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
}
_KV_WARNING = (
    "vLLM 0.32 refuses to load a file with static int8 scales of the key-value cache (it takes fp8 ones, and its own "
    "int8 cache is dynamic); llmq and transformers read it: leave --kv-bits out for vLLM"
)
_FLOATS = {  # what a format's name says of weights that are no integers
    "float-quantized": "FP8",
    "naive-quantized": "FP8",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
}
_INTEGERS = "integers of 2 to 8 bits per group, channel or tensor, in the original column order"


@dataclass(frozen=True)
class _Group:
    """A config group: its name and scheme, and the dict it came from, whose other keys (observer, ...) are kept."""

    name: str
    scheme: Scheme
    source: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        weights, inputs = _args(self.scheme)
        if weights["strategy"] != "group":
            del weights["group_size"]  # None or -1, as the source has it
        known: dict[str, Any] = {"weights": _update(self.source["weights"], weights), "format": _format(self.scheme)}
        if inputs is not None:
            known["input_activations"] = _update(self.source["input_activations"], inputs)
        return _update(self.source, known)


@dataclass
class CompressedTensors:
    """The compressed-tensors checkpoint format: pack-quantized and int-quantized, each module its own scheme.

    kv: the strategy of the key-value cache's static scales, "tensor" or "attn_head", None without.
    groups, ignore: what is quantized how, as read from a checkpoint.
    extra: what llmq does not interpret of the config.
    """

    kv: str | None = None
    quant_method: str = field(default="compressed-tensors", init=False)
    groups: tuple[_Group, ...] = field(default=(), init=False, repr=False)
    ignore: list[str] = field(default_factory=list, init=False, repr=False)
    extra: dict[str, Any] = field(default_factory=lambda: dict(_EXTRA), init=False, repr=False)

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset({"weight_shape"})

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype, as the peers do."""
        return model_dtype

    def plan(self, linears: Sequence[LinearSpec]) -> list[str]:
        """Refuse what the files cannot hold; return warnings about readers. Raises LlmqError."""
        if not linears:
            raise LlmqError("no linear is left to quantize; skip fewer modules")
        for spec in linears:
            _common.int_grid(spec, "compressed-tensors")
            _common.groups(spec)
            activation = spec.scheme.activation
            if activation is not None and activation.bits != 8:
                raise LlmqError(f"{spec.name}: activations have 8 bits in compressed-tensors, not {activation.bits}")
        return [*_warnings(linears), *([_KV_WARNING] if self.kv else [])]

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear, scales in the dtype they have.

        Raises LlmqError for a weight in activation order.
        """
        if q.g_idx is not None:
            raise LlmqError(
                "compressed-tensors (0.20) has no weights in activation order; leave desc_act out, or use "
                "--format gptq:desc_act=true, which GPTQModel and llmq read and vLLM does not"
            )
        grid: Any = q.grid
        half = 2 ** (grid.bits - 1)
        scale, zero = (p[:1, 0] if grid.per_tensor else p for p in (q.params.scale, q.params.zero))
        packed = spec.scheme.activation is None
        tensors = {"weight_scale": scale.contiguous()}
        if packed:
            tensors["weight_packed"] = pack_words(q.codes, grid.bits)
            tensors["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
        else:
            tensors["weight"] = (q.codes - half).view(torch.int8)  # modulo 256, which is two's complement
        if not grid.sym:
            in_words = packed and not grid.per_tensor
            tensors["weight_zero_point"] = (
                pack_words(zero.t().to(torch.uint8), grid.bits).t().contiguous()
                if in_words
                else (zero - half).to(torch.int8)
            )
        if q.input is not None:
            tensors["input_scale"] = q.input.scale
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor."""
        found = _reading.checked(tensors, self.layout(spec), spec, self.derived)
        grid = spec.scheme.weight
        half = 2 ** (grid.bits - 1)
        scale = found["weight_scale"].reshape(1 if grid.per_tensor else (spec.N, -1))
        if "weight" in found:
            codes = found["weight"].view(torch.uint8) + half
        else:
            codes = unpack_words(found["weight_packed"], grid.bits, spec.K)
            shape = found["weight_shape"].tolist() if "weight_shape" in found else [spec.N, spec.K]
            if shape != [spec.N, spec.K]:
                raise LlmqError(f"{spec.name}.weight_shape is {shape}, not {[spec.N, spec.K]}")
        zero = found.get("weight_zero_point")
        if zero is None:
            zero = torch.full(scale.shape, half, dtype=torch.int32, device=scale.device)
        elif "weight" in found or grid.per_tensor:
            zero = zero.to(torch.int32).reshape(scale.shape) + half
        else:
            zero = unpack_words(zero.t(), grid.bits, spec.N).t().to(torch.int32).contiguous()
        params = Params(scale, zero)
        if grid.per_tensor:
            params = params.map(lambda p: p.expand(spec.N, 1).contiguous())
        static = None
        if "input_scale" in found:
            input_scale = found["input_scale"].reshape(1)
            static = Params(input_scale, torch.full((1,), 128, dtype=torch.int32, device=scale.device))
        q = QTensor(codes, params, grid, None, static)
        return _reading.sound(q, spec, "weight_scale", "weight_zero_point")

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
        grid, N, K, G = spec.scheme.weight, spec.N, spec.K, _common.groups(spec)

        def meta(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        per_scale = (1,) if grid.per_tensor else (N, G)
        tensors = {"weight_scale": meta(*per_scale, dtype=grid.scale_dtype)}
        activation = spec.scheme.activation
        packed = activation is None
        if activation is None:
            tensors["weight_packed"] = meta(N, width(K, grid.bits), dtype=torch.int32)
            tensors["weight_shape"] = meta(2, dtype=torch.int64)
        else:
            tensors["weight"] = meta(N, K, dtype=torch.int8)
            if not activation.dynamic:
                tensors["input_scale"] = meta(1, dtype=grid.scale_dtype)
        if not grid.sym and packed and not grid.per_tensor:
            tensors["weight_zero_point"] = meta(width(N, grid.bits), G, dtype=torch.int32)
        elif not grid.sym:
            tensors["weight_zero_point"] = meta(*per_scale, dtype=torch.int8)
        return tensors

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`.

        Targets and ignore lists read from a checkpoint are kept while they still say what each module becomes, else
        written anew.
        """
        groups, ignore = self.groups, self.ignore
        scheme_of = _Lookup(groups, ignore)
        same = all(_same(scheme_of(s.name), s.scheme) for s in linears) and not any(map(scheme_of, skipped))
        if not same or not groups:
            groups, ignore = _new_groups(linears), list(skipped)
        formats = {_format(g.scheme) for g in groups}
        return (
            self.extra
            | _kv_scheme(self.kv)
            | {
                "quant_method": "compressed-tensors",
                "quantization_status": "compressed",
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "config_groups": {group.name: group.config() for group in groups},
                "ignore": ignore,
            }
        )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[CompressedTensors, Callable[[str, int, int], Scheme | None]]:
        """Return the format of a compressed-tensors `quantization_config` and the scheme of each linear by its name.

        Raises LlmqError for float8 and other formats, sparsity, transforms, activation order with g_idx, targets that
        are no linears, and activations other than int8 per token or static symmetric per tensor.
        """
        sparsity = _reading.optional(config, "sparsity_config", dict, {})
        if (sparsity.get("format") or "dense") != "dense" or config.get("transform_config"):
            raise LlmqError(
                f"quantization_config has sparsity or transforms, which llmq does not read; {_reading.REQUANTIZE}"
            )
        form = cls()
        groups = _reading.optional(config, "config_groups", dict, {})
        form.groups = tuple(_read_group(n, g, config) for n, g in groups.items())
        form.ignore = _reading.strings(config, "ignore")
        _reading.optional(config, "kv_cache_scheme", dict, {})
        interpreted = {"quant_method", "quantization_status", "format", "config_groups", "ignore"}
        form.extra = {k: v for k, v in config.items() if k not in interpreted}
        lookup = _Lookup(form.groups, form.ignore)
        return form, lambda name, N, K: lookup(name)


class _Lookup:
    """The scheme of a linear by its name: ignored, exact target, `re:` target, "Linear", in this order.

    As compressed_tensors.utils.match.match_targets, names and patterns each in alphabetical order.
    """

    def __init__(self, groups: Sequence[_Group], ignore: Sequence[str]) -> None:
        self.targets = {target: group.scheme for group in groups for target in group.source["targets"]}
        self.patterns = _patterns(sorted(self.targets))
        self.ignored = set(ignore)
        self.ignored_patterns = _patterns(ignore)

    def __call__(self, name: str) -> Scheme | None:
        if not self.ignored.isdisjoint((name, "Linear")) or self.ignored_patterns.first(name) is not None:
            return None
        if name in self.targets:
            return self.targets[name]
        return self.targets.get(self.patterns.first(name) or "Linear")


def _patterns(targets: Sequence[str]) -> _reading.Patterns:
    return _reading.Patterns({t: t.removeprefix("re:") for t in targets if t.startswith("re:")})


def _kv_scheme(strategy: str | None) -> dict[str, Any]:
    if strategy is None:
        return {}
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False}
    return {"kv_cache_scheme": args | {"group_size": None, "block_structure": None, "actorder": None}}


def _update(source: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `source` with the values of `known` for the keys that it has."""
    return {k: known.get(k, v) for k, v in source.items()}


def _format(scheme: Scheme) -> str:
    return "pack-quantized" if scheme.activation is None else "int-quantized"


def _args(scheme: Scheme) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the arguments of the weights and of the input activations."""
    grid = scheme.weight
    strategy = "tensor" if grid.per_tensor else "group" if grid.group_size else "channel"
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.sym}
    weights |= {"strategy": strategy, "group_size": grid.group_size, "dynamic": False}
    if scheme.activation is None:
        return weights, None
    dynamic = scheme.activation.dynamic
    inputs = {"num_bits": 8, "type": "int", "symmetric": scheme.activation.sym}
    inputs |= {"strategy": "token" if dynamic else "tensor"}
    return weights, inputs | {"group_size": None, "dynamic": dynamic}


def _same(a: Scheme | None, b: Scheme) -> bool:
    return a is not None and _args(a) == _args(b)


def _new_groups(linears: Sequence[LinearSpec]) -> tuple[_Group, ...]:
    """Return a group for each scheme, in the order they appear; the only one targets every Linear, and the head."""
    members: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        members.setdefault(str(_args(spec.scheme)), []).append(spec)
    groups: list[_Group] = []
    for specs in members.values():
        weights, inputs = _args(specs[0].scheme)
        outside = [s.name for s in specs if _common.block_path(s.name) is None]
        targets = ["Linear", *outside] if len(members) == 1 else [s.name for s in specs]
        source = {"targets": targets, "weights": weights, "input_activations": inputs}
        source |= {"output_activations": None, "format": None}
        groups.append(_Group(f"group_{len(groups)}", specs[0].scheme, source))
    return tuple(groups)


def _read_group(name: str, group: Any, config: Mapping[str, Any]) -> _Group:
    """Parse one config group. Raises LlmqError for what llmq does not read, naming it."""
    where = f"config_groups.{printable(name, 80)}"
    if not isinstance(group, dict) or not group.get("weights") or not group.get("targets"):
        raise LlmqError(f"quantization_config.{where} lacks targets or weight arguments; {_reading.REQUANTIZE}")
    for target in _reading.strings(group, "targets"):
        if target[:1].isupper() and target != "Linear":
            said = f"targets {printable(target, 80)} modules; llmq reads Linear ones"
            raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    if group.get("output_activations"):
        said = "quantizes outputs, which llmq does not read"
        raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    stored = _reading.optional(group, "format", str, _reading.optional(config, "format", str, ""))
    weights = _reading.field(group, "weights", dict, f"quantization_config.{where}")
    if weights.get("type") == "float":
        said = f"holds {_FLOATS.get(stored, 'float')} weights ({printable(stored, 40)}), which vLLM runs; llmq reads"
        raise LlmqError(f"quantization_config.{where} {said} {_INTEGERS}: {_reading.REQUANTIZE}")
    inputs = _reading.optional(group, "input_activations", dict, {})
    scheme = Scheme(_read_weights(weights, f"{where}.weights"), _read_inputs(inputs, f"{where}.input_activations"))
    _reading.need({"format": stored}, "format", (_format(scheme),), f"{where} is stored in another way")
    return _Group(name, scheme, group)


def _read_weights(args: Mapping[str, Any], where: str) -> Int:
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    _only(args, {"symmetric": (True, False), "num_bits": tuple(range(2, 9)), "type": ("int",)}, where, _INTEGERS)
    # another actorder would come with a weight_g_idx
    _only(args, {"dynamic": (False,), "actorder": (False, "weight", "static")}, where, _INTEGERS)
    _only({"strategy": strategy}, {"strategy": ("tensor", "channel", "group")}, where, _INTEGERS)
    group_size = _reading.group_size_of(args) if strategy == "group" else None
    sym = _reading.optional(args, "symmetric", bool, True)
    return Int(_reading.optional(args, "num_bits", int, 8), sym, group_size, per_tensor=strategy == "tensor")


def _read_inputs(args: Mapping[str, Any], where: str) -> ActivationGrid | None:
    if not args:
        return None
    dynamic = args.get("dynamic") is True
    possible = {"num_bits": (8,), "type": ("int",), "dynamic": (True, False)}
    possible |= {"symmetric": (True, False) if dynamic else (True,), "strategy": ("token" if dynamic else "tensor",)}
    _only(args, possible, where, "int8, per token dynamic or symmetric per tensor static")
    return ActivationGrid(dynamic=dynamic, sym=args.get("symmetric") is not False)


def _only(args: Mapping[str, Any], possible: Mapping[str, Sequence[Any]], where: str, reads: str) -> None:
    """Raise LlmqError for an argument that is given and none of those possible (nor of their type: 4.0 is no 4)."""
    for key, values in possible.items():
        given = args.get(key)
        if given is not None and not any(type(given) is type(v) and given == v for v in values):
            said = f"{where}.{key} is {printable(repr(given), 80)}; llmq reads {reads}"
            raise LlmqError(f"quantization_config.{said}: {_reading.REQUANTIZE}")


def _warnings(linears: Sequence[LinearSpec]) -> list[str]:
    weight_only = [s.scheme.weight for s in linears if s.scheme.activation is None]
    warnings = _common.fused_warnings(linears)
    if any(not grid.sym for grid in weight_only) and all(_same(linears[0].scheme, s.scheme) for s in linears):
        warnings.append(
            "stock transformers loads asymmetric pack-quantized weights only with "
            "CompressedTensorsConfig(dequantize=True)"
        )
    elif any(not grid.sym for grid in weight_only):
        # 5.23, integrations/compressed_tensors.py: get_dense_scheme takes the first group for every module
        warnings.append(
            "stock transformers cannot load asymmetric pack-quantized weights beside another scheme: dequantize=True, "
            "which they need, decodes every module by the first config group and so computes rubbish without a word"
        )
    if odd := sorted({grid.bits for grid in weight_only} - {4, 8}):
        widths = ", ".join(map(str, odd))
        warnings.append(f"vLLM 0.32 reads weights of {widths} bits on NVIDIA GPUs alone, with its humming kernels")
    if any(grid.bits == 8 for grid in weight_only):
        warnings.append("vLLM 0.32 reads 8-bit weights, alone or beside others, on GPUs, not on CPUs")
    if any(grid.per_tensor for grid in weight_only):
        warnings.append("vLLM reads weight-only quantization per group or per channel, not per tensor")
    if any(s.scheme.activation is not None and not s.scheme.weight.sym for s in linears):
        warnings.append("vLLM reads int8 activations with symmetric weights only")
    activations = [s.scheme.activation for s in linears if s.scheme.activation is not None]
    if any(not a.sym for a in activations):
        warnings.append(
            "vLLM 0.32 multiplies asymmetric activations right on NVIDIA GPUs (CUTLASS) and on CPUs with VNNI; its "
            "product saturates on other CPUs, where the model speaks rubbish, and AMD's GPUs do not have it"
        )
    if any(not (a.sym and a.dynamic) for a in activations):
        warnings.append("SGLang 0.5 ignores static scales and zero points: it quantizes every token symmetrically")
    return warnings
