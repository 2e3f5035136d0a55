"""FP8: y = (x_q @ w_q^T) * x_scale[m] * w_scale[n] (+ bias), E4M3 x E4M3 by the library, sums in float32.

The activation is quantized beside it, in the order of operations of compressed-tensors:

    x_scale = max|x| / 448          in x's dtype, eps of that dtype for a row of zeros; or a static one, rounded to it
    x_q     = E4M3(x / x_scale)     the quotient rounded to x's dtype, ties to even, 448 where it is beyond

Three launches: the activation's, the library's (`torch._scaled_mm`, all sums in float32), and one that scales the sums,
adds the bias and rounds once: int8.py's kernels. The library would scale by row and column itself, for bfloat16 alone
and not on all devices that multiply E4M3. Where torch.compile, a trace or fake tensors look on, all of it but the
library's product is torch's own operators, which Inductor makes part of the launches before and after.

Beside it: `reference`, which is those operators.
Not here: the experts of a layer at once (grouped_int8.py), E4M3 weights of float activations (llmq's e4m3.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmq_kernels import tune
from llmq_kernels.activation import Quantizing, scale_reference
from llmq_kernels.errors import KernelError
from llmq_kernels.int8 import sum_int32_kernel
from llmq_kernels.launch import FLOATS, OPTIONS, blank, cdiv, check_operands, direct, no_gradient, on, runs_on
from llmq_kernels.layout import spans_of

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16
"""What the library wants N and K to be multiples of."""


@dataclass(frozen=True)
class PackedFp8:
    """A weight `[N, K]`: q uint8 `[N, K]`, codes of E4M3; scale float32 `[N]`.

    one: float32 `[]`, what the library scales by.
    """

    q: Tensor
    scale: Tensor
    one: Tensor

    @property
    def N(self) -> int:
        """Output features."""
        return self.q.size(0)

    @property
    def K(self) -> int:
        """Input features."""
        return self.q.size(1)

    @property
    def Np(self) -> int:
        """Rows that the codes have: N, as nothing is padded."""
        return self.N

    @property
    def operand(self) -> Tensor:
        """The codes as the library's second operand, `[K, N]`."""
        return self.q.view(E4M3).t()


def pack(codes_NK: Tensor, scale: Tensor) -> PackedFp8:
    """Pack E4M3 codes, uint8 `[N, K]`, with one scale per output feature, `[N, 1]`, or one for all, `[1, 1]`.

    Raises KernelError for other dtypes or shapes, and where 16 divides N or K not.
    """
    N, K = codes_NK.shape
    if codes_NK.dtype != torch.uint8 or scale.numel() not in (1, N):
        said = f"{codes_NK.dtype} {list(codes_NK.shape)} and {list(scale.shape)}"
        raise KernelError(f"FP8 takes uint8 codes [N, K] and a scale per output feature or one for all, not {said}")
    if N % MULTIPLE or K % MULTIPLE:
        raise KernelError(f"16 does not divide N = {N} and K = {K}, which FP8 products need")
    one = torch.ones((), device=codes_NK.device)
    return PackedFp8(codes_NK.contiguous(), scale.reshape(-1).float().expand(N).contiguous(), one)


def join(weights: Sequence[PackedFp8]) -> tuple[PackedFp8, list[PackedFp8]]:
    """Return weights of one activation as one, and each as a part of it; see `layout.join`.

    Raises KernelError for weights that differ in K.
    """
    if len({w.K for w in weights}) > 1:
        raise KernelError("weights that differ in K are not one weight")
    q, scale = (torch.cat([getattr(w, n) for w in weights]) for n in ("q", "scale"))
    spans = spans_of([w.N for w in weights])
    return PackedFp8(q, scale, weights[0].one), [PackedFp8(q[at], scale[at], weights[0].one) for at in spans]


def quantize_reference(x: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return E4M3 values of `x` `[..., K]` and float32 scales `[M]` (or `[1]`), as the kernel makes them."""
    scale = scale_reference(x, static, 448)
    return (x / scale).clamp(-448, 448).to(E4M3), scale.reshape(-1).float()


def reference(x: Tensor, w: PackedFp8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return the FP8 linear of `x` `[..., K]` by torch's operators; see `linear`."""
    q, x_scale = quantize_reference(x, static)
    sums = torch._scaled_mm(q.reshape(-1, w.K), w.operand, w.one, w.one, out_dtype=torch.float32)
    y = sums * x_scale[:, None] * w.scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], w.N)


def linear(x: Tensor, w: PackedFp8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Map `x` `[..., K]` (fp16, bf16 or float32) to `[..., N]` in its dtype, in E4M3.

    static: `[1]`, the scale of the activation, or None for one per token. bias: `[N]`.
    Raises KernelError for a shape, dtype or device that the kernels cannot take.
    """
    return (compute if direct(x) else reference)(x, w, static, bias)


def compute(x: Tensor, w: PackedFp8, static: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `linear`: by the kernels, where they run."""
    of_bias = None if bias is None else bias.shape
    key = "fp8", x.shape, x.dtype, x.device, w.q.shape, w.q.device, static is None, of_bias
    call = tune.settled.get(key)
    if call is not None:
        return call(x, w, static, bias)
    check_operands(x, w.q, w.N, w.K, bias)
    if not x.numel():
        return x.new_empty(*x.shape[:-1], w.N)
    if not runs_on(x):
        return reference(x, w, static, bias)
    if x.dtype not in FLOATS:
        raise KernelError(f"the FP8 kernels take fp16, bf16 or float32 activations, not {x.dtype}; convert x")
    call = planned(x, w, static is not None, bias is not None)
    tune.choose("fp8", x.device, (), lambda: [tune.LIBRARY], lambda c: None)
    tune.settle(key, "fp8", x.device, (), call)
    return call(x, w, static, bias)


def planned(x: Tensor, w: PackedFp8, is_static: bool, has_bias: bool) -> Callable[..., Tensor]:
    """Return what quantizes, multiplies and scales activations and weights like `x` and `w`."""
    N, K, device = w.N, w.K, x.device
    M, quantizing = x.shape[:-1].numel(), Quantizing(x, K, is_static=is_static, e4m3=True)
    outputs, grid = blank((*x.shape[:-1], N), x.dtype, device), (cdiv(M * N, 1024),)
    fixed: dict[str, Any] = {"STATIC": is_static, "HAS_BIAS": has_bias, "SPLIT_K": 1, "BLOCK": 1024, **OPTIONS}

    def call(x: Tensor, w: PackedFp8, static: Tensor | None, bias: Tensor | None) -> Tensor:
        with on(device):
            q, x_scale = quantizing(x, static)
            sums = torch._scaled_mm(q.view(E4M3).view(M, K), w.operand, w.one, w.one, out_dtype=torch.float32)
            y = outputs()
            sum_int32_kernel[grid](sums, x_scale, w.scale, y if bias is None else bias, y, M * N, N, **fixed)
        return no_gradient(x, y)

    return call
