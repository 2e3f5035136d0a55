"""GPTQ: codes packed along K, zeros along N, one scheme for the whole checkpoint.

    qweight  int32 [K*b/32, N]   word r of column n: codes of inputs k = r*32/b + j, lowest bits first
    qzeros   int32 [G, N*b/32]   word c of group g: zeros of outputs n = c*32/b + j; 3 bits straddle words in both
    scales   fp16  [G, N]
    g_idx    int32 [K]           group of input k: k // group_size (then it may be missing), or real ids (`desc_act`) in
                                 the original order

    w[n, k] = scales[g, n] * (code[n, k] - zero[g, n]),  g = g_idx[k]

v1 (`checkpoint_format: "gptq"`) stores zero - 1: symmetric 4-bit qzeros read 0x77777777. The subtraction is made on
whole words for 2, 4 and 8 bits, as GPTQModel does (utils/model.py, convert_gptq_v2_to_v1_format_module), so a zero of
0 borrows from its neighbour; undoing it on words is exact, and readers that add 1 to each field go wrong. For 3 bits
GPTQModel subtracts field by field, modulo 8. v2 stores the zero itself.

Modules of a block left float have no key that every reader knows, so two are written: `modules_in_block_to_quantize`
(optimum and with it transformers, vLLM) and `dynamic` with negative rules (GPTQModel, vLLM). `meta` is not written:
some readers refuse a file that has it.

Not here: the algorithm of the same name (algorithms/gptq.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.formats import _common, _reading
from llmq.formats._bits import pack_words, unpack_words
from llmq.formats._folder import Folder
from llmq.grids.int import Int
from llmq.readers import Limit, Reader, readers, table, told
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor, Scheme

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field of a word
_KEYS = ("quant_method", "bits", "group_size", "desc_act", "sym", "lm_head", "checkpoint_format")
_DEFAULTS = {"pack_dtype": "int32", "sym": True, "lm_head": False, "desc_act": False}
_ALTERS = ("is_marlin_format", "rotation", "adapter", "activation")  # GPTQModel: other packing, or more than the weight
_CPU_GROUPS = (32, 64, 128, 256)  # torch's _weight_int4pack_mm_for_cpu, GPTQModel's kernel for 4 bits on a CPU
_GROUPS = {
    "GPTQModel, hence not by transformers": (16, 32, 64, 128, 256, 512, 1024),  # 7.7, TorchLinear.SUPPORTS_GROUP_SIZE
    "vLLM": (32, 64, 128),  # marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES
}
_READERS = table(
    ("transformers", True, "with gptqmodel 7.7 and optimum", "ran"),
    ("vLLM", True, "", "ran"),
    ("SGLang", True, "on GPUs (Marlin)", "source"),
    ("TensorRT-LLM", False, "it builds a float model: gptq is no quant_method of its PyTorch backend", "source"),
)


@dataclass
class GPTQ(Folder):
    """The GPTQ checkpoint format.

    checkpoint_format: "gptq" (v1), "gptq_v2", or "auto": v1 for symmetric grids, else v2.
    desc_act: the weights come in activation order, so that g_idx holds real group ids.
    dynamic, modules_in_block_to_quantize: which linears of the blocks are quantized, as read from a checkpoint; rules
        are the patterns of the former.
    keys, extra: the keys of the config that was read, and what llmq does not interpret of it.
    """

    copy = "quantize_config.json"
    inputs = False
    checkpoint_format: str = "auto"
    desc_act: bool = False
    quant_method: str = field(default="gptq", init=False)
    dynamic: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    modules_in_block_to_quantize: list[Any] | None = field(default=None, init=False, repr=False)
    rules: _reading.Patterns = field(
        default_factory=lambda: _reading.Patterns({}), init=False, repr=False, compare=False
    )
    keys: tuple[str, ...] = field(default=_KEYS, init=False, repr=False)
    extra: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.checkpoint_format not in ("auto", "gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format is auto, gptq or gptq_v2, not {self.checkpoint_format}")

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset() if self.desc_act else frozenset({"g_idx"})

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype."""
        return torch.float16

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what GPTQ files cannot hold; return warnings about readers. Raises LlmqError."""
        grid = _common.uniform(linears, "gptq")
        first = linears[0].name
        if grid.bits not in (2, 3, 4, 8):
            raise LlmqError(f"{first}: gptq holds 2, 3, 4 or 8 bits, not {grid.bits}; use --format compressed-tensors")
        if not grid.sym and self.checkpoint_format == "gptq":
            raise LlmqError(
                f"{first}: gptq v1 stores zero - 1 and cannot hold an asymmetric zero of 0; "
                "use --format gptq:checkpoint_format=gptq_v2, awq or compressed-tensors"
            )
        _common.refuse_misfits(linears, self.misfit)
        return told(self._limits(grid, linears, skipped))

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return readers(_READERS, self._limits(_common.uniform(linears, "gptq"), linears, skipped))

    def holding(self, spec: LinearSpec) -> LinearSpec:
        """See `Folder.holding`; one scale for all is repeated for every row."""
        return _common.by_rows(super().holding(spec))

    def misfit(self, spec: LinearSpec) -> str | None:
        """See `Folder.misfit`."""
        bits = spec.scheme.weight.bits
        for side, n in (("K", spec.K), ("N", spec.N)):
            if n * bits % 32:
                return f"{side} = {n} codes of {bits} bits do not fill 32-bit words, as gptq needs"
        return _common.undivided(spec)

    def _limits(self, grid: AffineGrid, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
        """Return what of these linears some runtimes do not take."""
        limits = (
            _common.group_size_limits(grid, _GROUPS)
            + _common.fused_limits(linears, skipped)
            + _common.tile_limits(linears)
        )
        if not grid.sym:
            say = (
                "asymmetric gptq is written as gptq_v2, which GPTQModel and transformers read and vLLM does not; "
                "for vLLM use awq or compressed-tensors"
            )
            limits.append(Limit(say, refuses=("vLLM",)))
        if grid.bits < 4:
            say = f"{grid.bits}-bit gptq is read by GPTQModel and transformers, not by vLLM"
            limits.append(Limit(say, refuses=("vLLM",)))
        if grid.bits == 8:
            limits.append(
                Limit("8-bit gptq is read by vLLM 0.32 on GPUs, not on CPUs", notes=("vLLM",), known="source")
            )
        if self.desc_act:
            say = (
                "vLLM 0.32 refuses desc_act; GPTQModel, and transformers with it, read it: leave desc_act out for vLLM"
            )
            limits.append(Limit(say, refuses=("vLLM",)))
        if grid.bits == 4 and grid.granularity.group_size is None and any(s.K not in _CPU_GROUPS for s in linears):
            say = (
                "on a CPU GPTQModel 7.7, and transformers with it, load 4-bit gptq per channel and fail at the first "
                "token; vLLM runs it: take a group size for them"
            )
            limits.append(Limit(say, notes=("transformers",)))
        return limits + _of_sglang(grid, linears) + _common.head_limits(linears, "gptq")

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return qweight, qzeros, scales (dtype kept) and g_idx.

        Raises LlmqError for a weight in activation order unless `desc_act` is set: without it in the config, fused
        runtimes ignore g_idx and compute with the wrong groups.
        """
        g_idx = q.group_K.to(torch.int32)
        if not self.desc_act and not torch.equal(g_idx, _plain_g_idx(spec, g_idx.device)):
            raise LlmqError("the weights are in activation order, which needs --format gptq:desc_act=true")
        bits, params = q.grid.bits, Params.of(q.params)
        zero_GN = params.zero.t()
        if self._version(_common.int_grid(spec, "gptq")) == 2:
            qzeros = pack_words(zero_GN.to(torch.uint8), bits)
        elif bits in _ONES:
            qzeros = pack_words(zero_GN.to(torch.uint8), bits) - _ONES[bits]
        else:
            qzeros = pack_words(((zero_GN - 1) % 2**bits).to(torch.uint8), bits)
        return {
            "qweight": pack_words(q.codes, bits).t().contiguous(),
            "qzeros": qzeros,
            "scales": params.scale.t().contiguous(),
            "g_idx": g_idx,
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`; g_idx becomes None where it is `k // group_size` in equal groups.

        Raises LlmqError that names the tensor, also for an activation order that the config does not tell of: what
        fuses linears (vLLM) would compute with other groups there.
        """
        found = _reading.checked(tensors, self.layout(spec), spec, self.derived)
        qweight, qzeros, scales = found["qweight"], found["qzeros"], found["scales"]
        grid = _common.int_grid(spec, "gptq")
        if self._version(grid) == 2:
            zero_GN = unpack_words(qzeros, grid.bits, spec.N)
        elif grid.bits in _ONES:
            zero_GN = unpack_words(qzeros + _ONES[grid.bits], grid.bits, spec.N)
        else:
            zero_GN = (unpack_words(qzeros, grid.bits, spec.N) + 1) % 2**grid.bits
        plain = _plain_g_idx(spec, scales.device)
        g_idx = _reading.group_ids(found.get("g_idx", plain), len(scales), spec)
        in_order = torch.equal(g_idx, plain)
        if not in_order and not self.desc_act:
            raise LlmqError(
                f"{spec.name}.g_idx is in activation order, but quantization_config.desc_act is false; "
                "set it to true, or download the checkpoint again"
            )
        params = Params(scales.t().contiguous(), zero_GN.t().to(torch.int32).contiguous())
        even = spec.K % grid.granularity.columns(spec.K) == 0
        codes = unpack_words(qweight.t(), grid.bits, spec.K)
        q = QTensor(codes, params, grid, None if in_order and even else g_idx)
        return _reading.sound(q, spec, "scales", "qzeros")

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear; the last group of a peer's may be short (`check` refuses our own)."""
        grid = spec.scheme.weight
        bits, G = grid.bits, -(-spec.K // grid.granularity.columns(spec.K))

        def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return {
            "qweight": meta(spec.K * bits // 32, spec.N),
            "qzeros": meta(G, spec.N * bits // 32),
            "scales": meta(G, spec.N, dtype=torch.float16),
            "g_idx": meta(spec.K),
        }

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`. Raises LlmqError where the linears do not share one scheme.

        The rules read from a checkpoint are kept while they still select exactly `linears`, else written anew.
        """
        grid = _common.uniform(linears, "gptq")
        names = [s.name for s in linears]
        lm_head = any(_common.block_path(n) is None for n in names)
        listed, dynamic = self.modules_in_block_to_quantize, self.dynamic
        if [self._quantized(n, lm_head) for n in (*names, *skipped)] != [True] * len(names) + [False] * len(skipped):
            kept, dynamic = _common.kept_in_blocks(linears, skipped)
            listed = [kept] if dynamic else None
        version = "gptq" if self._version(grid) == 1 else "gptq_v2"
        known = {
            "quant_method": "gptq",
            "method": "gptq",
            "bits": grid.bits,
            "group_size": _common.group_size(grid),
            "desc_act": self.desc_act,
            "sym": grid.sym,
            "lm_head": lm_head,
            "format": version,
            "checkpoint_format": version,
            "pack_dtype": "int32",
            "dynamic": dynamic,
            "modules_in_block_to_quantize": listed,
        }
        keys = {*self.keys, *(k for k in ("dynamic", "modules_in_block_to_quantize") if known[k])}
        return {k: v for k, v in known.items() if k in keys} | self.extra

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[GPTQ, Callable[[str], Scheme | None]]:
        """Return the format of a GPTQ `quantization_config` and the scheme of each linear by its name.

        Raises LlmqError for another packing (marlin, planar, int64 words), rotations and adapters, and for `dynamic`
        rules that change a scheme.
        """
        for key in _ALTERS:
            if config.get(key):
                raise LlmqError(f"quantization_config.{key} is set, which llmq does not read; {_reading.REQUANTIZE}")
        known = _DEFAULTS | {k: v for k, v in config.items() if v is not None}
        known["checkpoint_format"] = config.get("checkpoint_format") or config.get("format") or "gptq"
        bits = _reading.need(known, "bits", (2, 3, 4, 8))
        _reading.need(known, "pack_dtype", ("int32",))
        form = cls(
            checkpoint_format=_reading.need(known, "checkpoint_format", ("gptq", "gptq_v2")),
            desc_act=_reading.need(known, "desc_act", (True, False), "correct it"),
        )
        sym = _reading.need(known, "sym", (True, False), "correct it")
        lm_head = _reading.need(known, "lm_head", (True, False), "correct it")
        scheme = Scheme(Int(bits, sym, _reading.group_of(config)))
        form.dynamic = _reading.rules_of(config, "gptq")
        form.rules = _reading.rule_patterns(form.dynamic)
        form.modules_in_block_to_quantize = _modules(config)
        interpreted = {*_KEYS, "method", "format", "pack_dtype", "dynamic", "modules_in_block_to_quantize"}
        form.keys = tuple(k for k in config if k in interpreted)
        form.extra = {k: v for k, v in config.items() if k not in interpreted}

        def scheme_of(name: str) -> Scheme | None:
            return scheme if form._quantized(name, lm_head) else None

        return form, scheme_of

    def _quantized(self, name: str, lm_head: bool) -> bool:
        """Return whether the rules quantize `name`; optimum matches the listed modules as endings of the name."""
        if (self.rules.first(name) or "").startswith("-:"):
            return False
        if _common.block_path(name) is None:
            return lm_head
        parts = self.modules_in_block_to_quantize or ()
        listed = tuple(m for part in parts for m in ([part] if isinstance(part, str) else part))
        return not listed or name.endswith(listed)

    def _version(self, grid: AffineGrid) -> int:
        if self.checkpoint_format == "auto":
            return 1 if grid.sym else 2
        return 1 if self.checkpoint_format == "gptq" else 2


def _modules(config: Mapping[str, Any]) -> list[Any] | None:
    """Return the listed modules: names, or lists of them. Raises LlmqError for anything else."""
    listed = _reading.optional(config, "modules_in_block_to_quantize", list, [])
    names = [name for part in listed for name in (part if isinstance(part, list) else [part])]
    _reading.strings({"modules_in_block_to_quantize": names}, "modules_in_block_to_quantize")
    return config.get("modules_in_block_to_quantize")


def _plain_g_idx(spec: LinearSpec, device: torch.device) -> Tensor:
    return torch.arange(spec.K, dtype=torch.int32, device=device) // spec.scheme.weight.granularity.columns(spec.K)


def _of_sglang(grid: AffineGrid, linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return what SGLang's other GPTQ kernel means, which takes what Marlin does not (quantization/gptq/gptq.py)."""
    if grid.sym and grid.bits in (4, 8):
        return []
    if _common.of_experts(linears):
        say = "experts run in its Marlin kernels alone, which take 4 and 8 bits, symmetric"
        return [Limit(say, refuses=("SGLang",), told=False)]
    return [
        Limit("in its slower kernel, in float16: Marlin takes 4 and 8 bits, symmetric", notes=("SGLang",), told=False)
    ]
