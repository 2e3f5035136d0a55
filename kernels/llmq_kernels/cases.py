"""The kernels that are compiled ahead of time, each in the configuration it is launched in, and what must hold.

A case is a Build for a target, the weights (or cached values) that one trip of its main loop consumes, and limits: the
most thread-instructions per weight on each target, the fewest 128-bit async copies, the tensor-core instruction.
The limits lie within the project's promises, on sm_90 in fp16 2.6 for W4A16 decode, 2.5 for W8A16 and 1.1 for W8A8 (2.6
on sm_80 and sm_89), and a few percent above what was measured: a later change that costs instructions fails.
docs/kernels.md has the table; `python scripts/kernel_facts.py` prints it.

Not here: reading the facts (facts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from llmq_kernels import (
    activation,
    attention,
    decode,
    e2m1,
    grouped,
    grouped_int8,
    int8,
    kv,
    panel,
    product,
    routing,
    tune,
    weight_only,
)
from llmq_kernels.aot import Build
from llmq_kernels.dense import ROWS
from llmq_kernels.facts import SHARED_LIMIT, Facts
from llmq_kernels.layout import PackedWeight, beside_words, tile

NVIDIA = ("sm_80", "sm_89", "sm_90")
K_TYPICAL = 4096
_PLAIN = {"num_warps": 4, "num_stages": 3}  # what Triton takes where a launch says nothing


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration.

    build: returns its Build, with assembly or without. weights: what one trip of the main loop consumes, 0 where there
    is none to count. ipw: by target, the most thread-instructions per weight. wide: the fewest 128-bit async copies in
    the loop. mma: whether tensor-core instructions must be there. fused: whether products may be added in one rounding.
    targets: where it is compiled.
    """

    name: str
    build: Callable[[bool], Build]
    weights: int
    ipw: Mapping[str, float] = field(default_factory=dict)
    wide: int = 0
    mma: bool = True
    fused: bool = True
    targets: tuple[str, ...] = (*NVIDIA, "gfx942")

    def build_for(self, target: str) -> Build:
        """Return the Build for a target: AMD compiles the branch without assembly."""
        return self.build(not target.startswith("gfx"))


def violations(case: Case, facts: Facts) -> list[str]:
    """Return what a case promises and `facts` does not show, a line each."""
    found = []
    if facts.stack or facts.spills:
        found.append(f"{facts.spills} spills, {facts.stack} bytes of stack; there may be none")
    if facts.shared > SHARED_LIMIT[facts.target]:
        found.append(f"{facts.shared} bytes of shared memory; {facts.target} has {SHARED_LIMIT[facts.target]}")
    if case.mma and not facts.mma:
        found.append("no tensor-core instruction")
    if facts.target.startswith("gfx"):
        return found
    if case.weights and facts.i2f:
        found.append(f"{facts.i2f} int-to-float conversions in the main loop; there may be none")
    if facts.async128 < case.wide:
        found.append(f"{facts.async128} async copies of 128 bits in the main loop; expected {case.wide}")
    if facts.fused and not case.fused:
        found.append(f"{facts.fused} fused multiply-adds; every product is to be rounded")
    limit = case.ipw.get(facts.target)
    if limit is not None and facts.ipw > limit:
        found.append(f"{facts.ipw} instructions per weight; the limit is {limit}")
    return found


def weight_only_build(
    w: PackedWeight, config: tune.Config, dtype: str = "fp16", *, asm: bool = True, bias: bool = False
) -> Build:
    """Return the Build of the weight-only kernel for a packed weight (its tensors are not read)."""
    types = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "param_ptr": _params(w), "bias_ptr": f"*{dtype}"}
    types |= {"y_ptr": "*fp32" if config.split_k > 1 else f"*{dtype}", "M": "i32", "N": "i32", "NP": "i32", "K": "i32"}
    constants = weight_only.constants(w, config, has_bias=bias, asm=asm)
    return Build(weight_only.weight_only_kernel, types, constants, ("M",), _options(config))


