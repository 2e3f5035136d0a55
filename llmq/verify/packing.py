"""What a `quantization_config` says of each linear, read anew: how it is stored, and which tensors it then has.

    gptq                `dynamic` (first rule that matches; "-:" leaves a linear float, others change its bits),
                        `modules_in_block_to_quantize` (endings of names), `lm_head`
    awq                 `modules_to_not_convert` (names or parts of paths), negative `dynamic` rules
    mlx                 its `group_size`, `bits` and `mode`, or those of a module's own entry, false for a float one
    modelopt            `quant_algo`, or that of each in `quantized_layers`, less `ignore` or `exclude_modules`
    compressed-tensors  `config_groups` (exact name, then `re:` pattern, then the class, "Linear" or "Embedding"), less
                        `ignore`

Not here: the bits (decode.py). Nothing of llmq/formats is used, so that config and tensors are judged independently.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmq.checkpoint.dialects import from_auto_round
from llmq.errors import LlmqError
from llmq.guard.patterns import Limit, Pattern
from llmq.guard.reading import field
from llmq.verify.floats import Floats, of_group, of_modelopt
from llmq.verify.mlx import Affine, of_mlx

WHERE = "quantization_config"
METHODS = ("gptq", "awq", "auto-round", "compressed-tensors", "modelopt", "mlx")
_IN_BLOCK = re.compile(r".*?\.\d+\.")
_CACHE = ("k_scale", "v_scale", "k_zero_point", "v_zero_point")


@dataclass(frozen=True)
class Packing:
    """How a linear is stored.

    method: gptq, awq, pack-quantized or int-quantized. group: columns that share a scale, None for all of a row.
    sym: every zero is the middle code. less_one: zeros are stored less one (gptq v1). desc_act: groups need not be runs
    of columns. per_tensor: one scale in all. static: the input has a scale of its own; static_zero: and a zero point.
    """

    method: str
    bits: int
    group: int | None
    sym: bool
    less_one: bool = False
    desc_act: bool = False
    per_tensor: bool = False
    static: bool = False
    static_zero: bool = False

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.method}"

    def groups(self, K: int) -> int:
        """Return how many groups K columns make, the last one maybe short."""
        return -(-K // (self.group or K))

    def tensors(self, N: int, K: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return what is stored, by local name: dtype in safetensors' spelling ("float" for any such), and shape."""
        G, b = self.groups(K), self.bits
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "qzeros": ("I32", (G, _words(N, b))),
            "scales": ("float", (G, N)),
        }
        if self.method == "gptq":
            return found | {"qweight": ("I32", (_words(K, b), N)), "g_idx": ("I32", (K,))}
        if self.method == "awq":
            return found | {"qweight": ("I32", (K, _words(N, b)))}
        per_scale = (1,) if self.per_tensor else (N, G)
        found = {"weight_scale": ("float", per_scale)}
        packed = self.method == "pack-quantized"
        if packed:
            found |= {"weight_packed": ("I32", (N, _words(K, b))), "weight_shape": ("I64", (2,))}
        else:
            found |= {"weight": ("I8", (N, K))}
        if not self.sym:
            in_words = packed and not self.per_tensor
            found["weight_zero_point"] = ("I32", (_words(N, b), G)) if in_words else ("I8", per_scale)
        if self.static:
            found["input_scale"] = ("float", (1,))
        if self.static_zero:
            found["input_zero_point"] = ("I8", (1,))
        return found


How = Packing | Floats | Affine
"""How a linear is stored."""
OPTIONAL = ("g_idx", "weight_shape", "input_zero_point", "bias")
"""Local names of what a writer may leave out: it repeats what is known, or has a default."""
PACKED = (
    "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
    "weight_g_idx", "input_scale", "input_zero_point", "weight_global_scale", "input_global_scale", "weight_scale_2",
    "biases",
)  # fmt: skip
"""Local names by which a packed linear is known."""


