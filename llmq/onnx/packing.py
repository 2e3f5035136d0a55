"""A solved linear as ONNX's quantized operators store it, with its codes.

    MatMulNBits         words uint8 [N, B, block * bits / 8], scales [N, B], zeros packed in rows of N
    DequantizeLinear    integers [K, N], scales [G, N], zeros [G, N], blocks of K / G along K

MatMulNBits takes 2, 4 and 8 bits and blocks of a power of two from 16 on: 3 bits are kept in 4 and 5 to 7 in 8, with
the same codes and zeros; a group is so many blocks of one scale, and a row ends in a part of a block.
DequantizeLinear takes 4 and 8 bits and groups of any size. Where all zeros are the middle of the grid its integers are
signed and its zeros 0, which is the form that other runtimes than onnxruntime want. Such zeros are left out of 4 bits
and written beside 8: onnxruntime, where a session option makes signed weights unsigned, looks for them.
Both want groups in the order of the columns: where they follow the activation order, codes are written in the order of
their groups, and `order` says by which the input is gathered.
Source: onnxruntime docs/ContribOperators.md (com.microsoft.MatMulNBits); onnx docs/Operators.md (DequantizeLinear).
Not here: the nodes (dialect.py, genai.py, qdq.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq.grids._biased import Biased
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor

_BLOCKS = (128, 64, 32, 16)
_ANY = "MatMulNBits has blocks of 16, 32, 64 or 128 columns"


class NBits(NamedTuple):
    """What MatMulNBits is given. zeros: None where all are the middle of `bits`, which it then takes."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int


class Integers(NamedTuple):
    """What DequantizeLinear is given: bytes of integers of ONNX's `kind`, `[K, N]`, and scales, `[G, N]` or `[N]`.

    zeros: their bytes, of the same kind, in the shape of the scales; None for 0. block: rows of K that share a scale, 0
    for all of them.
    """

    values: Tensor
    kind: str
    scales: Tensor
    zeros: Tensor | None
    block: int


def require_held(linear: LinearSpec, *, blocks: bool) -> None:
    """Raise LlmqError for a linear that no operator holds. blocks: whether it is to be one of MatMulNBits."""
    grid = linear.scheme.weight
    if not isinstance(grid, AffineGrid | Biased):
        raise LlmqError(
            f"{linear.name}: ONNX's MatMulNBits and DequantizeLinear hold integer codes, not {type(grid).__name__}; "
            "decode it (llmq dequantize), quantize it to integers, and export that"
        )
    if blocks and linear.scheme.activation is None:
        _block(linear.K, grid.granularity.groups(linear.K), linear.name)


def in_order(q: QTensor, name: str) -> tuple[QTensor, Tensor | None]:
    """Return a linear with its groups in the order of its columns, and the order of the input that goes with it.

    Raises LlmqError for groups of unequal size.
    """
    K, G = q.codes.shape[1], q.params.scale.shape[1]
    natural = torch.arange(K) // (K // G)
    if q.g_idx is None or torch.equal(q.g_idx.long(), natural):
        return replace(q, g_idx=None), None
    order = torch.argsort(q.g_idx.long(), stable=True)
    if not torch.equal(q.g_idx.long()[order], natural):
        raise LlmqError(f"{name}: its groups have different numbers of columns, which no operator of ONNX takes")
    return replace(q, codes=q.codes[:, order], g_idx=None), order


def n_bits(q: QTensor, name: str) -> NBits:
    """Return a linear in order as MatMulNBits takes it. Raises LlmqError for groups that are no whole blocks."""
    params, (N, K), bits = Params.of(q.params), q.codes.shape, _held(q.grid.bits, (2, 4, 8))
    block = _block(K, params.scale.shape[1], name)
    count = -(-K // block)
    repeats = -(-count // params.scale.shape[1])
    scales, zeros = (p.repeat_interleave(repeats, 1) for p in (params.scale, params.zero))
    codes = F.pad(q.codes, (0, count * block - K)).reshape(N, count, block)
    middle = bool((zeros == 2 ** (bits - 1)).all())
    return NBits(pack(codes, bits), scales, None if middle else pack(zeros.to(torch.uint8), bits), bits, block)


def integers(q: QTensor) -> Integers:
    """Return a linear in order as DequantizeLinear takes it."""
    params, bits = Params.of(q.params), _held(q.grid.bits, (4, 8))
    middle = 2 ** (q.grid.bits - 1)
    signed = bool((params.zero == middle).all())
    values = q.codes.to(torch.int16) - middle if signed else q.codes
    G = params.scale.shape[1]
    scales, zeros = ((p[:, 0] if G == 1 else p.T).contiguous() for p in (params.scale, params.zero))
    kind = f"{'' if signed else 'U'}INT{bits}"
    if signed:
        zeros = zeros - middle
    stored = None if signed and bits == 4 else flat(zeros, bits)
    return Integers(flat(values.T, bits), kind, scales, stored, 0 if G == 1 else q.codes.shape[1] // G)


def flat(values: Tensor, bits: int) -> Tensor:
    """Return integers of 4 or 8 bits as bytes one after the other, row by row, two's complement."""
    return pack((values.contiguous().reshape(1, -1).to(torch.int16) & (2**bits - 1)).to(torch.uint8), bits)[0]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 `[..., n]` below 2^bits as uint8 `[..., ceil(n * bits / 8)]`, low bits first."""
    if bits == 8:
        return codes.contiguous()
    per = 8 // bits
    parts = F.pad(codes, (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    out = parts[..., 0].clone()
    for i in range(1, per):
        out |= parts[..., i] << (bits * i)
    return out


def _held(bits: int, widths: tuple[int, ...]) -> int:
    """Return the least of `widths` that codes of so many bits fit in."""
    return next(width for width in widths if width >= bits)


def _block(K: int, G: int, name: str) -> int:
    """Return the columns of a block: the largest of which a group is several, or of which it is a part for a row."""
    size = K // G
    fitting = [block for block in _BLOCKS if size % block == 0]
    if not fitting and G > 1:
        raise LlmqError(f"{name}: groups of {size} columns, but {_ANY}; say --to onnx:qdq")
    return fitting[0] if fitting else 32
