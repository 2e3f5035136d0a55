"""4-bit weights, float activations, through loops that numba compiles; nothing is rounded but float32 sums.

    few rows of x:   codes meet x in registers, group by group
    many rows:       panels of W decoded to float32, exactly as the reference does, and multiplied by torch

A byte b holds a low and a high code, so that b = low + 16 high, and over a group

    sum (low x_low + high x_high) = sum b (x_high / 16) + low (x_low - x_high / 16):

one conversion for two weights, and a mask for one of them. `y = sum_g s_g (that - zero_g sum x_g)`.

    codes uint8 [N, G, g/2]   byte j: low nibble column j of the group, high nibble column g/2 + j
    scale float32 [N, G]      zero uint8 [N, G], or [1, G] where all rows agree

Columns are sorted by group where the checkpoint has an activation order, and x follows. On AVX-512 torch's own product
(int4pack.py) is taken. Not here: 8 bits (int8pack.py).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.compiled import Loop, compiled
from llmq.runtime.backends import Prepacked, as_they_lay, by_group, refuses_weight_only
from llmq.types import LinearSpec, Params, QTensor

FEW = 16
"""The most rows that go to the loop; the times of both sides are in docs/runtime.md."""
_PANEL = 256  # rows of W decoded at once
_KINDS = "u3 f2 u2 f4 f2 f2 i i"  # of `_one`, `_four` and `_decode`


class Int4Loop(Prepacked):
    """A 4-bit weight for loops of our own."""

    name = "int4loop"
    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None
    g_idx: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if reason := refuses_weight_only(spec, device, bits=4, divisor=16):
            return reason
        if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            return "torch's int4 product is taken on AVX-512"
        return None if compiled(_one, _KINDS, reassociate=True) else "numba is not installed"

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        codes, order = by_group(q)
        low, high = codes.view(self.N, q.params.scale.shape[1], 2, -1).unbind(2)
        zero = q.params.zero.to(torch.uint8)
        self.scale_dtype = q.params.scale.dtype
        self.keep(
            codes=(low | high << 4).contiguous(),
            scale=q.params.scale.float().contiguous(),
            zero=(zero[:1] if (zero == zero[:1]).all() else zero).contiguous(),
            order=order,
            g_idx=q.g_idx,
        )

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        run = _linear_op if torch.compiler.is_compiling() else _linear
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return run(x, self.codes, self.scale, self.zero)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=2).reshape(self.N, self.K)
        codes = as_they_lay(codes, self.order)
        zero = self.zero.to(torch.int32).expand(self.scale.shape).contiguous()
        return QTensor(codes, Params(self.scale.to(self.scale_dtype), zero), self.grid, self.g_idx)


def _linear(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return `x @ W^T` in the dtype of `x`."""
    N, G, half = codes.shape
    x_MK = x.reshape(-1, 2 * G * half).float()
    product = loop_product if len(x_MK) <= FEW else decoded_product
    return product(x_MK, codes, scale, zero).to(x.dtype).reshape(*x.shape[:-1], N)


def loop_product(x_MK: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return `x @ W^T` in float32; rows beyond the first are padded to fours."""
    M, (N, G, half) = len(x_MK), codes.shape
    padded = 1 if M == 1 else -(-M // 4) * 4
    X = torch.zeros(padded, G, 2, half)
    sums = torch.zeros(padded, G)
    y = torch.empty(padded, N)
    _ready(_split, "f4 f4 f2")(x_MK.contiguous().view(M, G, 2, half).numpy(), X.numpy(), sums.numpy())
    _run(_one if M == 1 else _four, (codes, scale, zero, X, sums, y), 0, N)
    return y[:M]


def decoded_product(x_MK: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return `x @ W^T` in float32, decoding `_PANEL` rows of W at a time."""
    N, G, half = codes.shape
    W = torch.empty(min(_PANEL, N), G, 2, half)
    unused = torch.empty(1, 1)
    y_MN = x_MK.new_empty(len(x_MK), N)
    for n in range(0, N, _PANEL):
        last = min(n + _PANEL, N)
        _run(
            _decode,
            (codes[n:last], scale[n:last], zero[n:last] if len(zero) == N else zero, W, unused, unused),
            0,
            last - n,
        )
        y_MN[:, n:last] = F.linear(x_MK, W[: last - n].view(last - n, -1))
    return y_MN


_linear_op = torch.library.custom_op(
    "llmq::int4loop_linear",
    _linear,
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor zero) -> Tensor",
)


@_linear_op.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _ready(loop: Loop, kinds: str) -> Loop:
    found = compiled(loop, kinds, reassociate=True)
    if found is None:  # `refuses` has asked before
        raise RuntimeError("numba is not installed")
    return found


def _run(loop: Loop, tensors: tuple[Tensor, ...], first: int, last: int) -> None:
    """Run a loop over rows `first` to `last` of the weight, in torch's threads where they can be had, else in this."""
    team = _team()
    if team is None or torch.get_num_threads() == 1:
        _ready(loop, _KINDS)(*(t.numpy() for t in tensors), first, last)
        return
    codes, _, zero, X = tensors[:4]
    sizes = torch.tensor([_LOOPS.index(loop), first, last, *codes.shape, len(zero), len(X)])
    pointers = (ctypes.c_void_p * 7)(*(t.data_ptr() for t in (*tensors, sizes)))
    team.fork(team.part.address, pointers, torch.get_num_threads(), 0)


class _Team(NamedTuple):
    """torch's OpenMP threads: what runs a function in them, and the function."""

    fork: Any
    part: Any


