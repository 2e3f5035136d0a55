"""Solved weights on chosen grids, and SQNR."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmq.formats.compressed_tensors import CompressedTensors
from llmq.grids.int import Int
from llmq.types import LinearSpec, Params, QTensor, Scheme


def sqnr(got: Tensor, want: Tensor) -> float:
    """Return 10 log10(|want|^2 / |got - want|^2), in dB."""
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise.clamp(min=1e-300)))


def make(N: int, K: int, grid: Int, activation: Int | None = None, act_order: bool = False, seed: int = 0):
    """Return a random weight on `grid` and its spec."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=random) * torch.logspace(-1, 1, N)[:, None]
    G = grid.granularity.groups(K)
    g_idx = None
    order = torch.arange(K)
    if act_order:
        order = torch.randperm(K, generator=random)
        g_idx = torch.empty(K, dtype=torch.int32).index_copy_(0, order, (torch.arange(K) // (K // G)).int())
    params = grid.fit(W[:, order])
    columns = params.columns(K, g_idx)
    codes = grid.nearest(W, columns).to(torch.uint8)
    static = None
    if activation is not None and activation.group == "tensor":
        static = Params(torch.tensor([0.03], dtype=grid.scale_dtype), torch.tensor([128], dtype=torch.int32))
    spec = LinearSpec("model.layers.0.mlp.up_proj", N, K, Scheme(grid, activation))
    return QTensor(codes, params, grid, g_idx, static), spec


def layer_of(q: QTensor, spec: LinearSpec, fmt=None, bias: bool = False):
    """Return a `QuantLinear` that holds `q` in the tensors of a format."""
    from llmq.runtime.linear import QuantLinear

    fmt = fmt or CompressedTensors()
    layer = QuantLinear(fmt, spec, bias=bias)
    tensors = {k: v.clone() for k, v in fmt.pack(q, spec).items()}
    layer.load_state_dict(tensors | ({"bias": torch.randn(spec.N)} if bias else {}), assign=True)
    return layer


@pytest.fixture(scope="session")
def solved() -> Callable:
    return make


@pytest.fixture(scope="session")
def layer() -> Callable:
    return layer_of


@pytest.fixture(scope="session")
def decibel() -> Callable[[Tensor, Tensor], float]:
    return sqnr
