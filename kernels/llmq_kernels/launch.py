"""What every op shares: how it is registered, where kernels run, dtypes, whether inline PTX may be used, options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from llmq_kernels.errors import KernelError

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
"""The dtypes of activations."""
# a * b + c in one rounding wherever the source writes it; Triton's default changes between 3.9 and 3.10.
OPTIONS = {"enable_fp_fusion": True}


@functools.cache
def uses_asm() -> bool:
    """Say whether kernels may contain PTX: not on AMD, and not in Triton's interpreter."""
    return torch.version.hip is None and not knobs.runtime.interpret


def has_warp_groups(device: torch.device) -> bool:
    """Say whether four warps of a device multiply together (sm_90's wgmma), the first operand in their registers."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def runs_on(x: Tensor) -> bool:
    """Say whether an op computes `x` by its kernel, and not by its reference.

    So on GPUs; on the CPU only in Triton's interpreter, which is there to show what a kernel does, and not for
    bfloat16, whose arithmetic is wrong there.
    """
    return x.device.type != "cpu" or (knobs.runtime.interpret and x.dtype in (torch.float16, torch.float32))


def check_operands(x: Tensor, words: Tensor, N: int, K: int, bias: Tensor | None) -> None:
    """Raise KernelError where an activation or a bias does not go with a packed weight `[N, K]`, held by `words`."""
    if x.size(-1) != K:
        raise KernelError(f"the activation has {x.shape[-1]} features, the packed weight {K}")
    if x.device != words.device:
        raise KernelError(f"the activation is on {x.device}, the packed weight on {words.device}; move one")
    if bias is not None and bias.shape != (N,):
        raise KernelError(f"the bias is {list(bias.shape)}, not [{N}]")


def on(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which kernels are launched on `device`, which need not be the current one."""
    return _HERE if device.type == "cpu" or _one_gpu() else torch.cuda.device(device)


_HERE = nullcontext()


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def direct(x: Tensor) -> bool:
    """Say whether an operator's function may be called without the operator, which costs as much as the rest of it.

    Not where somebody looks on: torch.compile, a trace, fake tensors, tensors of other classes.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
    )


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. Triton's own is a function of its language too, and 10 us slower."""
    return -(-a // b)


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return what makes tensors of a shape, uninitialised. With strides given, torch takes two thirds of its time."""
    strides = torch.empty(shape, device="meta").stride()
    return functools.partial(torch.empty_strided, tuple(shape), strides, dtype=dtype, device=device)


def operator(name: str, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make of a function the operator `name` for the CPU and GPUs; `mutates` names the arguments that it writes.

    What `torch.library.custom_op` does, less its bookkeeping of gradients: 18 us of each call's 26. What a kernel made,
    the function gives to `no_gradient`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=tuple(mutates)))
        torch.library.impl(name, ("cpu", "cuda"))(function)
        return function

    return register


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise KernelError("the kernels have no gradients; load the model with backend='reference' to train around it")


def no_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Return `y`, which a kernel made of `x`, so that a backward pass is an error, not a missing gradient."""
    return _NoGradient.apply(x, y) if x.requires_grad and torch.is_grad_enabled() else y
