"""The experts of a layer for bench_kernels.py: Qwen3-30B-A3B's, beside transformers' in bfloat16 and one by one.

A layer is what llmq.load makes of it: a plan, gates and ups of all experts, silu and product, downs, the sum over a
token's experts. *One by one* is a launch for each expert that has tokens and each of both products, where the host
knows already which tokens those are; a model without grouped experts waits for the device to learn it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from triton.runtime.errors import OutOfResources

from llmq.gpu import refuses_fp8
from llmq_kernels import activation, e2m1, fp8, grouped, grouped_int8, int8, layout, routing, weight_only

TOKENS = (1, 16, 256, 4096)
FEW = 16
"""The most tokens for which transformers' `batched_mm` is timed: it copies the weights of every pair."""
GRIDS = ("W4 asym g128", "W4 sym g32", "NVFP4", "MXFP4", "W8 sym channel", "W3 sym g128")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """How many experts a layer has, how many a token, hidden and inner features."""

    E: int = 128
    top: int = 8
    H: int = 2048
    I: int = 768  # noqa: E741

    def index(self, T: int) -> Tensor:
        """Return experts of T tokens, drawn evenly, int64 `[T, top]`."""
        return torch.rand(T, self.E, device="cuda").topk(self.top, -1).indices


def weight(grid: str, N: int, K: int) -> Any:
    """Return a weight of random codes, of a name such as "W4 asym g128" or "NVFP4"."""
    if grid in ("NVFP4", "MXFP4"):
        codes, e8m0 = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda"), grid == "MXFP4"
        scales = torch.randint(*((118, 124) if e8m0 else (1, 127)), (N, K // (32 if e8m0 else 16)), device="cuda")
        return e2m1.pack(codes, scales.to(torch.uint8), e8m0=e8m0, factor=0.25 if e8m0 else 1e-4)
    width, kind, size = grid.split()
    bits, G = int(width[1:]), 1 if size == "channel" else K // int(size[1:])
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device="cuda")
    zero = torch.randint(0, 2**bits, (N, G), device="cuda") if kind == "asym" else None
    return layout.pack(codes, (torch.rand(N, G, device="cuda") * 0.02 + 0.005).half(), zero, bits)


class Layer:
    """Quantized experts."""

    def __init__(self, grid: str, shape: Shape) -> None:
        self.shape = shape
        each = [[weight(grid, shape.I, shape.H) for _ in range(2)] for _ in range(shape.E)]
        self.enter, gates = grouped.stack(each)
        self.leave, downs = grouped.stack([[weight(grid, shape.H, shape.I)] for _ in range(shape.E)])
        module: Any = e2m1 if grid in ("NVFP4", "MXFP4") else layout
        self._linear = weight_only.linear if module is layout else e2m1.linear
        self._enter, self._leave = [module.join(row)[0] for row in gates], [row[0] for row in downs]

    def together(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
        """Return the layer's output for `x` `[T, H]`, as a loaded model computes it."""
        plan = routing.plan(index, self.shape.E)
        y = grouped.linear(self._inner(grouped.linear(x, self.enter, plan).flatten(0, 1)), self.leave, plan.of_pairs)
        return (y.view(*index.shape, -1) * share[..., None]).sum(1)

    def one_by_one(self, x: Tensor, places: Sequence[tuple[Tensor, Tensor]], share: Tensor) -> Tensor:
        """Return the same, expert after expert. places: of each, its tokens and which choice of theirs it is."""
        out = torch.zeros_like(x)
        for e, (token, choice) in enumerate(places):
            if len(token):
                y = self._linear(self._inner(self._linear(x[token], self._enter[e])), self._leave[e])
                out.index_add_(0, token, y * share[token, choice, None])
        return out

    def _inner(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    def nbytes(self, experts: int) -> int:
        """Return the bytes of so many of its experts."""
        tensors = (self.enter.words, self.enter.params, self.leave.words, self.leave.params)
        return sum(t[0].nbytes for t in tensors) * experts


def floats(shape: Shape, how: str) -> Any:
    """Return transformers' experts in bfloat16, with random weights. how: `grouped_mm` or `batched_mm`."""
    config = Qwen3MoeConfig(
        hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.top
    )
    config._experts_implementation = how
    with torch.device("cuda"):
        experts = Qwen3MoeExperts(config).to(BF16).requires_grad_(False)
    for p in experts.parameters():
        p.normal_(0, 0.02)
    return experts


def checks(dtype: torch.dtype, bound: float, sqnr: Callable[[Tensor, Tensor], float]) -> Iterator[Any]:
    """Yield (name, dB found, dB at least) of experts in every configuration, on odd shapes."""
    shape = Shape(9, 2, 512, 200)
    for grid in ("W4 asym g128", "W4 sym g32", "W8 sym channel", "W3 asym g64", "W2 asym g64", "NVFP4", "MXFP4"):
        w = grouped.stack([[weight(grid, shape.I, shape.H) for _ in range(2)] for _ in range(shape.E)])[0]
        bias = torch.randn(shape.E + 1, w.one.N, device="cuda", dtype=dtype)
        bias[-1] = 0
        for T in (1, 5, 70, 600):
            index, x = shape.index(T), torch.randn(T, shape.H, device="cuda", dtype=dtype)
            index[-1, 1] = shape.E
            order, begin = routing.launch(index, shape.E)
            same = all(map(torch.equal, (order, begin), routing.reference(index, shape.E)))
            yield f"plan T={T}", float("inf") if same else 0.0, bound
            routed = grouped.Routed(w, routing.Plan(order, begin, shape.top))
            wanted = grouped.reference(x[:, None].float(), routed, bias)
            for config in grouped.configs(T, routed):
                try:
                    found = grouped.launch(x[:, None], routed, bias, config)
                except OutOfResources:
                    continue
                yield f"experts {grid} T={T} {dtype} {config}", sqnr(found, wanted), bound
    yield from _int8_checks(shape, dtype, bound, sqnr)


def _int8_checks(
    shape: Shape, dtype: torch.dtype, bound: float, sqnr: Callable[[Tensor, Tensor], float]
) -> Iterator[Any]:
    """Yield the checks of W8A8 experts, and of FP8's where the GPU multiplies E4M3."""

    def ints() -> int8.PackedInt8:
        codes = torch.randint(-128, 128, (shape.I, shape.H), device="cuda").to(torch.int8)
        return int8.pack(codes, torch.rand(shape.I, device="cuda") * 0.01)

    def floats() -> fp8.PackedFp8:
        codes = torch.randn(shape.I, shape.H, device="cuda").to(fp8.E4M3).view(torch.uint8)
        return fp8.pack(codes, torch.rand(shape.I, device="cuda") * 0.01)

    makers: dict[str, Callable[[], Any]] = {"W8A8": ints}
    if refuses_fp8(torch.device("cuda")) is None:
        makers["FP8"] = floats
    for name, one in makers.items():
        w = grouped_int8.stack([[one(), one()] for _ in range(shape.E)])[0]
        yield from _codes_checks(name, shape, w, dtype, bound, sqnr)


def _codes_checks(
    name: str,
    shape: Shape,
    w: grouped_int8.StackedInt8,
    dtype: torch.dtype,
    bound: float,
    sqnr: Callable[[Tensor, Tensor], float],
) -> Iterator[Any]:
    """Yield the checks of experts whose tokens are quantized, in every configuration."""
    bias = torch.randn(shape.E + 1, w.one.N, device="cuda", dtype=dtype)
    bias[-1] = 0
    for T in (1, 5, 70, 600):
        index, x = shape.index(T), torch.randn(T, shape.H, device="cuda", dtype=dtype)
        index[-1, 1] = shape.E
        plan, how = routing.plan(index, shape.E), grouped_int8.How(dtype, T == 1, has_bias=True, e4m3=w.e4m3)
        q, scale = activation.Quantizing(x, w.q.size(2), is_static=False, e4m3=w.e4m3)(x, None)
        wanted = grouped_int8.reference(q, scale, w, plan, bias, torch.float32)
        for config in grouped_int8.configs(T, w, plan):
            try:
                found = grouped_int8.planned(T, w, plan, config, how)(q, scale, w, plan, bias)
            except OutOfResources:
                continue
            yield f"experts {name} T={T} {dtype} {config}", sqnr(found, wanted), bound


def rows(
    bandwidth: float, milliseconds: Callable[..., float], copies: Callable[[int], int], shape: Shape | None = None
) -> Iterator[str]:
    """Yield a table: for each kind of layer the milliseconds for each of TOKENS. bandwidth: bytes a second."""
    shape = shape or Shape()
    yield f"\n| {shape.E} experts | " + " | ".join(f"T={T}" for T in TOKENS) + " |\n|---|" + "---|" * len(TOKENS)
    each = 3 * shape.H * shape.I // 2  # bytes of an expert in 4 bits
    calls = [[_call(shape, T) for _ in range(copies(each * min(shape.E, T * shape.top)))] for T in TOKENS]
    base = list(_times(floats(shape, "grouped_mm"), calls, milliseconds))
    yield _line("bf16 grouped_mm", base, base)
    yield _line("bf16 batched_mm", list(_times(floats(shape, "batched_mm"), calls, milliseconds, FEW)), base)
    for grid in GRIDS:
        layer = Layer(grid, shape)
        used = [layer.nbytes(len(some[0][1].unique())) / bandwidth * 1e3 for some in calls]
        yield _line(f"{grid} together", list(_times(layer.together, calls, milliseconds)), base, used)
        alone = [[(x, _places(index, shape.E), share) for x, index, share in some] for some in calls]
        yield _line(f"{grid} one by one", list(_times(layer.one_by_one, alone, milliseconds)), base)


def _call(shape: Shape, T: int) -> tuple[Tensor, Tensor, Tensor]:
    share = torch.rand(T, shape.top, device="cuda")
    x = torch.randn(T, shape.H, device="cuda", dtype=BF16)
    return x, shape.index(T), (share / share.sum(-1, keepdim=True)).to(BF16)


def _places(index: Tensor, E: int) -> list[tuple[Tensor, Tensor]]:
    return [(index == e).nonzero(as_tuple=True) for e in range(E)]  # type: ignore[misc]


def _times(call: Callable[..., Tensor], calls: Any, milliseconds: Any, most: int | None = None) -> Iterator[float]:
    """Yield the milliseconds of a call for each number of tokens, each time of experts that others have not read."""
    for some in calls:
        few = most is None or len(some[0][0]) <= most
        yield milliseconds([partial(call, *args) for args in some]) if few else float("nan")


def _line(name: str, found: Sequence[float], base: Sequence[float], used: Sequence[float] | None = None) -> str:
    share = [f"{u / t:.0%}, " for u, t in zip(used, found, strict=True)] if used else [""] * len(found)
    cells = [f"{t:.4f} ({s}{b / t:.2f}x)" for t, s, b in zip(found, share, base, strict=True)]
    return f"| {name} | " + " | ".join(cells) + " |"
