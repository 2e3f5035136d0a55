"""What the ggml grids share: rows are cut into stored blocks, and the byte layout of a block is the grid.

A qblock of 32 columns is one group with float16 scales of its own. A superblock of 256 columns is a qblock of 8 or 16
groups whose scales are small integers times one float16:

    w = d * sc * level(code)                 q4_0 q5_0 q8_0 iq4_nl (no sc) | q3_k q6_k iq4_xs       _ggml_linear.py
    w = d * sc * code - dmin * m             q4_1 q5_1 (no sc, no m)       | q2_k q4_k q5_k         _ggml_affine.py

Every factor of a product fits 24 bits, so float32 decodes exactly as ggml does. `fit` works on chunks of rows. Groups
are searched by a loop that numba compiles, which reads the rows as they lie; without it in torch, on rows transposed to
`[g, groups, B]` (B qblocks in all). What is found of a group is `[groups, B]`, where sums over the groups of a
superblock run at full vector width.
Facts: the block structures of ggml-common.h (ggml-org/llama.cpp). Not here: the container (formats/).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llmq.granularity import PerGroup
from llmq.params import ROUNDER
from llmq.stored import StoredGrid
from llmq.types import GgmlParams, Held, LlmqError, Parameters

_CHUNK = 2**20  # weights of one chunk: enough that torch's calls cost little beside what they do for its superblocks
_ROUND = torch.tensor(ROUNDER)
_LEAST_D = 2.0**-24  # float16 holds nothing below
_LARGEST = 1e9  # beyond what any type reaches (65504 * 128 * 32); keeps squares and their sums finite
_HEAVIEST = 1e4  # of a weight without importance, for the same reason
_DEAD = 1e-6  # importance of a column that no token excites, as a fraction of the mean: it still gets a scale


class Stored(NamedTuple):
    """What a qblock stores beside its codes; shapes as in `GgmlParams`."""

    d: Tensor
    dmin: Tensor | None = None
    sc: Tensor | None = None
    m: Tensor | None = None


@dataclass(frozen=True)
class GgmlGrid(StoredGrid):
    """The base of the ggml grids.

    bits: bits of a code. group_size: columns that share a scale.
    qblock, qblock_bytes: columns and bytes of a stored block.
    small_range: least and greatest `sc` and `m`; (1, 1) where a type stores neither.
    There is no range to choose: `fit` searches the scales itself.
    """

    bits: ClassVar[int]
    group_size: ClassVar[int]
    qblock: ClassVar[int]
    qblock_bytes: ClassVar[int]
    small_range: ClassVar[tuple[int, int]] = (1, 1)

    @cached_property
    def granularity(self) -> PerGroup:
        """See `Grid.granularity`."""
        return PerGroup(self.group_size)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a stored weight, scales included."""
        return 8 * self.qblock_bytes / self.qblock

    def row_bytes(self, K: int) -> int:
        """See `StoredGrid.row_bytes`."""
        if K % self.qblock:
            raise ValueError(
                f"{type(self).__name__} stores {self.qblock} columns together, which do not divide K = {K}"
            )
        return K // self.qblock * self.qblock_bytes

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> GgmlParams:
        """Choose the scales of float32 `W_NK`, in the precision they are stored in.

        H_KK: X^T X, or its diagonal `[K]` alone (an importance matrix): column k's squared error counts for
        `H_KK[k, k]`. Without it, see `error_weights`.
        Raises ValueError where the qblock does not divide K, LlmqError for NaN or infinite weights.
        """
        N, K = W_NK.shape
        self.row_bytes(K)
        importance = _importance(H_KK)
        step = max(1, _CHUNK // K)
        chunks = (W_NK[i : i + step].float() for i in range(0, N, step))
        d, *rest = zip(*(self._fit_rows(_finite(chunk), importance) for chunk in chunks), strict=True)
        return self.params(Stored(torch.cat(d), *(None if p[0] is None else torch.cat(p) for p in rest)))

    @property
    def held(self) -> Held:
        """What float16 holds of `d`; that of a superblock often has few digits, which its small scales make up for."""
        return Held(_LEAST_D, _LEAST_D, 65504.0)

    def covering(self, W_NK: Tensor) -> Tensor:
        """See `Grid.covering`; the `d` of each qblock, `[N, B]`."""
        lo, hi = (x.float() for x in W_NK.reshape(len(W_NK), -1, self.qblock).aminmax(dim=-1))
        return self._reach(lo, hi) / max(map(abs, self.small_range))

    @abstractmethod
    def _reach(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Return the scale with which the levels just cover `[lo, hi]`."""

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Parameters, H_KK: Tensor, group_K: Tensor
    ) -> GgmlParams:
        """Return params with no higher `tr (W - Q) H (W - Q)^T` for solved codes `[N, K]`; see `_ggml_refine`.

        gradient_NK: not asked: it changes block by block. group_K: nor this: blocks hold the columns as they lie.
        """
        from llmq.grids._ggml_refine import refine

        return self.params(refine(error_NK, self._decoded_levels(codes), _stored(params), H_KK, self))

    def params(self, stored: Stored) -> GgmlParams:
        """Return the parameters that `stored` means."""
        groups = self.qblock // self.group_size

        def product(x: Tensor, small: Tensor | None) -> Tensor:
            x = x.float().repeat_interleave(groups, dim=1)
            return x if small is None else x * small

        scale = product(stored.d, stored.sc)
        offset = None if stored.dmin is None else product(stored.dmin, stored.m).neg_()
        return GgmlParams(scale, offset, *stored)

    def to_bytes(self, codes: Tensor, params: Parameters) -> Tensor:
        """See `StoredGrid.to_bytes`."""
        N, K = codes.shape
        B = K // self.qblock
        d, dmin, *small = _stored(params)
        by_qblock = (None if p is None else p.reshape(N, B, -1) for p in small)
        blocks = self._pack(codes.to(torch.uint8).reshape(N, B, self.qblock), Stored(d, dmin, *by_qblock))
        return blocks.reshape(N, self.row_bytes(K))

    def from_bytes(self, rows: Tensor, once: object = None) -> tuple[Tensor, GgmlParams]:
        """See `StoredGrid.from_bytes`."""
        N = rows.shape[0]
        codes, stored = self._unpack(rows.reshape(N, -1, self.qblock_bytes))
        rest = (None if p is None else p.reshape(N, -1) for p in stored[1:])
        return codes.reshape(N, -1), self.params(Stored(stored.d.reshape(N, -1), *rest))

    @abstractmethod
    def _fit_rows(self, W_nK: Tensor, importance: Tensor | None) -> Stored:
        """Choose what some rows store, shapes as in `GgmlParams`."""

    @abstractmethod
    def _decoded_levels(self, codes: Tensor) -> Tensor:
        """Return what `scale` multiplies, float32."""

    @abstractmethod
    def _pack(self, codes: Tensor, stored: Stored) -> Tensor:
        """Return uint8 `[N, B, qblock_bytes]` of codes `[N, B, qblock]`, d, dmin `[N, B]`, sc, m `[N, B, groups]`."""

    @abstractmethod
    def _unpack(self, blocks: Tensor) -> tuple[Tensor, Stored]:
        """Invert `_pack`."""


def _stored(params: Parameters) -> Stored:
    """Return what a file stores of params. Raises ValueError where they are spread over columns."""
    own = GgmlParams.of(params)
    return Stored(held(own.d), own.dmin, own.sc, own.m)


def held(p: Tensor | None) -> Tensor:
    """Return what a type stores. Raises ValueError where params lack it: spread over columns, or another type's."""
    if p is None:
        raise ValueError("these params hold no stored scales; pass what fit or from_bytes returned")
    return p


def _importance(H_KK: Tensor | None) -> Tensor | None:
    """Return error weights `[K]` with mean 1 from a Hessian or its diagonal; None where nothing weighs anything."""
    if H_KK is None:
        return None
    diagonal = (H_KK.diagonal() if H_KK.dim() == 2 else H_KK).float()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise LlmqError("the importance weights hold NaN or infinity; calibrate again, in float32 if it was not")
    return (diagonal / mean).clamp(min=_DEAD) if mean > 0 else None


def _finite(W: Tensor) -> Tensor:
    if not torch.isfinite(torch.stack(torch.aminmax(W))).all():  # both are NaN where a value is
        raise LlmqError("a weight matrix holds NaN or infinity; repair the checkpoint, or skip that linear")
    return W.clamp(-_LARGEST, _LARGEST)


def nearest_integer(t: Tensor) -> Tensor:
    """Round `t` in place, half to even: see grids/int.py for why not by torch.round."""
    return t.add_(_ROUND).sub_(_ROUND)


def by_group(x_Mg: Tensor, grid: GgmlGrid) -> Tensor:
    """Return groups `[M, g]`, in the order of columns, as `[g, groups, B]`."""
    groups = grid.qblock // grid.group_size
    return x_Mg.view(-1, groups, grid.group_size).permute(2, 1, 0).contiguous()


def extremes(x_Mg: Tensor, grid: GgmlGrid) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of every group, `[groups, B]` each."""
    least, greatest = x_Mg.aminmax(dim=1)
    return tuple(p.view(-1, grid.qblock // grid.group_size).T.contiguous() for p in (least, greatest))  # type: ignore[return-value]


def spread(first: float, last: float, count: int) -> tuple[float, ...]:
    """Return `count` evenly spaced numbers."""
    return tuple(torch.linspace(first, last, count).tolist())


def error_weights(x_Mg: Tensor, importance_K: Tensor | None) -> Tensor:
    """Return how much the squared errors of every group count, `[M, g]`, or `[K / g, g]` where all rows are alike.

    Without importance that is |x| + rms of the group, as llama.cpp weighs Q4_K and Q5_K. Equal weights would make the
    squared error 2 to 6 % lower still, but would pull every weight towards 0 (3 % in Q3_K, 9 % in Q2_K): an error that
    does not average out over columns.
    """
    g = x_Mg.shape[1]
    if importance_K is not None:
        return importance_K.reshape(-1, g).contiguous()
    rms = torch.linalg.vector_norm(x_Mg, dim=1, keepdim=True).div_(g**0.5)
    return x_Mg.abs().add_(rms).clamp_(max=_HEAVIEST)


def larger(least: Tensor, greatest: Tensor) -> Tensor:
    """Return whichever of the two is of larger magnitude."""
    return torch.where(greatest > -least, greatest, least)


def better(found: tuple[Tensor, ...], best: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of `found` where its first, the error, is below that of `best`, else those of `best`.

    `best` is empty at first. The error's shape broadcasts against the others'.
    """
    if not best:
        return found
    lower = found[0] < best[0]
    return tuple(torch.where(lower, f, b) for f, b in zip(found, best, strict=True))


def inverse(s: Tensor) -> Tensor:
    """Return 1 / s, 0 where s is 0 or too near it to divide by."""
    return torch.where(s.abs() < 1e-30, 0.0, 1 / s)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, 0 where b is not positive."""
    return torch.where(b > 0, a / b, 0.0)


def half(x: Tensor) -> Tensor:
    """Return float32 `x` rounded to float16, kept finite."""
    return x.clamp(-65504.0, 65504.0).to(torch.float16)


def half_to_bytes(*halves: Tensor | None) -> Tensor:
    """Return float16 tensors `[...]` as little-endian bytes `[..., 2 * count]`."""
    return torch.stack([held(h) for h in halves], dim=-1).view(torch.uint8)


def bytes_to_half(raw: Tensor) -> Tensor:
    """Return the float16 values in bytes `[..., 2 * count]`, `[..., count]`."""
    return raw.contiguous().view(torch.float16)


def merge(parts: Tensor, bits: int) -> Tensor:
    """Return bytes `[..., L]` whose bits from `i * bits` on are `parts[..., i, :]`, of uint8 `[..., 8 / bits, L]`."""
    out = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        out |= parts[..., i, :] << (i * bits)
    return out


def split(raw: Tensor, bits: int) -> Tensor:
    """Invert `merge`."""
    return torch.stack([(raw >> i) & (2**bits - 1) for i in range(0, 8, bits)], dim=-2)


def merge_bits(bits: Tensor) -> Tensor:
    """Return bytes `[..., L / 8]` whose bit i of byte b is `bits[..., 8 b + i]`."""
    return merge(bits.unflatten(-1, (-1, 8)).mT, 1)


def split_bits(raw: Tensor) -> Tensor:
    """Invert `merge_bits`."""
    return split(raw, 1).mT.flatten(-2)


def pack_six(sc: Tensor | None, m: Tensor | None) -> Tensor:
    """Return the 12 bytes in which Q4_K and Q5_K keep 6-bit sc and m, `[..., 8]` each.

    Bytes 0-3 hold sc of groups 0-3, bytes 4-7 their m, both with the high 2 bits of groups 4-7 on top; bytes 8-11 hold
    the low 4 bits of groups 4-7, sc in the low nibble, m in the high one.
    """
    (sc_low, sc_high), (m_low, m_high) = (held(p).to(torch.uint8).split(4, dim=-1) for p in (sc, m))
    nibbles = (sc_high & 15) | (m_high & 15) << 4
    return torch.cat([sc_low | sc_high >> 4 << 6, m_low | m_high >> 4 << 6, nibbles], dim=-1)


def unpack_six(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `pack_six`; int16."""
    a, b, nibbles = raw.split(4, dim=-1)
    sc = torch.cat([a & 63, nibbles & 15 | a >> 6 << 4], dim=-1)
    m = torch.cat([b & 63, nibbles >> 4 | b >> 6 << 4], dim=-1)
    return sc.to(torch.int16), m.to(torch.int16)


def cut(raw: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the fields of a block: the last dim in pieces of `sizes` bytes."""
    return raw.split(list(sizes), dim=-1)
