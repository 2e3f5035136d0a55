"""Random quantized linears, without a solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmq.grids.int import Int
from llmq.types import LinearSpec, Params, QTensor, Scheme

BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
BLOCK += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def q_of() -> Callable[..., QTensor]:
    """`q_of(grid, N, K, seed=0)`: random codes, scales and (asymmetric) zeros, 0 and the highest among them."""

    def make(grid: Int, N: int, K: int, seed: int = 0) -> QTensor:
        g = torch.Generator().manual_seed(seed)
        top, rows = 2**grid.bits - 1, grid.granularity.rows(N)
        scale = (torch.rand(rows, grid.granularity.groups(K), generator=g) + 0.01).to(grid.scale_dtype)
        zero = torch.full(scale.shape, (top + 1) // 2, dtype=torch.int32)
        if not grid.sym:
            zero = torch.randint(0, top + 1, scale.shape, generator=g, dtype=torch.int32)
            zero.view(-1)[0], zero.view(-1)[-1] = 0, top
        params = Params(scale, zero).map(lambda p: p.expand(N, -1).contiguous())
        return QTensor(torch.randint(0, top + 1, (N, K), generator=g, dtype=torch.uint8), params, grid)

    return make


@pytest.fixture
def spec_of() -> Callable[..., LinearSpec]:
    """`spec_of(grid, N, K, name=..., activation=None)`: the linear before quantization."""

    def make(
        grid: Any, N: int = 64, K: int = 64, name: str = "model.layers.0.mlp.down_proj", activation: Any = None
    ) -> LinearSpec:
        return LinearSpec(name, N, K, Scheme(grid, activation))

    return make


@pytest.fixture
def model_of(spec_of: Callable[..., LinearSpec]) -> Callable[..., list[LinearSpec]]:
    """`model_of(grid, blocks=2, skip=())`: the linears of a Llama but its head, without those whose name ends so."""

    def make(grid: Any, blocks: int = 2, skip: tuple[str, ...] = (), activation: Int | None = None) -> list[LinearSpec]:
        names = [f"model.layers.{i}.{leaf}" for i in range(blocks) for leaf in BLOCK]
        return [spec_of(grid, name=n, activation=activation) for n in names if not n.endswith(skip or "\n")]

    return make


@pytest.fixture
def equal() -> Callable[[QTensor, QTensor], None]:
    """`equal(a, b)`: assert equal codes, parameters, dtypes, g_idx and input."""

    def check(a: QTensor, b: QTensor) -> None:
        pairs = [(a.codes, b.codes), (a.params.scale, b.params.scale), (a.params.zero, b.params.zero)]
        assert (a.g_idx is None) == (b.g_idx is None) and (a.input is None) == (b.input is None)
        if a.g_idx is not None:
            pairs.append((a.g_idx, b.g_idx))
        if a.input is not None and b.input is not None:
            pairs += [(a.input.scale, b.input.scale), (a.input.zero, b.input.zero)]
        for x, y in pairs:
            assert x.dtype == y.dtype and torch.equal(x, y)

    return check
