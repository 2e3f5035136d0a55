"""What the weight-only kernels have in common: the fastest configuration of one is found once, and launched again.

    multiplied(x, w, bias, kernel)
      first call of a shape    checks, the tuner's choice (tune.py), all that a launch needs worked out (`Launches`)
      later ones               found by one key, and launched

With SPLIT_K > 1 every split stores its float32 partial, and a second kernel adds them in a fixed order: no atomics,
equal bits on every run. A float32 x is multiplied in fp16 too, each row first divided by the power of two at its
maximum, so that nothing overflows and 11 bits of it are kept; the sums are float32 and are not rounded.

Not here: the kernels (weight_only.py, e2m1.py, grouped.py), and what many tokens are multiplied by (dense.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels import tune
from llmq_kernels.errors import KernelError
from llmq_kernels.launch import FLOATS, OPTIONS, blank, cdiv, check_operands, no_gradient, on, runs_on

FEW = 32
"""The most tokens that meet packed codes only."""


@triton.jit
def sum_splits_kernel(
    part_ptr,  # [SPLIT_K, MN] float32
    bias_ptr,  # [N]
    y_ptr,  # [MN]
    MN,
    N,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partials of all splits, in order, and the bias; round once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < MN
    acc = tl.load(part_ptr + at, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLIT_K):
        part_ptr += MN
        acc += tl.load(part_ptr + at, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Packed(Protocol):
    """A packed weight `[N, K]` of either kernel."""

    @property
    def N(self) -> int:
        """Output features."""

    @property
    def K(self) -> int:
        """Input features."""

    @property
    def words(self) -> Tensor:
        """Codes."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """What of it is no tensor and bears on the choice of a configuration."""


Call = Callable[[Tensor, Any, Tensor | None], Tensor]


def signature(name: str, x: Tensor, w: Packed, bias: Tensor | None) -> tuple[Any, ...]:
    """Return all that a call's checks, its configuration and its launches depend on."""
    of_bias = None if bias is None else (bias.shape, bias.dtype)
    return name, x.shape, x.dtype, x.device, w.shape, w.words.device, w.words.stride(0), of_bias


class Kernel(NamedTuple):
    """What a weight-only product is made of.

    name: in the tuner's file. planned: makes what `launch` does of a configuration, for calls that are alike.
    check: raises KernelError for what it cannot take.
    """

    name: str
    reference: Callable[..., Tensor]
    configs: Callable[..., list[tune.Config]]
    launch: Callable[..., Tensor]
    planned: Callable[..., Call]
    check: Callable[..., None]


def multiplied(x: Tensor, w: Packed, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """Return `x @ W^T + bias` `[..., N]` by the fastest configuration of a kernel; see `linear`."""
    call = tune.settled.get(signature(kernel.name, x, w, bias))
    if call is not None:
        return call(x, w, bias)
    kernel.check(x, w, bias)
    if not runs_on(x) or not x.numel():
        return kernel.reference(x, w, bias)
    return _chosen(x, w, bias, kernel)


def _chosen(x: Tensor, w: Packed, bias: Tensor | None, kernel: Kernel) -> Tensor:
    """Return the product, and settle what later calls like this one do."""
    M, device, name = x.numel() // w.K, x.device, kernel.name
    key = (tune.bucket(M), w.shape, x.dtype)
    run = kernel.launch if x.dtype != torch.float32 else functools.partial(_scaled, kernel.launch)
    with on(device):
        config = tune.choose(name, device, key, lambda: kernel.configs(M, w), lambda c: run(x, w, bias, c))
        if x.dtype != torch.float32 and config != tune.LIBRARY:
            call = kernel.planned(x, w, config, bias is not None)
            tune.settle(signature(name, x, w, bias), name, device, key, call)
            return call(x, w, bias)
        return no_gradient(x, run(x, w, bias, config))


def _scaled(launch: Callable[..., Tensor], x: Tensor, w: Packed, bias: Tensor | None, config: tune.Config) -> Tensor:
    """Return the product of float32 `x`, each row divided by a power of two for the kernel to take it in fp16."""
    if config == tune.LIBRARY:
        return launch(x, w, bias, config)
    unit = power_of_two(x)
    y = launch((x / unit).half(), w, None, config, x.dtype) * unit
    return y if bias is None else y + bias


def check_activation(x: Tensor, w: Packed, bias: Tensor | None) -> None:
    """Raise KernelError for an activation, or a bias, that a packed weight cannot be multiplied with."""
    check_operands(x, w.words, w.N, w.K, bias)
    if x.is_cuda and x.dtype not in FLOATS:
        raise KernelError(f"the weight-only kernel takes fp16, bf16 or float32 activations, not {x.dtype}; convert x")


def power_of_two(x: Tensor) -> Tensor:
    """Return `[..., 1]`: the power of two below the maximum of every row of float32 `x`, 1 where there is none."""
    top = x.abs().amax(-1, keepdim=True)
    unit = (top.view(torch.int32) & 0x7F800000).view(torch.float32)
    return unit.masked_fill(unit == 0, 1)


class Launches:
    """The launches of one configuration on activations of one shape, worked out once: a kernel, and a sum of splits.

    shape: of y. padded: N and K as they are packed. fixed: the kernel's compile-time arguments and options. tiles: how
    many tiles y's rows have, where it is not the fewest. late_bias: whether a sum of splits adds a bias.
    """

    def __init__(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        padded: tuple[int, int],
        config: tune.Config,
        fixed: dict[str, Any],
        dtype: torch.dtype,
        *,
        tiles: int | None = None,
        late_bias: bool = False,
    ) -> None:
        Np, Kp = padded
        M, N, splits = math.prod(shape[:-1]), shape[-1], config.split_k
        self.device, self.fixed, self.splits = x.device, fixed, splits
        self.sizes = M, N, Np, Kp
        self.pad = (0, Kp - x.shape[-1]) if Kp != x.shape[-1] else None
        self.outputs, self.partials = blank(shape, dtype, x.device), blank((splits, M, N), torch.float32, x.device)
        self.grid = (cdiv(M, config.BM) if tiles is None else tiles) * cdiv(N, config.BN), splits
        self.sum_grid = (cdiv(M * N, 1024),)
        self.sum_fixed = {"HAS_BIAS": late_bias, "SPLIT_K": splits, "BLOCK": 1024, **OPTIONS}

    def __call__(
        self, kernel: Any, x: Tensor, words: Tensor, params: Tensor, bias: Tensor | None, *more: Any
    ) -> Tensor:
        """Return `[..., N]`. more: arguments of the kernel between `y` and the sizes."""
        with on(self.device):
            given = x
            x = x.contiguous() if self.pad is None else F.pad(x, self.pad)
            y = self.outputs()
            M, N, Np, Kp = self.sizes
            if not M:
                return y
            b = y if bias is None else bias if bias.dtype == x.dtype else bias.to(x.dtype)
            if self.splits == 1:
                kernel[self.grid](x, words, params, b, y, *more, M, N, Np, Kp, **self.fixed)
            else:
                out = self.partials()
                kernel[self.grid](x, words, params, b, out, *more, M, N, Np, Kp, **self.fixed)
                sum_splits_kernel[self.sum_grid](out, b, y, M * N, N, **self.sum_fixed)
        return no_gradient(given, y)
