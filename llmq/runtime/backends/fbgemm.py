"""W8A8 on x86 CPUs without VNNI: fbgemm's uint8 x int8 -> int32 product, kept exact by splitting the weight.

    y[m, n] = (sum_k x_int[m, k] * w_int[n, k] - z_x[m] * sum_k w_int[n, k]) * s_x[m] * s_w[n],    x_u8 = x_int + 128

Without VNNI the product is `vpmaddubsw`: two neighbouring products are added in 16 bits, and saturate silently where
the sum leaves them. A pair of columns (2i, 2i+1) is safe for every x_u8 <= 255 when weights of one sign in it have
|w_2i| + |w_2i+1| <= 128, since 255 * 128 < 2^15. So W = A + R: A is W with the larger weight of an unsafe pair cut
back, and goes to fbgemm; R holds what was cut, in some 0.1 to 0.6 % of the places, and is multiplied as a sparse
matrix, a weighted sum of columns of x. Both are exact in integers, and so is their sum in float32 up to 2^24, beyond
which it rounds as any float32 product does.

Kept: `packed`, fbgemm's own object for A; R as `index` int32 `[nnz]` (columns), `offset` int32 `[N]` (where each row
starts) and `value` int8 `[nnz]`.
fbgemm is reached through torch's quantized tensors, which torch 2.13 deprecates; where they are gone, this refuses.
Not here: how activations are rounded (reference.py), CPUs with VNNI (int_mm.py).
"""

from __future__ import annotations

import threading
import warnings
import weakref
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq.grids.int import quantize_activation
from llmq.jit import compiled
from llmq.runtime.backends import has_vnni
from llmq.runtime.backends._w8a8 import PrepackedW8A8, centred_int8, refuses_scheme
from llmq.types import LinearSpec, QTensor

_SAFE = 128
_ROWS = 64  # of x that meet R at once: what they make stays in cache
_FEW = 4  # rows; weighted sums of columns that are this short cost more than they add
_ENGINE = threading.Lock()  # torch's choice of quantized engine is global
_numbers = count()
_weights: weakref.WeakValueDictionary[int, Fbgemm] = weakref.WeakValueDictionary()
"""Weights by number: how a compiled graph, which can hold no fbgemm object, names one."""


class Fbgemm(PrepackedW8A8):
    """An int8 weight for fbgemm, and what is left of it as a sparse matrix."""

    name = "fbgemm"
    rank = 6
    index: Tensor
    offset: Tensor
    value: Tensor

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if has_vnni():
            return "this CPU has VNNI, for which int_mm is made"
        if "fbgemm" not in torch.backends.quantized.supported_engines or not _has_ops():
            return "this torch has no fbgemm"
        return refuses_scheme(spec) or ("2 does not divide K" if spec.K % 2 else None)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        A_NK, index, offset, value = split(centred_int8(q))
        self.packed = _prepack(A_NK)
        self.keep(index=index, offset=offset, value=value, scale=q.params.scale)
        self._enter()

    def _enter(self) -> None:
        self.number = next(_numbers)
        _weights[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Fbgemm:
        """Copy the tensors; fbgemm's object is never written to and is shared."""
        copy = self.__new__(type(self))
        copy.__dict__ = self.__dict__ | {
            "_buffers": {k: None if t is None else t.clone() for k, t in self._buffers.items()}
        }
        memo[id(self)] = copy
        copy._enter()
        return copy

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        return _linear_op(x, self.number, self.N) if torch.compiler.is_compiling() else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return `Q(x) @ W^T` in the dtype of `x`."""
        x_int, s_x, zero = quantize_activation(x.reshape(-1, self.K), self.activation, self.input)
        x_int = x_int.float()
        y_MN = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x_int, 1.0, 128, self.packed)
        if len(self.value):
            self._add_rest(x_int, y_MN)
        y_MN = self.rescaled(y_MN, s_x, zero)
        return y_MN.to(x.dtype).reshape(*x.shape[:-1], self.N)

    def _add_rest(self, x_MK: Tensor, y_MN: Tensor) -> None:
        """Add `x @ R^T` for integers `x`, exact: gathered for few rows, else as weighted sums of columns."""
        gather = compiled(_gather, "f2 w1 w1 b1 f2") if len(x_MK) <= _FEW else None
        if gather is not None:
            gather(*(t.numpy() for t in (x_MK.contiguous(), self.index, self.offset, self.value, y_MN)))
            return
        bags, value = torch.ops.aten._embedding_bag_forward_only, self.value.float()
        for x, y in zip(x_MK.split(_ROWS), y_MN.split(_ROWS), strict=True):
            y.add_(bags(x.T.contiguous(), self.index, self.offset, False, 0, False, value)[0].T)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        w = torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()
        counts = torch.diff(self.offset, append=self.offset.new_tensor([len(self.value)]))
        rows = torch.arange(self.N).repeat_interleave(counts.long())
        w[rows, self.index.long()] += self.value
        return self.quantized(w, self.scale)


def _gather(x, index, offset, value, y):  # type: ignore[no-untyped-def]
    """Add `x @ R^T` to `y`. numba compiles this."""
    for m in range(x.shape[0]):
        for n in range(len(offset)):
            total = np.float32(0)
            for j in range(offset[n], offset[n + 1] if n + 1 < len(offset) else len(value)):
                total += np.float32(value[j]) * x[m, index[j]]
            y[m, n] += total


def split(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A `[N, K]`, int8 and safe, and R = W - A as columns, row starts and values (see the module)."""
    pairs = w_NK.unflatten(1, (-1, 2))
    first, second = pairs[..., 0].to(torch.int16), pairs[..., 1].to(torch.int16)
    excess = (first.abs() + second.abs() - _SAFE).clamp_(min=0)
    excess *= (first < 0) == (second < 0)
    of_second = second.abs() > first.abs()
    cut = torch.stack([excess * ~of_second * first.sign(), excess * of_second * second.sign()], dim=-1)
    R_NK = cut.flatten(1).to(torch.int8)
    rows, columns = R_NK.nonzero(as_tuple=True)
    starts = torch.bincount(rows, minlength=len(w_NK)).cumsum(0)
    offset = torch.cat([starts.new_zeros(1), starts[:-1]])
    return w_NK - R_NK, columns.to(torch.int32), offset.to(torch.int32), R_NK[rows, columns]


def _prepack(A_NK: Tensor) -> Any:
    """Return fbgemm's object for an int8 weight; its scale is 1."""
    N = len(A_NK)
    with _ENGINE, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the deprecation, which `refuses` is prepared for
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            ones, zeros = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(A_NK.contiguous(), ones, zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = before


def _has_ops() -> bool:
    ops = ("linear_prepack", "linear_unpack", "linear_with_input_q_dq_qweight_dq_output_fp32")
    return hasattr(torch, "_make_per_channel_quantized_tensor") and all(hasattr(torch.ops.quantized, o) for o in ops)


def _linear(x: Tensor, number: int, N: int) -> Tensor:
    return _weights[number].product(x)


_linear_op = torch.library.custom_op(
    "llmq::fbgemm_linear", _linear, mutates_args=(), schema="(Tensor x, int number, int N) -> Tensor"
)


@_linear_op.register_fake
def _(x: Tensor, number: int, N: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], N)