def grouped_build(w: grouped.Routed, config: tune.Config, dtype: str = "fp16", *, asm: bool = True) -> Build:
    """Return the Build of the kernel over the experts of a layer (the tensors of their weights are not read)."""
    types = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "param_ptr": _params(w.weight.one), "bias_ptr": f"*{dtype}"}
    types |= {"y_ptr": "*fp32" if config.split_k > 1 else f"*{dtype}", "order_ptr": "*i32", "begin_ptr": "*i32"}
    types |= dict.fromkeys(("param_stride", "E", "TOP", "M", "N", "NP", "K"), "i32")
    factors: dict[str, Any] = {"factor_ptr": None}
    if w.weight.factors is not None:
        types, factors = types | {"factor_ptr": "*fp32"}, {}
    constants = grouped.constants(w, config, asm=asm) | factors
    return Build(grouped.grouped_kernel, types, constants, ("E", "TOP", "M"), _options(config))


def _plan_build(pairs: int) -> Build:
    types = {"index_ptr": "*i64", "order_ptr": "*i32", "begin_ptr": "*i32", "S": "i32", "E": "i32"}
    return Build(routing.plan_kernel, types, routing.constants(pairs), ("S", "E"), _PLAIN)


def _params(w: PackedWeight | e2m1.E2M1Weight) -> str:
    if isinstance(w, e2m1.E2M1Weight):
        return "*i32"
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
    return types[w.params.dtype]


def e2m1_build(w: e2m1.E2M1Weight, config: tune.Config, dtype: str = "fp16", *, asm: bool = True) -> Build:
    """Return the Build of the kernel of E2M1 weights for few tokens (the weight's tensors are not read)."""
    types = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "param_ptr": "*i32", "bias_ptr": f"*{dtype}", "factor": "fp32"}
    types |= {"y_ptr": "*fp32" if config.split_k > 1 else f"*{dtype}", "M": "i32", "N": "i32", "NP": "i32", "K": "i32"}
    return Build(e2m1.e2m1_kernel, types, e2m1.constants(w, config, asm=asm), ("M", "factor"), _options(config))


