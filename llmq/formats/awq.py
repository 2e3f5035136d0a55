"""AWQ, version GEMM: 4-bit codes packed along N in the order of its kernel, with true zeros.

    qweight  int32 [K, N/8]   word c of row k: eight columns from n = 8c on, interleaved
    qzeros   int32 [G, N/8]   the same for the zeros of a group (nothing subtracted)
    scales   fp16  [G, N]

    nibble  7    6    5    4    3    2    1    0
            8c+7 8c+5 8c+3 8c+1 8c+6 8c+4 8c+2 8c

    w[n, k] = scales[g, n] * (code[n, k] - zero[g, n]),  g = k // group_size

With n = 8c + 2a + b the nibble is 4b + a: packing is a transposition of (a, b), nothing else.
A symmetric grid is written with zeros of 8 and `zero_point: true`, which every reader takes; it is read back as
asymmetric, with the same values.

Skipped modules go to `modules_to_not_convert` (transformers, vLLM); GPTQModel's own loader does not know that key and
reads negative `dynamic` rules, written as well where a module inside a block is skipped.

Not here: the algorithm of the same name (algorithms/awq.py), and the GEMV, GEMV-fast, marlin and llm-awq packings.
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
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Scheme

_DEFAULTS = {"zero_point": True, "pack_dtype": "int32", "desc_act": False, "lm_head": False}
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"  # a pattern of transformers matches up to the end of a module's name
_KEYS = ("quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert")
_VERSIONS = ("version", "format", "checkpoint_format")  # one fact in three spellings: AutoAWQ, GPTQModel twice
_GROUPS = {
    "GPTQModel, hence not by transformers": (16, 32, 64, 128),  # 7.7, AwqTorchLinear.SUPPORTS_GROUP_SIZE
    "vLLM": (32, 64, 128),  # marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES
}
_READERS = table(
    ("transformers", True, "with gptqmodel 7.7", "ran"),
    ("vLLM", True, "", "ran"),
    ("MLX", True, "", "ran"),
    ("SGLang", True, "on GPUs (Marlin)", "source"),
    ("TensorRT-LLM", False, "it builds a float model: awq is no quant_method of its PyTorch backend", "source"),
)


@dataclass
class AWQ(Folder):
    """The AWQ checkpoint format, GEMM packing.

    zero_point: what the config says of the zeros, which are stored either way.
    modules_to_not_convert, dynamic: which linears stay float, as read from a checkpoint; left and rules are their
        patterns.
    keys, extra: the keys of the config that was read, and what llmq does not interpret of it.
    """

    inputs = False
    quant_method: str = field(default="awq", init=False)
    zero_point: bool = field(default=True, init=False, repr=False)
    modules_to_not_convert: list[str] | None = field(default_factory=list, init=False, repr=False)
    dynamic: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    left: _reading.Patterns = field(
        default_factory=lambda: _reading.Patterns({}), init=False, repr=False, compare=False
    )
    rules: _reading.Patterns = field(
        default_factory=lambda: _reading.Patterns({}), init=False, repr=False, compare=False
    )
    keys: tuple[str, ...] = field(default=_KEYS, init=False, repr=False)
    extra: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype."""
        return torch.float16

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what AWQ files cannot hold; return warnings about readers. Raises LlmqError."""
        grid = _common.uniform(linears, "awq")
        if grid.bits != 4:
            other = "gptq or compressed-tensors" if grid.bits in (2, 3, 8) else "compressed-tensors"
            raise LlmqError(f"{linears[0].name}: awq holds 4 bits, not {grid.bits}; use --format {other}")
        _common.refuse_misfits(linears, self.misfit)
        return told(_limits(linears, skipped))

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return readers(_READERS, _limits(linears, skipped))

    def holding(self, spec: LinearSpec) -> LinearSpec:
        """See `Folder.holding`; one scale for all is repeated for every row."""
        return _common.by_rows(super().holding(spec))

    def misfit(self, spec: LinearSpec) -> str | None:
        """See `Folder.misfit`."""
        return f"N = {spec.N} is no multiple of 8, as awq needs" if spec.N % 8 else _common.undivided(spec)

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return qweight, qzeros and scales (dtype kept). Raises LlmqError for a weight in activation order."""
        if q.g_idx is not None:
            raise LlmqError("awq has no g_idx for weights in activation order; use --format gptq:desc_act=true")
        params = Params.of(q.params)
        return {
            "qweight": _pack_columns(q.codes),
            "qzeros": _pack_columns(params.zero.to(torch.uint8)),
            "scales": params.scale.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor."""
        qweight, qzeros, scales = _reading.checked(tensors, self.layout(spec), spec).values()
        params = Params(scales.t().contiguous(), _unpack_columns(qzeros, spec.N).to(torch.int32))
        q = QTensor(_unpack_columns(qweight, spec.N), params, spec.scheme.weight)
        return _reading.sound(q, spec, "scales", "qzeros")

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
        G = _common.groups(spec)
        return {
            "qweight": torch.empty((spec.K, spec.N // 8), dtype=torch.int32, device="meta"),
            "qzeros": torch.empty((G, spec.N // 8), dtype=torch.int32, device="meta"),
            "scales": torch.empty((G, spec.N), dtype=torch.float16, device="meta"),
        }

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`. Raises LlmqError where the linears do not share one scheme.

        The list read from a checkpoint is kept while it still selects exactly `linears`, else written anew.
        """
        grid = _common.uniform(linears, "awq")
        names = [s.name for s in linears]
        lm_head = any(_common.block_path(n) is None for n in names)
        left, dynamic, keys = self.modules_to_not_convert, self.dynamic, set(self.keys)
        if [self._quantized(n, lm_head) for n in (*names, *skipped)] != [True] * len(names) + [False] * len(skipped):
            left, dynamic = list(skipped), _common.kept_in_blocks(linears, skipped)[1]
            keys.add("modules_to_not_convert")
        known = {
            "quant_method": "awq",
            "method": "awq",
            "bits": 4,
            "group_size": _common.group_size(grid),
            "zero_point": self.zero_point,
            "desc_act": False,
            "lm_head": lm_head,
            "pack_dtype": "int32",
            "modules_to_not_convert": list(skipped) if left == [] else left,
            "dynamic": dynamic,
        } | dict.fromkeys(_VERSIONS, "gemm")
        keys |= {k for k in ("dynamic", "lm_head") if known[k]}
        return {k: v for k, v in known.items() if k in keys} | self.extra

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[AWQ, Callable[[str], Scheme | None]]:
        """Return the format of an AWQ `quantization_config` and the scheme of each linear by its name.

        Raises LlmqError for another packing than GEMM and for other bits than 4.
        """
        known = _DEFAULTS | {k: v for k, v in config.items() if v is not None}
        for key in _VERSIONS:
            _reading.need({key: str(known.get(key, "gemm")).lower()}, key, ("gemm",))
        _reading.need(known, "bits", (4,))
        _reading.need(known, "pack_dtype", ("int32",))
        _reading.need(known, "desc_act", (False,))
        lm_head = _reading.need(known, "lm_head", (True, False), "correct it")
        form = cls()
        form.zero_point = _reading.need(known, "zero_point", (True, False), "correct it")
        left = _reading.strings(config, "modules_to_not_convert")
        form.modules_to_not_convert = config.get("modules_to_not_convert")
        form.left = _reading.Patterns({key: f"(?:{key}){_BOUNDARY}" for key in left})
        form.dynamic = _reading.rules_of(config, "awq")
        form.rules = _reading.rule_patterns(form.dynamic)
        interpreted = {*_KEYS, *_VERSIONS, "method", "pack_dtype", "desc_act", "lm_head", "dynamic"}
        form.keys = tuple(k for k in config if k in interpreted)
        form.extra = {k: v for k, v in config.items() if k not in interpreted}
        scheme = Scheme(Int(4, not form.zero_point, _reading.group_of(config)))

        def scheme_of(name: str) -> Scheme | None:
            return scheme if form._quantized(name, lm_head) else None

        return form, scheme_of

    def _quantized(self, name: str, lm_head: bool) -> bool:
        """Return whether `name` is quantized, as transformers matches (quantizers_utils.should_convert_module)."""
        if (self.rules.first(name) or "").startswith("-:") or (_common.block_path(name) is None and not lm_head):
            return False
        return not name.endswith(tuple(self.modules_to_not_convert or ())) and self.left.first(name) is None


def _limits(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
    """Return what of these linears some runtimes do not take."""
    grid = _common.uniform(linears, "awq")
    limits = _common.group_size_limits(grid, _GROUPS) + _common.fused_limits(linears, skipped)
    if grid.granularity.group_size not in _GROUPS["vLLM"]:
        limits.append(Limit("it takes groups of 32, 64 or 128 columns", refuses=("MLX",), told=False))
    return [*limits, *_common.tile_limits(linears), *_common.head_limits(linears, "awq")]


def _pack_columns(codes_NK: Tensor) -> Tensor:
    """Pack uint8 codes `[N, K]` into int32 words `[K, N/8]`."""
    N, K = codes_NK.shape
    return pack_words(codes_NK.reshape(N // 8, 4, 2, K).permute(3, 0, 2, 1).reshape(K, N), 4)


def _unpack_columns(words: Tensor, N: int) -> Tensor:
    """Unpack int32 words `[K, N/8]` into uint8 codes `[N, K]`, contiguous."""
    K = words.shape[0]
    return unpack_words(words, 4, N).reshape(K, N // 8, 2, 4).permute(1, 3, 2, 0).reshape(N, K)
