"""A linear layer that keeps its weight packed and decodes it for every forward: the reference path.

    y = Q(x) @ W^T + bias,    W = scale * (code - zero) decoded in float32 and rounded once to the dtype of x

Q is the identity, or int8 rounding of the activation for W8A8 (`fake_quantize`). The packed tensors are buffers under
the names they have on disk, so that the `state_dict` of a model is its checkpoint, and a buffer keeps the dtype it was
stored in whatever happens to the model: rounding scales to the model's dtype would change every weight.
A forward holds one weight's codes and values, and nothing decoded survives it. It is exact and slow.

Not here: bits on disk (formats/), replacing the linears of a model (integrations/), fast kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.types import ActivationGrid, Format, LinearSpec, Params, QTensor

_PANEL = 256  # rows decoded at once: what that needs on the way stays in the cache, 4 times faster than whole weights


class QuantLinear(nn.Module):
    """A drop-in for `nn.Linear` whose weight stays in the packed tensors of a format.

    The buffers are those of `fmt.layout(spec)` under their local names, and `bias` where there is one. They are created
    empty: fill them by `load_state_dict` (with `assign=True` when the module is on the meta device).

    fmt: the format that decodes the buffers.
    spec: name, shape `[N, K]` and scheme of the linear.
    bias: whether there is a `bias` `[N]`.
    device: where the empty buffers are made.
    dtypes: by local name, the dtype of tensors that are stored in another than the layout's (scales, bias).
    """

    bias: Tensor | None

    def __init__(
        self,
        fmt: Format,
        spec: LinearSpec,
        bias: bool = False,
        *,
        device: torch.device | str = "meta",
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        super().__init__()
        self.fmt, self.spec = fmt, spec
        self.in_features, self.out_features = spec.K, spec.N
        tensors = fmt.layout(spec)
        self._packed = tuple(tensors)
        if bias:
            tensors = tensors | {"bias": torch.empty(spec.N, dtype=torch.get_default_dtype(), device="meta")}
        else:
            self.register_buffer("bias", None)
        for local, t in tensors.items():
            dtype = (dtypes or {}).get(local, t.dtype)
            self.register_buffer(local, torch.empty(t.shape, dtype=dtype, device=device))

    def unpack(self) -> QTensor:
        """Return the weight's codes `[N, K]` and parameters. Raises LlmqError where the buffers do not fit the spec."""
        return self.fmt.unpack({local: self.get_buffer(local) for local in self._packed}, self.spec)

    def dequantize(self) -> Tensor:
        """Return the weight that `forward` multiplies with, float32 `[N, K]`."""
        return _decode(self.unpack(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., K]` to `[..., N]` in the dtype of `x`."""
        q = self.unpack()
        if self.spec.scheme.activation is not None:
            x = fake_quantize(x, self.spec.scheme.activation, q.input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, _decode(q, x.dtype), bias)

    def extra_repr(self) -> str:
        """Describe the layer the way `nn.Linear` does."""
        grid = self.spec.scheme.weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={grid.bits}, group_size={grid.group_size}, format={self.fmt.quant_method}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let `.to()`, `.half()` and the like move the buffers but never change their dtype."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)


def _decode(q: QTensor, dtype: torch.dtype) -> Tensor:
    """Return `q.dequantize()` in `dtype`, decoding a panel of rows at a time."""
    W_NK = torch.empty(q.codes.shape, dtype=dtype, device=q.codes.device)
    for i in range(0, q.codes.shape[0], _PANEL):
        rows = slice(i, i + _PANEL)
        panel = Params(q.params.scale[rows], q.params.zero[rows])
        W_NK[rows] = replace(q, codes=q.codes[rows], params=panel).dequantize()
    return W_NK


def fake_quantize(x: Tensor, grid: ActivationGrid, static: Params | None = None) -> Tensor:
    """Round activations `x` `[..., K]` to a signed integer grid and return the rounded values in the dtype of `x`.

    dynamic: a scale per token, max|x| / ((2^b - 1) / 2), computed in the dtype of `x`; codes -2^(b-1) .. 2^(b-1) - 1.
    static: `static` holds the one scale of the tensor and its zero, an unsigned code.
    The order of operations is that of compressed-tensors 0.20 (`calculate_qparams`, `_quantize_dequantize`), and so are
    the bits of the result. Raises ValueError for a static grid without parameters.
    """
    half = 2 ** (grid.bits - 1)
    if grid.dynamic:
        scale = x.abs().amax(-1, keepdim=True) / ((2 * half - 1) / 2)
        scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
        return (x / scale).clamp_(-half, half - 1).round_() * scale
    if static is None:
        raise ValueError("a static activation grid needs the scale that calibration chose")
    scale, zero = static.scale.to(x.dtype), (static.zero - half).to(x.dtype)
    return ((x / scale).add_(zero).clamp_(-half, half - 1).round_() - zero) * scale
