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

Key-value cache, E4M3 or int8 with static scales: `kv_cache_scheme` in the config, and beside each attention's linears
    k_scale, v_scale   float [1] (strategy "tensor") or [H, 1, 1] ("attn_head"), of rotated keys and of values

Not here: reading and writing `config_groups` (_config_groups.py), how the scales of the cache are found (kv_scales.py)
and read back (integrations/cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.formats import _common, _reading
from llmq.formats._bits import pack_words, unpack_words, width
from llmq.formats._config_groups import Group, Lookup, format_of, new_groups, read_group, same_scheme
from llmq.formats._folder import Folder
from llmq.granularity import PerTensor
from llmq.readers import Limit, Reader, readers, table, told
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor, Scheme

_NAME = "compressed-tensors"
_EXTRA: dict[str, Any] = {
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
}
_READERS = table(
    ("transformers", True, "with compressed-tensors 0.20", "ran"),
    ("vLLM", True, "", "ran"),
    ("SGLang", True, "on GPUs", "source"),
    ("llama.cpp", False, "it reads GGUF; `llmq export OUT OUT.gguf` keeps the codes where a type holds them", "source"),
    ("TensorRT-LLM", False, "it reads compressed-tensors of FP8 and FP4 alone, and takes our int8 for FP8", "source"),
)
_KV_INT8 = Limit(
    "vLLM 0.32 refuses to load a file with static int8 scales of the key-value cache (it takes fp8 ones, and its own "
    "int8 cache is dynamic); llmq and transformers read it: say --kv-dtype fp8 for vLLM",
    refuses=("vLLM",),
)
_KV_FP8 = (
    Limit("it keeps keys and values in fp8 by the file's scales", notes=("vLLM",), told=False, known="source"),
    Limit("fp8 keys and values want --kv-cache-dtype fp8_e4m3", notes=("SGLang",), told=False, known="source"),
)


@dataclass
class CompressedTensors(Folder):
    """The compressed-tensors checkpoint format: pack-quantized and int-quantized, each module its own scheme.

    kv: the strategy of the key-value cache's static scales, "tensor" or "attn_head", None without.
    kv_dtype: of its entries, "fp8" or "int8".
    groups, ignore: what is quantized how, as read from a checkpoint.
    extra: what llmq does not interpret of the config.
    """

    kv: str | None = None
    kv_dtype: str = "fp8"
    quant_method: str = field(default=_NAME, init=False)
    groups: tuple[Group, ...] = field(default=(), init=False, repr=False)
    ignore: list[str] = field(default_factory=list, init=False, repr=False)
    extra: dict[str, Any] = field(default_factory=lambda: dict(_EXTRA), init=False, repr=False)

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset({"weight_shape"})

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype, as the peers do."""
        return model_dtype

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what the files cannot hold; return warnings about readers. Raises LlmqError."""
        if not linears:
            raise LlmqError("no linear is left to quantize; skip fewer modules")
        for spec in linears:
            _common.int_grid(spec, _NAME)
            activation = spec.scheme.activation
            if activation is not None and activation.bits != 8:
                raise LlmqError(f"{spec.name}: activations have 8 bits in compressed-tensors, not {activation.bits}")
        _common.refuse_misfits(linears, self.misfit)
        return told(self._limits(linears, skipped))

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return readers(_READERS, self._limits(linears, skipped))

    def _limits(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
        limits = [*_common.fused_limits(linears, skipped), *_of_weights(linears), *_of_activations(linears)]
        return [*limits, *_of_experts(_common.of_experts(linears)), *_of_cache(self.kv, self.kv_dtype)]

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear, scales in the dtype they have.

        Raises LlmqError for a weight in activation order.
        """
        if q.g_idx is not None:
            raise LlmqError(
                "compressed-tensors (0.20) has no weights in activation order; leave desc_act out, or use "
                "--format gptq:desc_act=true, which GPTQModel and llmq read and vLLM does not"
            )
        grid, shape = _common.int_grid(spec, _NAME), spec.scheme.weight.granularity.shape(spec.N, spec.K)
        half, params = 2 ** (grid.bits - 1), Params.of(q.params)
        scale, zero = (p[: shape[0]].reshape(shape) for p in (params.scale, params.zero))
        packed = spec.scheme.activation is None
        tensors = {"weight_scale": scale.contiguous()}
        if packed:
            tensors["weight_packed"] = pack_words(q.codes, grid.bits)
            tensors["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
        else:
            tensors["weight"] = (q.codes - half).view(torch.int8)  # modulo 256, which is two's complement
        if not grid.sym:
            tensors["weight_zero_point"] = (
                pack_words(zero.t().to(torch.uint8), grid.bits).t().contiguous()
                if packed and len(shape) == 2
                else (zero - half).to(torch.int8)
            )
        if q.input is not None:
            tensors["input_scale"] = q.input.scale
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor."""
        found = _reading.checked(tensors, self.layout(spec), spec, self.derived)
        grid, by = _common.int_grid(spec, _NAME), spec.scheme.weight.granularity
        half = 2 ** (grid.bits - 1)
        scale = found["weight_scale"].reshape(by.rows(spec.N), -1)
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
        elif "weight" in found or len(by.shape(spec.N, spec.K)) == 1:
            zero = zero.to(torch.int32).reshape(scale.shape) + half
        else:
            zero = unpack_words(zero.t(), grid.bits, spec.N).t().to(torch.int32).contiguous()
        params = Params(scale, zero).map(lambda p: p.expand(spec.N, -1).contiguous())
        static = None
        if "input_scale" in found:
            input_scale = found["input_scale"].reshape(1)
            static = Params(input_scale, torch.full((1,), 128, dtype=torch.int32, device=scale.device))
        q = QTensor(codes, params, grid, None, static)
        return _reading.sound(q, spec, "weight_scale", "weight_zero_point")

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
        grid, N, K, G = _common.int_grid(spec, _NAME), spec.N, spec.K, _common.groups(spec)

        def meta(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        per_scale = grid.granularity.shape(N, K)
        tensors = {"weight_scale": meta(*per_scale, dtype=grid.scale_dtype)}
        activation = spec.scheme.activation
        packed = activation is None
        if activation is None:
            tensors["weight_packed"] = meta(N, width(K, grid.bits), dtype=torch.int32)
            tensors["weight_shape"] = meta(2, dtype=torch.int64)
        else:
            tensors["weight"] = meta(N, K, dtype=torch.int8)
            if spec.scheme.static:
                tensors["input_scale"] = meta(1, dtype=grid.scale_dtype)
        if not grid.sym and packed and len(per_scale) == 2:
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
        scheme_of = Lookup(groups, ignore)
        same = all(same_scheme(scheme_of(s.name), s.scheme) for s in linears) and not any(map(scheme_of, skipped))
        if not same or not groups:
            groups, ignore = new_groups(linears), list(skipped)
        formats = {format_of(g.scheme) for g in groups}
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

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[CompressedTensors, Callable[[str], Scheme | None]]:
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
        form.groups = tuple(read_group(n, g, config) for n, g in groups.items())
        form.ignore = _reading.strings(config, "ignore")
        _reading.optional(config, "kv_cache_scheme", dict, {})
        interpreted = {"quant_method", "quantization_status", "format", "config_groups", "ignore"}
        form.extra = {k: v for k, v in config.items() if k not in interpreted}
        lookup = Lookup(form.groups, form.ignore)
        return form, lookup


def _kv_scheme(strategy: str | None, dtype: str) -> dict[str, Any]:
    if strategy is None:
        return {}
    args: dict[str, Any] = {"num_bits": 8, "type": "float" if dtype == "fp8" else "int", "symmetric": True}
    args["dynamic"] = False
    args |= {"strategy": strategy, "group_size": None, "block_structure": None, "actorder": None}
    return {"kv_cache_scheme": args}


def _of_cache(strategy: str | None, dtype: str) -> list[Limit]:
    """Return what runtimes make of static scales of the key-value cache."""
    if strategy is None:
        return []
    return list(_KV_FP8) if dtype == "fp8" else [_KV_INT8]


def _of_weights(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of linears whose weights alone are quantized."""
    grids = [_common.int_grid(s, _NAME) for s in linears if s.scheme.activation is None]
    limits = []
    if any(not grid.sym for grid in grids) and all(same_scheme(linears[0].scheme, s.scheme) for s in linears):
        say = (
            "stock transformers loads asymmetric pack-quantized weights only with "
            "CompressedTensorsConfig(dequantize=True)"
        )
        limits.append(Limit(say, notes=("transformers",)))
    elif any(not grid.sym for grid in grids):
        # 5.23, integrations/compressed_tensors.py: get_dense_scheme takes the first group for every module
        say = (
            "stock transformers cannot load asymmetric pack-quantized weights beside another scheme: dequantize=True, "
            "which they need, decodes every module by the first config group and so computes rubbish without a word"
        )
        limits.append(Limit(say, refuses=("transformers",)))
    if odd := sorted({grid.bits for grid in grids} - {4, 8}):
        widths = ", ".join(map(str, odd))
        say = f"vLLM 0.32 reads weights of {widths} bits on NVIDIA GPUs alone, with its humming kernels"
        limits.append(Limit(say, notes=("vLLM",), known="source"))
        limits.append(Limit(f"it takes 4 and 8 bits, not {widths}", refuses=("SGLang",), told=False))
    if any(grid.bits == 8 for grid in grids):
        say = "vLLM 0.32 reads 8-bit weights, alone or beside others, on GPUs, not on CPUs"
        limits.append(Limit(say, notes=("vLLM",), known="source"))
    if any(isinstance(grid.granularity, PerTensor) for grid in grids):
        say = "vLLM reads weight-only quantization per group or per channel, not per tensor"
        limits.append(Limit(say, refuses=("vLLM", "SGLang"), known="source"))
    return limits


def _of_activations(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of linears whose inputs are quantized too."""
    both = [(_common.int_grid(s, _NAME), s.scheme.activation) for s in linears if s.scheme.activation is not None]
    limits = []
    if any(not grid.sym for grid, _ in both):
        limits.append(
            Limit("vLLM reads int8 activations with symmetric weights only", refuses=("vLLM",), known="source")
        )
    if any(not a.sym for _, a in both):
        say = (
            "vLLM 0.32 multiplies asymmetric activations right on NVIDIA GPUs (CUTLASS) and on CPUs with VNNI; its "
            "product saturates on other CPUs, where the model speaks rubbish, and AMD's GPUs do not have it"
        )
        limits.append(Limit(say, notes=("vLLM",)))
    if any(s.scheme.static for s in linears) or any(not a.sym for _, a in both):
        say = "SGLang 0.5 ignores static scales and zero points: it quantizes every token symmetrically"
        limits.append(Limit(say, notes=("SGLang",)))
    return limits


def _of_experts(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what some runtimes do not take of experts, which they run as one."""
    grids: list[AffineGrid] = [_common.int_grid(s, _NAME) for s in linears if s.scheme.activation is None]
    if any(not grid.sym for grid in grids):
        say = "it takes symmetric experts alone"  # transformers#47430; SGLang: compressed_tensors_wNa16_moe.py
        return [Limit(say, refuses=("transformers", "SGLang"), told=False, known="source")]
    if any(s.scheme.static for s in linears):
        say = "its int8 experts take activations per token, not static scales"  # ..._moe_w8a8_int8.py
        return [Limit(say, refuses=("vLLM",), told=False, known="source")]
    return []