def packing(config: Mapping[str, Any]) -> Callable[[str], How | None]:
    """Return the function that says how a linear is stored, None for a float one.

    Raises LlmqError for a config that does not say it, or says what is not decoded here.
    """
    method = field(config, "quant_method", str, WHERE)
    if method == "auto-round":
        return packing(from_auto_round(config))
    config = _without_null(config)
    if method == "gptq":
        return _gptq(config)
    if method == "awq":
        return _awq(config)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "modelopt":
        return of_modelopt(config)
    if method == "mlx":
        return of_mlx(config)
    raise LlmqError(f"{WHERE}.quant_method is {method!r}; verify reads {', '.join(METHODS)} and GGUF")


def embeddings(config: Mapping[str, Any]) -> Callable[[str], How | None]:
    """Return the function that says how an embedding is stored, None for a float one: compressed-tensors has others."""
    if config.get("quant_method") != "compressed-tensors":
        return lambda name: None
    return _compressed_tensors(_without_null(config), "Embedding")


def cache_scales(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the local names that a quantized key-value cache has beside a block's attention."""
    return _CACHE if config.get("kv_cache_scheme") else ()


def _gptq(config: Mapping[str, Any]) -> Callable[[str], Packing | None]:
    _only(config, "pack_dtype", ("int32", "torch.int32"), "int32")
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise LlmqError(f"{WHERE}.checkpoint_format is {version!r}; verify decodes gptq and gptq_v2")
    base = Packing(
        "gptq",
        _bits(config, (2, 3, 4, 8)),
        _group(config),
        field(config, "sym", bool, WHERE, True),
        less_one=version == "gptq",
        desc_act=field(config, "desc_act", bool, WHERE, False),
    )
    head = field(config, "lm_head", bool, WHERE, False)
    listed = tuple(m for part in _said(config, "modules_in_block_to_quantize", list) for m in _strings(part))
    rules = _rules(config)

    def of(name: str) -> Packing | None:
        for leaves, pattern, changes in rules:
            if pattern.match(name):
                return None if leaves else _changed(base, changes)
        if not _IN_BLOCK.match(name):
            return base if head else None
        return base if not listed or name.endswith(listed) else None

    return of


def _awq(config: Mapping[str, Any]) -> Callable[[str], Packing | None]:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise LlmqError(f"{WHERE}.version is {version!r}; verify decodes AWQ's gemm packing")
    base = Packing("awq", _bits(config, (4,)), _group(config), sym=False)
    left = tuple(_strings(config.get("modules_to_not_convert") or []))
    parts = _patterns([rf"(?:.*\.)?(?:{m})(?:\.|$)" for m in left])
    head = field(config, "lm_head", bool, WHERE, False)
    rules = _rules(config)

    def of(name: str) -> Packing | None:
        if name.endswith(left) or any(p.match(name) for p in parts):
            return None
        if any(leaves and p.match(name) for leaves, p, _ in rules):
            return None
        return base if head or _IN_BLOCK.match(name) else None

    return of


def _compressed_tensors(config: Mapping[str, Any], kind: str = "Linear") -> Callable[[str], How | None]:
    groups = field(config, "config_groups", dict, WHERE)
    targets = {t: how for name, g in groups.items() for t, how in _group_targets(name, g, config)}
    by_pattern = [t for t in sorted(targets) if t.startswith("re:")]
    patterns = list(zip(_patterns([t[3:] for t in by_pattern]), [targets[t] for t in by_pattern], strict=True))
    ignored = set(_strings(config.get("ignore") or []))
    ignored_patterns = _patterns([t[3:] for t in ignored if t.startswith("re:")])

    def of(name: str) -> How | None:
        if not ignored.isdisjoint((name, kind)) or any(p.match(name) for p in ignored_patterns):
            return None
        if name in targets:
            return targets[name]
        return next((how for p, how in patterns if p.match(name)), targets.get(kind))

    return of


def _group_targets(name: str, group: Any, config: Mapping[str, Any]) -> Iterator[tuple[str, How]]:
    where = f"{WHERE}.config_groups.{name}"
    if not isinstance(group, dict):
        raise LlmqError(f"{where} is no object")
    weights, inputs = field(group, "weights", dict, where), _said(group, "input_activations", dict, where)
    form = group.get("format") or config.get("format")
    targets = _strings(field(group, "targets", list, where))
    if weights.get("type") == "float":
        yield from ((target, of_group(form, weights, inputs, where)) for target in targets)
        return
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in ("tensor", "channel", "group"):
        raise LlmqError(f"{where}.weights.strategy is {strategy!r}; verify knows tensor, channel and group")
    if form not in ("pack-quantized", "int-quantized") or weights.get("type", "int") != "int":
        raise LlmqError(f"{where} is stored as {form!r}; verify decodes pack-quantized and int-quantized integers")
    static = bool(inputs) and inputs.get("dynamic", False) is False
    how = Packing(
        form,
        _bits({"bits": weights.get("num_bits", 8)}, range(2, 9)),
        _group(weights) if strategy == "group" else None,
        field(weights, "symmetric", bool, where, True),
        per_tensor=strategy == "tensor",
        static=static,
        static_zero=static and not inputs.get("symmetric", True),
    )
    yield from ((target, how) for target in targets)


def _rules(config: Mapping[str, Any]) -> list[tuple[bool, Pattern, Mapping[str, Any]]]:
    """Return GPTQModel's rules: whether each leaves what it matches float, its pattern, what it changes."""
    found = _said(config, "dynamic", dict)
    patterns = _patterns([rule.removeprefix("-:").removeprefix("+:") for rule in found])
    changes = [_said(found, rule, dict, f"{WHERE}.dynamic") for rule in found]
    return list(zip([rule.startswith("-:") for rule in found], patterns, changes, strict=True))


def _said(config: Mapping[str, Any], key: str, kind: type[Any], where: str = WHERE) -> Any:
    """Return `config[key]`, empty where it is missing or null. Raises LlmqError for another type."""
    return kind() if config.get(key) is None else field(config, key, kind, where)


def _changed(base: Packing, changes: Mapping[str, Any]) -> Packing:
    bits = _bits(changes, (2, 3, 4, 8)) if "bits" in changes else base.bits
    group = _group(changes) if "group_size" in changes else base.group
    sym = field(changes, "sym", bool, WHERE, base.sym)
    return replace(
        base, bits=bits, group=group, sym=sym, desc_act=field(changes, "desc_act", bool, WHERE, base.desc_act)
    )


def _bits(config: Mapping[str, Any], possible: Any) -> int:
    bits = field(config, "bits", int, WHERE)
    if bits not in possible:
        raise LlmqError(f"{WHERE}: {bits} bits are not stored that way ({', '.join(map(str, possible))} are)")
    return bits


def _group(config: Mapping[str, Any]) -> int | None:
    size = field(config, "group_size", int, WHERE)
    if size < -1 or size == 0:
        raise LlmqError(f"{WHERE}.group_size is {size}; it must be positive, or -1 for a whole row")
    return None if size == -1 else size


def _only(config: Mapping[str, Any], key: str, possible: tuple[Any, ...], default: Any) -> None:
    if config.get(key, default) not in possible:
        raise LlmqError(f"{WHERE}.{key} is {config[key]!r}; verify decodes {possible[0]!r}")


def _strings(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
        raise LlmqError(f"{WHERE}: {value!r} should be names of modules")
    return found


def _patterns(texts: list[str]) -> list[Pattern]:
    """Return a list of the config's patterns, with one limit of time."""
    limit = Limit()
    return [Pattern(text, f"{WHERE}: {text!r}", limit) for text in texts]


def _without_null(config: Any) -> Any:
    """Return a config without its keys of null, at any depth: each is as good as missing."""
    if isinstance(config, dict):
        return {k: _without_null(v) for k, v in config.items() if v is not None}
    return config


def _words(n: int, bits: int) -> int:
    return -(-n * bits // 32)