def decode_build(w: PackedWeight, dtype: str = "fp16", *, asm: bool = True) -> Build:
    """Return the Build of the kernel that decodes rows of an integer weight (its tensors are not read)."""
    types = {"w_ptr": "*i16", "param_ptr": _params(w), "out_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("FIRST", "N", "NP", "K"), "i32")
    return Build(decode.decode_kernel, types, decode.constants(w, asm=asm), ("FIRST", "N"), _PLAIN)


def _e2m1_decode_build(group: int, asm: bool) -> Build:
    types = {"w_ptr": "*i16", "param_ptr": "*i32", "out_ptr": "*fp16", "factor": "fp32"}
    types |= dict.fromkeys(("FIRST", "N", "NP", "K"), "i32")
    constants = {"SUB": group, "E8M0": group == 32, "ASM": asm, "BN": ROWS}
    return Build(e2m1.decode_kernel, types, constants, ("factor", "FIRST", "N"), _PLAIN)


def int8_build(config: tune.Config, dtype: str = "fp16") -> Build:
    """Return the Build of the W8A8 matrix product."""
    types = {"x_ptr": "*i8", "w_ptr": "*i8", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
    types |= {"y_ptr": "*i32" if config.split_k > 1 else f"*{dtype}", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"STATIC": False, "HAS_BIAS": False, "SPLIT_K": config.split_k}
    constants |= {"BM": config.BM, "BN": config.BN, "STAGES": config.stages}
    return Build(int8.int8_kernel, types, constants, ("M",), _options(config))


def grouped_int8_build(config: tune.Config, dtype: str = "fp16", *, e4m3: bool = False) -> Build:
    """Return the Build of the W8A8 product of 128 experts, or of FP8."""
    types = dict.fromkeys(("x_ptr", "w_ptr"), "*u8" if e4m3 else "*i8")
    types |= {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
    types |= {"y_ptr": f"*{dtype}", "order_ptr": "*i32", "begin_ptr": "*i32"}
    types |= dict.fromkeys(("E", "TOP", "M", "N", "NP", "K"), "i32")
    how = grouped_int8.How(torch.float16, one_scale=False, has_bias=False, e4m3=e4m3)
    constants = grouped_int8.constants(128, config, how)
    return Build(grouped_int8.grouped_int8_kernel, types, constants, ("E", "TOP", "M"), _options(config))


def _quantize_build(dtype: str, *, e4m3: bool = False) -> Build:
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8" if e4m3 else "*i8", "static_ptr": "*fp32", "scale_ptr": "*fp32"}
    types |= {"K": "i32", "KP": "i32"}
    constants = {"EPS": 0.001, "STATIC": False, "E4M3": e4m3, "BLOCK": 4096}
    return Build(activation.quantize_kernel, types, constants, (), _PLAIN)


def _scale_build() -> Build:
    types = {"part_ptr": "*fp32", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    constants = {"STATIC": False, "HAS_BIAS": False, "SPLIT_K": 1, "BLOCK": 1024}
    return Build(int8.sum_int32_kernel, types | {"MN": "i32", "N": "i32"}, constants, (), _PLAIN)


def _sum_build() -> Build:
    types = {"part_ptr": "*fp32", "bias_ptr": "*fp16", "y_ptr": "*fp16", "MN": "i32", "N": "i32"}
    constants = {"HAS_BIAS": True, "SPLIT_K": 8, "BLOCK": 1024}
    return Build(product.sum_splits_kernel, types, constants, (), _PLAIN)


def append_build(bits: int, dtype: str = "bf16", *, sym: bool, D: int = 128, BT: int = 4) -> Build:
    """Return the Build of the kernel that quantizes new keys or values into the cache."""
    types = {
        "x_ptr": f"*{dtype}",
        "words_ptr": "*i16",
        "param_ptr": "*i32",
        "length_ptr": "*i32",
        "static_ptr": "*fp32",
    }
    types |= dict.fromkeys(("H", "TN", "T", "stride_b", "stride_h", "stride_t"), "i32")
    constants = {"D": D, "DP": kv.padded(D), "BITS": bits, "SYM": sym, "STATIC": False, "BT": BT}
    return Build(kv.append_kernel, types, constants, ("H", "TN"), _PLAIN)


def attend_build(
    bits: int, dtype: str = "fp16", *, sym: bool, GQ: int = 8, D: int = 128, TQ: int = 1, asm: bool = True
) -> Build:
    """Return the Build of attention over the cache, for TQ new tokens (1, or more with a causal mask)."""
    types = {"q_ptr": f"*{dtype}", "k_ptr": "*i16", "k_param_ptr": "*i32", "v_ptr": "*i16", "v_param_ptr": "*i32"}
    types |= {"length_ptr": "*i32", "acc_ptr": "*fp32", "stat_ptr": "*fp32", "softmax_scale": "fp32"}
    types |= dict.fromkeys(("H", "TQ", "T", "CHUNK", "PARTS", "WINDOW"), "i32")
    constants = attention.constants(GQ, D, bits, sym=sym, TQ=TQ, asm=asm)
    return Build(
        attention.attend_kernel, types, constants, ("H", "TQ", "PARTS", "WINDOW", "softmax_scale"), attention.LAUNCH
    )


def _merge_build() -> Build:
    types = {"acc_ptr": "*fp32", "stat_ptr": "*fp32", "y_ptr": "*fp16", "TQ": "i32", "SPLITS": "i32"}
    constants = {"GQ": 8, "D": 128, "DP": 128}
    return Build(attention.merge_kernel, types, constants, ("TQ", "SPLITS"), _PLAIN)


def _round_build(bits: int) -> Build:
    floats = ("w_ptr", "t_ptr", "f_ptr", "scale_ptr", "zero_ptr", "offset_ptr", "error_ptr")
    return _panel_build(panel.round_kernel, floats, ("code_ptr",), "f", bits)


def _walk_build(bits: int) -> Build:
    floats = ("h_ptr", "g_ptr", "loss_ptr", "scale_ptr", "zero_ptr", "step_ptr")
    return _panel_build(panel.walk_kernel, floats, ("old_ptr", "new_ptr"), "h", bits)


def _panel_build(kernel: Any, floats: Iterable[str], codes: Iterable[str], matrix: str, bits: int) -> Build:
    """Return the Build of a kernel over a panel of columns, whose matrix lies row by row. bits: of a table, or 0."""
    types = (
        dict.fromkeys((*floats, "value_ptr", "edge_ptr"), "*fp32") | dict.fromkeys(codes, "*u8") | {"group_ptr": "*i64"}
    )
    types |= dict.fromkeys(("P", "N", f"stride_{matrix}i"), "i32") | dict.fromkeys(("low", "high"), "fp32")
    return Build(kernel, types, {f"stride_{matrix}j": 1} | panel.constants(bits), ("P", "low", "high"), panel.LAUNCH)


def _options(config: tune.Config) -> dict[str, int]:
    found = {"num_warps": config.warps, "num_stages": config.stages}
    return found | ({"maxnreg": config.registers} if config.registers else {})


def _weight(bits: int, group: int, *, zero: bool) -> PackedWeight:
    half = not zero or beside_words(bits, group, torch.float16)
    empty = torch.empty(0, device="meta", dtype=torch.float16 if half else torch.int32)
    return PackedWeight(empty, empty, None, K_TYPICAL, K_TYPICAL, bits, group, zero)


def _weight_only(name: str, w: PackedWeight, dtype: str, ipw: tuple[float, ...], wide: int, M: int = 1) -> Case:
    """Return the case of the first configuration that is tried for M tokens; ipw for sm_80, sm_89, sm_90."""
    weights = weight_only.configs(M, w, asm=True)[0].BN * tile(w.bits, w.group)
    limits = dict(zip(NVIDIA, ipw, strict=True))

    def build(asm: bool) -> Build:
        return weight_only_build(w, weight_only.configs(M, w, asm=asm)[0], dtype, asm=asm)

    return Case(name, build, weights, limits, wide)


def _tall(name: str, w: PackedWeight, config: tune.Config, ipw: float) -> Case:
    """Return the case of a configuration for warp groups alone."""
    weights = config.BN * tile(w.bits, w.group)
    return Case(name, lambda asm: weight_only_build(w, config, asm=asm), weights, {"sm_90": ipw}, 4, targets=("sm_90",))


def _grouped(name: str, w: Any, columns: int, dtype: str, ipw: tuple[float, ...], wide: int, T: int = 1) -> Case:
    """Return the case of the first configuration tried for T tokens of which each has 8 of 128 experts.

    columns: of a tile.
    """
    E, top = 128, 8
    pairs, begin = torch.empty(T * top, device="meta"), torch.empty(E + 2, device="meta")
    empty = torch.empty(E, 0, 0, device="meta")
    stacked = grouped.StackedWeight(empty, empty, w, None if isinstance(w, PackedWeight) else empty)
    routed = grouped.Routed(stacked, routing.Plan(pairs, begin, top))
    limits = dict(zip(NVIDIA, ipw, strict=True))

    def build(asm: bool) -> Build:
        return grouped_build(routed, grouped.configs(T, routed, asm=asm)[0], dtype, asm=asm)

    return Case(name, build, grouped.configs(T, routed, asm=True)[0].BN * columns, limits, wide)


def _experts(name: str, w: PackedWeight, dtype: str, ipw: tuple[float, ...], wide: int, T: int = 1) -> Case:
    return _grouped(name, w, tile(w.bits, w.group), dtype, ipw, wide, T)


def _floats(group: int) -> e2m1.E2M1Weight:
    words = torch.empty(K_TYPICAL // 4, K_TYPICAL, device="meta")
    return e2m1.E2M1Weight(words, words, K_TYPICAL, K_TYPICAL, group, group == 32)


def _e2m1(name: str, group: int, dtype: str, ipw: tuple[float, ...], wide: int, M: int = 1) -> Case:
    w = _floats(group)
    limits = dict(zip(NVIDIA, ipw, strict=True))

    def build(asm: bool) -> Build:
        return e2m1_build(w, e2m1.configs(M, w, asm=asm)[0], dtype, asm=asm)

    return Case(name, build, e2m1.configs(M, w, asm=True)[0].BN * 4 * group, limits, wide)


def _decode(name: str, w: PackedWeight, ipw: float) -> Case:
    limits = dict.fromkeys(NVIDIA, ipw)
    return Case(name, lambda asm: decode_build(w, asm=asm), ROWS * tile(w.bits, w.group), limits, mma=False)


def _int8(name: str, ipw: tuple[float, ...], wide: int, M: int) -> Case:
    config = int8.configs(M, K_TYPICAL)[0]
    limits = dict(zip(NVIDIA, ipw, strict=True))
    return Case(name, lambda asm: int8_build(config), config.BN * int8.TILE_K, limits, wide)


def _int8_experts(name: str, ipw: dict[str, float], T: int = 1, *, e4m3: bool = False) -> Case:
    """Return the case of the first configuration tried for T tokens of which each has 8 of 128 experts.

    e4m3: of FP8, on targets that multiply it.
    """
    empty, begin = torch.empty(0, device="meta"), torch.empty(130, device="meta")
    one = int8.PackedInt8(empty, empty, K_TYPICAL, K_TYPICAL)
    config = grouped_int8.configs(T, grouped_int8.StackedInt8(empty, empty, one), routing.Plan(empty, begin, 8))[0]
    weights = config.BN * int8.TILE_K
    targets = tuple(ipw) if e4m3 else (*NVIDIA, "gfx942")
    return Case(name, lambda asm: grouped_int8_build(config, e4m3=e4m3), weights, ipw, 4, targets=targets)


def _attend(name: str, bits: int, dtype: str, ipw: tuple[float, ...], wide: int, *, sym: bool) -> Case:
    limits = dict(zip(NVIDIA, ipw, strict=True))
    weights = 2 * attention.tile_tokens(128) * 128
    return Case(name, lambda asm: attend_build(bits, dtype, sym=sym, asm=asm), weights, limits, wide)


# Measured with Triton 3.9.0, and a few percent more; docs/kernels.md has the figures.
CASES = (
    _weight_only("W4A16 asym g128 decode", _weight(4, 128, zero=True), "fp16", (1.9, 1.9, 1.9), 4),
    _weight_only("W4A16 sym g128 decode", _weight(4, 128, zero=False), "fp16", (1.8, 1.8, 1.8), 4),
    _weight_only("W4A16 asym g128 decode bf16", _weight(4, 128, zero=True), "bf16", (2.1, 2.1, 2.1), 4),
    _weight_only("W4A16 asym g32 decode", _weight(4, 32, zero=True), "fp16", (2.3, 2.3, 2.3), 4),
    _weight_only("W4A16 asym g64 decode", _weight(4, 64, zero=True), "fp16", (2.05, 2.05, 2.05), 4),
    _weight_only("W4A16 sym g32 decode", _weight(4, 32, zero=False), "fp16", (2.2, 2.2, 2.2), 4),
    _weight_only("W4A16 asym g128 batch 16", _weight(4, 128, zero=True), "fp16", (2.1, 2.1, 2.1), 4, M=16),
    _weight_only("W4A16 sym channel decode", _weight(4, 0, zero=False), "fp16", (1.65, 1.65, 1.65), 4),
    _weight_only("W4A16 asym g128 batch 64", _weight(4, 128, zero=True), "fp16", (3.8, 3.8, 3.05), 4, M=64),
    _weight_only("W4A16 asym g128 prefill", _weight(4, 128, zero=True), "fp16", (3.8, 3.8, 3.05), 4, M=512),
    _weight_only("W8A16 channel decode", _weight(8, 0, zero=False), "fp16", (2.1, 2.1, 2.05), 8),
    _weight_only("W8A16 channel decode bf16", _weight(8, 0, zero=False), "bf16", (3.65, 3.65, 3.6), 8),
    _weight_only("W3A16 asym g128 decode", _weight(3, 128, zero=True), "fp16", (2.0, 2.0, 2.0), 4),
    _weight_only("W3A16 asym g128 prefill", _weight(3, 128, zero=True), "fp16", (4.15, 4.15, 3.55), 4, M=512),
    _weight_only("W3A16 sym g128 decode", _weight(3, 128, zero=False), "fp16", (1.9, 1.9, 1.9), 4),
    _weight_only("W3A16 asym g128 decode bf16", _weight(3, 128, zero=True), "bf16", (2.1, 2.1, 2.1), 4),
    _weight_only("W2A16 asym g128 decode", _weight(2, 128, zero=True), "fp16", (1.75, 1.75, 1.75), 4),
    _tall("W4A16 asym g128 64 x 256", _weight(4, 128, zero=True), tune.Config(64, 256, 1, 8, 3), 3.1),
    _tall("W4A16 sym channel 128 x 256", _weight(4, 0, zero=False), tune.Config(128, 256, 1, 8, 3), 2.65),
    _tall("W8A16 channel 64 x 256", _weight(8, 0, zero=False), tune.Config(64, 256, 1, 8, 3), 2.55),
    _tall("W3A16 asym g128 64 x 128", _weight(3, 128, zero=True), tune.Config(64, 128, 1, 8, 2), 3.65),
    _tall("W2A16 asym g128 64 x 256", _weight(2, 128, zero=True), tune.Config(64, 256, 1, 8, 2), 2.8),
    _experts("W4A16 asym g128 experts", _weight(4, 128, zero=True), "fp16", (1.9, 1.9, 1.9), 4),
    _experts("W4A16 asym g128 experts bf16", _weight(4, 128, zero=True), "bf16", (2.1, 2.1, 2.1), 4),
    _experts("W8A16 channel experts", _weight(8, 0, zero=False), "fp16", (2.1, 2.1, 2.05), 8),
    _experts("W3A16 asym g128 experts", _weight(3, 128, zero=True), "fp16", (2.0, 2.0, 2.0), 4),
    _experts("W4A16 asym g128 experts prefill", _weight(4, 128, zero=True), "fp16", (4.5, 4.5, 4.2), 4, T=4096),
    _grouped("NVFP4 experts", _floats(16), 64, "fp16", (4.0, 4.0, 4.0), 4),
    _grouped("MXFP4 experts bf16", _floats(32), 128, "bf16", (3.25, 3.25, 3.25), 8),
    Case("expert plan", lambda asm: _plan_build(2048), 0, mma=False),
    _e2m1("NVFP4 decode", 16, "fp16", (4.0, 4.0, 4.0), 4),
    _e2m1("NVFP4 decode bf16", 16, "bf16", (4.25, 4.25, 4.25), 4),
    _e2m1("NVFP4 batch 16", 16, "fp16", (5.2, 5.2, 5.2), 2, M=16),
    _e2m1("MXFP4 decode", 32, "fp16", (3.0, 3.0, 3.0), 8),
    _e2m1("MXFP4 decode bf16", 32, "bf16", (3.25, 3.25, 3.25), 8),
    _e2m1("MXFP4 batch 16", 32, "fp16", (3.65, 3.65, 3.65), 8, M=16),
    _decode("W4 asym g128 decoded", _weight(4, 128, zero=True), 8.0),
    _decode("W4 asym g32 decoded", _weight(4, 32, zero=True), 7.0),
    _decode("W8 channel decoded", _weight(8, 0, zero=False), 10.0),
    _decode("W3 asym g128 decoded", _weight(3, 128, zero=True), 6.5),
    _decode("W2 asym g128 decoded", _weight(2, 128, zero=True), 6.7),
    Case("NVFP4 decoded", lambda asm: _e2m1_decode_build(16, asm), 0, mma=False),
    Case("MXFP4 decoded", lambda asm: _e2m1_decode_build(32, asm), 0, mma=False),
    _int8("W8A8 decode", (1.95, 1.95, 0.85), 4, M=1),
    _int8("W8A8 prefill", (7.0, 7.0, 1.7), 4, M=512),
    _int8_experts("W8A8 experts", {"sm_80": 1.95, "sm_89": 1.95, "sm_90": 0.85}),
    _int8_experts("W8A8 experts prefill", {"sm_80": 4.95, "sm_89": 4.95, "sm_90": 2.05}, T=8192),
    _int8_experts("FP8 experts", {"sm_89": 2.0, "sm_90": 1.8}, e4m3=True),
    _int8_experts("FP8 experts prefill", {"sm_89": 5.15, "sm_90": 2.2}, T=8192, e4m3=True),
    Case("W8A8 activation", lambda asm: _quantize_build("bf16"), 0, mma=False),
    Case("FP8 activation", lambda asm: _quantize_build("bf16", e4m3=True), 0, mma=False),
    Case("FP8 scaled", lambda asm: _scale_build(), 0, mma=False),
    Case("KV append int8", lambda asm: append_build(8, sym=True), 0, mma=False),
    Case("KV append int4", lambda asm: append_build(4, sym=False), 0, mma=False),
    _attend("KV attention int8", 8, "fp16", (3.7, 3.55, 3.5), 8, sym=True),
    _attend("KV attention int8 bf16", 8, "bf16", (3.75, 3.65, 3.55), 8, sym=True),
    _attend("KV attention int4", 4, "fp16", (3.75, 3.75, 3.65), 4, sym=False),
    Case("KV attention merge", lambda asm: _merge_build(), 0, mma=False),
    Case("split-K sum", lambda asm: _sum_build(), 0, mma=False),
    Case("GPTQ panel", lambda asm: _round_build(0), 0, mma=False, fused=False),
    Case("GPTQ panel, 16 values", lambda asm: _round_build(4), 0, mma=False, fused=False),
    Case("GPTQ panel, 256 values", lambda asm: _round_build(8), 0, mma=False, fused=False),
    Case("descent panel", lambda asm: _walk_build(0), 0, mma=False, fused=False),
    Case("descent panel, 16 values", lambda asm: _walk_build(4), 0, mma=False, fused=False),
    Case("descent panel, 256 values", lambda asm: _walk_build(8), 0, mma=False, fused=False),
)