@cache
def _team() -> _Team | None:
    """Return the team, None where torch brings another threading runtime than GNU OpenMP.

    Threads of our own would share the cores with torch's, which spin for some milliseconds after every parallel region:
    a decode step took four times as long. `GOMP_parallel(function, data, threads, flags)` is the entry that compilers
    call (gcc, libgomp ABI).
    """
    process = ctypes.CDLL(None)
    if not all(hasattr(process, n) for n in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")):
        return None
    from numba import carray, cfunc, types

    thread: Any = types.ExternalFunction("omp_get_thread_num", types.int32())
    threads: Any = types.ExternalFunction("omp_get_num_threads", types.int32())
    one, four, decode = (_ready(loop, _KINDS) for loop in _LOOPS)

    def part(data):
        """Run one thread's share of a loop: `data` points at six arrays and at their sizes."""
        sizes = carray(data[6], 8, np.int64)
        first, count = sizes[1], sizes[2] - sizes[1]
        N, G, half, Z, M = sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]
        codes, scale = carray(data[0], (N, G, half), np.uint8), carray(data[1], (N, G), np.float32)
        zero, X = carray(data[2], (Z, G), np.uint8), carray(data[3], (M, G, 2, half), np.float32)
        sums, y = carray(data[4], (M, G), np.float32), carray(data[5], (M, N), np.float32)
        begin, end = first + count * thread() // threads(), first + count * (thread() + 1) // threads()
        if sizes[0] == 0:
            one(codes, scale, zero, X, sums, y, begin, end)
        elif sizes[0] == 1:
            four(codes, scale, zero, X, sums, y, begin, end)
        else:
            decode(codes, scale, zero, X, sums, y, begin, end)

    fork = process.GOMP_parallel
    fork.argtypes, fork.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return _Team(fork, cfunc(types.void(types.CPointer(types.voidptr)), cache=True)(part))


def _split(x, X, sums):
    """Fill X `[M, G, 2, g/2]` with `x_high / 16`, `x_low - x_high / 16`, and `sums` `[M, G]`. numba compiles this."""
    for m in range(x.shape[0]):
        for g in range(x.shape[1]):
            total = np.float32(0)
            for j in range(x.shape[3]):
                low, high = x[m, g, 0, j], x[m, g, 1, j]
                part = high * np.float32(0.0625)
                X[m, g, 0, j] = part
                X[m, g, 1, j] = low - part
                total += low + high
            sums[m, g] = total


def _one(codes, scale, zero, X, sums, y, first, last):  # noqa: PLR0913, PLR0917
    """Fill `y[0, first:last]`, adding groups up lane by lane. numba compiles this."""
    half = codes.shape[2]
    lanes = np.empty(half, np.float32)
    for n in range(first, last):
        row = min(n, zero.shape[0] - 1)
        total = np.float32(0)
        for j in range(half):
            lanes[j] = np.float32(0)
        for g in range(scale.shape[1]):
            s = scale[n, g]
            for j in range(half):
                b = codes[n, g, j]
                lanes[j] += s * (np.float32(b) * X[0, g, 0, j] + np.float32(b & np.uint8(15)) * X[0, g, 1, j])
            total -= s * np.float32(zero[row, g]) * sums[0, g]
        for j in range(half):
            total += lanes[j]
        y[0, n] = total


def _four(codes, scale, zero, X, sums, y, first, last):  # noqa: PLR0913, PLR0917
    """Fill `y[:, first:last]` four rows at a time, whose codes are converted once. numba compiles this."""
    for m in range(0, X.shape[0], 4):
        for n in range(first, last):
            row = min(n, zero.shape[0] - 1)
            y0 = y1 = y2 = y3 = np.float32(0)
            for g in range(scale.shape[1]):
                a0 = a1 = a2 = a3 = np.float32(0)
                for j in range(codes.shape[2]):
                    b = codes[n, g, j]
                    both, low = np.float32(b), np.float32(b & np.uint8(15))
                    a0 += both * X[m, g, 0, j] + low * X[m, g, 1, j]
                    a1 += both * X[m + 1, g, 0, j] + low * X[m + 1, g, 1, j]
                    a2 += both * X[m + 2, g, 0, j] + low * X[m + 2, g, 1, j]
                    a3 += both * X[m + 3, g, 0, j] + low * X[m + 3, g, 1, j]
                s, z = scale[n, g], np.float32(zero[row, g])
                y0 += s * (a0 - z * sums[m, g])
                y1 += s * (a1 - z * sums[m + 1, g])
                y2 += s * (a2 - z * sums[m + 2, g])
                y3 += s * (a3 - z * sums[m + 3, g])
            y[m, n], y[m + 1, n], y[m + 2, n], y[m + 3, n] = y0, y1, y2, y3


def _decode(codes, scale, zero, W, unused, also_unused, first, last):  # noqa: PLR0913, PLR0917
    """Fill W `[n, G, 2, g/2]` with weights `first` to `last`. numba compiles this."""
    for n in range(first, last):
        row = min(n, zero.shape[0] - 1)
        for g in range(scale.shape[1]):
            s, z = scale[n, g], np.float32(zero[row, g])
            for j in range(codes.shape[2]):
                b = codes[n, g, j]
                W[n, g, 0, j] = s * (np.float32(b & np.uint8(15)) - z)
                W[n, g, 1, j] = s * (np.float32(b & np.uint8(240)) * np.float32(0.0625) - z)


_LOOPS = (_one, _four, _decode)
