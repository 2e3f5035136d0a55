"""Prepacking: unpacked codes, once and without loss, into the words that the weight-only kernel reads.

K is cut into tiles of FIELDS * SUB columns. Row r of a tile's words holds, for one output feature, the codes of the
columns `j * SUB + r` for j = 0 .. FIELDS - 1, field j at bit `bits * j` of an int16, features contiguous:

    bits  SUB     FIELDS  tile          int16 words [K * bits / 16, N]
    4     32      4       128           one row of words per 4 columns
    8     64, 32  2       128, 64       32 where the group is an odd multiple of 32
    2     32      8       256
    3     32      16      512           three times 32 rows with five fields each, and at bit 15 one bit of field 15
A sub-dot of the kernel multiplies field j of all rows with SUB neighbouring activations: words go from memory to
tensor-core fragments without any shuffle. As groups are multiples of SUB, a sub-dot has one scale.

    params [G, N]         the scales, in fp16, bf16 or float32 as they came. Where there are zeros, int32: the bits of a
                          float32 scale whose low 8 mantissa bits hold the zero, which costs nothing for fp16 and bf16
                          scales (at least 13 low bits are clear). Groups of less than 128 columns of 2, 4 and 8 bits
                          keep such scales in their own 16 bits; behind the words of every tile stands one more row,
                          whose field j is the zero of the codes in field j. 32 columns of 4 bits then take 20 bits of
                          scale and zero where they would take 32
    rest   uint8 [N, G]   those low 8 bits, where float32 scales have any: the kernel multiplies with scales cut by up
                          to 2^-15 of themselves, and `unpack` still gives back every bit

K is padded to whole tiles and N to 128 with weights of value 0, so that the kernel's divisibility hints hold.
act-order (g_idx) sorts the columns by group here and the activation's columns by `order` at call.

Not here: formats on disk; the kernel (weight_only.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llmq_kernels.errors import KernelError
from llmq_kernels.launch import HALF

FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
N_MULTIPLE = 128
REVISION = 3
"""Of this layout: what was fastest for another need not be for this one."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[N, K]` for the weight-only kernel, with `w = scale * (code - zero)`.

    words: int16 `[Kp * bits / 16, Np]`, with rows of zeros `[Kp / tile more, Np]`; params: `[Gp, Np]` (see the module);
    Kp, Np: K and N padded. Both may be columns of wider tensors, alike in their strides (see `join`).
    order: int64 `[K]`, the columns of the activation in the order of the packed ones, or None.
    group: columns per scale, 0 for per channel. has_zero: whether there are zeros; else zero is 2^(bits-1).
    rest: what zeros displaced of float32 scales, uint8 `[N, G]`, or None; the kernel does without it.
    """

    words: Tensor
    params: Tensor
    order: Tensor | None
    N: int
    K: int
    bits: int
    group: int
    has_zero: bool
    rest: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, bool]:
        """What of the weight is no tensor."""
        return self.N, self.K, self.bits, self.group, self.has_zero

    @property
    def Kp(self) -> int:
        """K padded."""
        return -(-self.K // tile(self.bits, self.group)) * tile(self.bits, self.group)

    @property
    def zeros_beside(self) -> bool:
        """Whether zeros lie in the words, not in `params`."""
        return self.has_zero and self.params.dtype != torch.int32

    @property
    def Np(self) -> int:
        """N padded."""
        return self.words.shape[1]

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the weight on another device."""
        order, rest = (None if t is None else t.to(device) for t in (self.order, self.rest))
        return PackedWeight(self.words.to(device), self.params.to(device), order, *self.shape, rest)


def sub_rows(bits: int, group: int) -> int:
    """Return SUB: the columns of one sub-dot."""
    return 64 if bits == 8 and group % 64 == 0 else 32


def tile(bits: int, group: int) -> int:
    """Return the columns of one tile."""
    return FIELDS[bits] * sub_rows(bits, group)


def pack(
    codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, *, g_idx: Tensor | None = None
) -> PackedWeight:
    """Pack unsigned codes (uint8, below 2^bits) and float scales; `zero_NG` None means 2^(bits-1) everywhere.

    A single group is per channel. g_idx: `[K]`, the group of every column, in any order.
    Raises KernelError for bits, groups, zeros or shapes that the kernel cannot take, as `check` does.
    """
    check(codes_NK, scale_NG, zero_NG, bits, g_idx=g_idx)
    N, K = codes_NK.shape
    G = scale_NG.shape[1]
    if zero_NG is not None and bool((zero_NG == 2 ** (bits - 1)).all()):
        zero_NG = None
    group = 0 if G == 1 else K // G
    order = None
    if g_idx is not None and G > 1:
        codes_NK, order = _sort_columns(codes_NK, g_idx)
    size = tile(bits, group)
    Kp, Np = -(-K // size) * size, -(-N // N_MULTIPLE) * N_MULTIPLE
    beside_NG = zero_NG if beside_words(bits, group, scale_NG.dtype) else None
    params_NG, rest = _params(scale_NG, zero_NG if beside_NG is None else None)
    params = F.pad(params_NG.t(), (0, Np - N, 0, (-(-Kp // group) if group else 1) - G)).contiguous()
    # The padded columns meet activations of 0 and the padded rows are never stored: any code will do.
    padded = torch.zeros((Np, Kp), dtype=torch.uint8, device=codes_NK.device)
    padded[:N, :K] = codes_NK
    words = _words(padded, bits, sub_rows(bits, group))
    if beside_NG is not None:
        words = _with_zeros(words, F.pad(beside_NG, (0, 0, 0, Np - N)), bits, group)
    return PackedWeight(words, params, order, N, K, bits, group, zero_NG is not None, rest)


def beside_words(bits: int, group: int, scales: torch.dtype) -> bool:
    """Return whether zeros lie beside the words and not in the parameters: where that is smaller (see the module)."""
    return bits != 3 and 0 < group < 128 and scales in HALF


def unpack(w: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 `[N, K]` in packed column order, scales float32 `[N, G]` and zeros int32 `[N, G]`, exactly."""
    G = w.K // w.group if w.group else 1
    params = w.params[:G, : w.N].t().contiguous()
    if w.zeros_beside:
        words, zero = _without_zeros(w.words, w.bits, w.group)
        codes = _codes(words, w.bits, sub_rows(w.bits, w.group))[: w.N, : w.K]
        return codes, params.float(), zero[: w.N, :G].to(torch.int32)
    codes = _codes(w.words, w.bits, sub_rows(w.bits, w.group))[: w.N, : w.K]
    if w.has_zero:
        scale = params & ~0xFF if w.rest is None else params & ~0xFF | w.rest.to(torch.int32)
        return codes, scale.view(torch.float32), params & 0xFF
    return codes, params.float(), torch.full_like(params, 2 ** (w.bits - 1), dtype=torch.int32)


def join(weights: Sequence[PackedWeight]) -> tuple[PackedWeight, list[PackedWeight]]:
    """Return weights of one activation, side by side as one, and each of them as a part of it, equal in every bit.

    The parts lie behind each other, padding and all: that of weight i begins at the sum of the Np before it.
    Raises KernelError for weights that differ in K, bits, groups, zeros, the order of their columns or scales' dtype.
    """
    first, *others = weights
    if not all(_alike(w, first) for w in others):
        raise KernelError("weights that differ in K, bits, groups, zeros, column order or scales' dtype are not one")
    words, params = (torch.cat([getattr(w, n) for w in weights], 1) for n in ("words", "params"))
    spans = spans_of([w.Np for w in weights])
    parts = [
        replace(w, words=words[:, at], params=params[:, at], order=first.order)
        for w, at in zip(weights, spans, strict=True)
    ]
    return replace(first, words=words, params=params, N=spans[-1].start + weights[-1].N, rest=None), parts


def spans_of(sizes: Sequence[int]) -> list[slice]:
    """Return where things of these sizes lie, one behind the other."""
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def _alike(a: PackedWeight, b: PackedWeight) -> bool:
    return a.shape[1:] == b.shape[1:] and a.params.dtype == b.params.dtype and _same(a.order, b.order)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def dequantize(w: PackedWeight) -> Tensor:
    """Return the weight that the kernel multiplies with, float32 `[N, K]`, in packed column order."""
    codes, scale, zero = unpack(replace(w, rest=None))
    if w.group:
        scale, zero = (p.repeat_interleave(w.group, dim=1) for p in (scale, zero))
    return (codes - zero).float() * scale


def check(
    codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, *, g_idx: Tensor | None = None
) -> None:
    """Raise the KernelError that `pack` would raise, without packing."""
    if bits not in FIELDS:
        raise KernelError(f"no kernel for {bits}-bit weights; there are {', '.join(map(str, FIELDS))}")
    if codes_NK.dtype != torch.uint8 or scale_NG.shape[0] != codes_NK.shape[0]:
        raise KernelError(
            f"codes must be uint8 [N, K] and scales [N, G], not {codes_NK.dtype} {list(codes_NK.shape)} "
            f"and {list(scale_NG.shape)}"
        )
    if zero_NG is not None and zero_NG.shape != scale_NG.shape:
        raise KernelError(f"zeros are {list(zero_NG.shape)} but scales {list(scale_NG.shape)}; they must be alike")
    (N, K), G = codes_NK.shape, scale_NG.shape[1]
    if G > 1:
        _check_groups(K, G, g_idx)
    size = tile(bits, K // G if G > 1 else 0)
    rows = -(-K // size) * (size * bits // 16 + 1)  # one of them perhaps of zeros
    if rows * -(-N // N_MULTIPLE) * N_MULTIPLE >= 2**31:
        raise KernelError(f"N x K = {N} x {K} in {bits} bits is beyond the kernel's 32-bit offsets; split N")
    if int(codes_NK.max()) >= 2**bits:
        raise KernelError(f"a code is {int(codes_NK.max())}, beyond {bits} bits; give unsigned codes")
    if zero_NG is not None and not 0 <= int(zero_NG.min()) <= int(zero_NG.max()) < 2**bits:
        raise KernelError(f"a zero lies outside 0 .. {2**bits - 1}; give unsigned zeros")


def _check_groups(K: int, G: int, g_idx: Tensor | None) -> None:
    if K % G or (K // G) % 32:
        raise KernelError(
            f"{G} groups over K = {K} are not groups of a multiple of 32 columns, which the weight-only kernel needs; "
            "use group size 32, 64, 128 or per channel"
        )
    if g_idx is None:
        return
    if g_idx.shape != (K,):
        raise KernelError(f"g_idx is {list(g_idx.shape)}, not [{K}]: one group for every column")
    counts = torch.bincount(g_idx.long(), minlength=G)
    if not torch.equal(counts, torch.full_like(counts, K // G)):
        raise KernelError(f"g_idx does not put {K // G} columns into every group; re-quantize with equal groups")


def _sort_columns(codes_NK: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor | None]:
    order = torch.argsort(g_idx.long(), stable=True)
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return codes_NK, None
    return codes_NK[:, order], order


def _params(scale_NG: Tensor, zero_NG: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `[N, G]` and `rest`, of which there is none for fp16 and bf16 scales (see the module)."""
    if zero_NG is None:
        return scale_NG if scale_NG.dtype in HALF else scale_NG.float(), None
    word = scale_NG.float().contiguous().view(torch.int32)
    rest = (word & 0xFF).to(torch.uint8)
    return word & ~0xFF | zero_NG.to(torch.int32), rest if bool(rest.any()) else None


def _words(codes_NK: Tensor, bits: int, sub: int) -> Tensor:
    """Return int16 words `[K * bits / 16, N]`."""
    N = codes_NK.shape[0]
    fields = FIELDS[bits]
    tiles = codes_NK.t().reshape(-1, fields, sub, N)
    if bits != 3:
        return _join(tiles, bits).reshape(-1, N)
    bits_of_last = [tiles[:, 15:] >> word & 1 for word in range(3)]
    planes = [_join(torch.cat([tiles[:, 5 * i : 5 * i + 5], bit], 1), 3) for i, bit in enumerate(bits_of_last)]
    return torch.stack(planes, dim=1).reshape(-1, N)


def _join(fields_TFRN: Tensor, bits: int) -> Tensor:
    """Return int16 `[T, R, N]`: field f at bit `bits * f`."""
    word = torch.zeros_like(fields_TFRN[:, 0], dtype=torch.int32)
    for f in range(fields_TFRN.shape[1]):
        word |= fields_TFRN[:, f].to(torch.int32) << (bits * f)
    return word.to(torch.int16).contiguous()


def _with_zeros(words: Tensor, zero_NG: Tensor, bits: int, group: int) -> Tensor:
    """Return words with a row of zeros behind those of every tile: in each field that of its columns."""
    N, fields = words.shape[1], FIELDS[bits]
    sub = sub_rows(bits, group)
    each = zero_NG.repeat_interleave(group // sub, 1)
    tiles = words.reshape(-1, sub, N)
    each = F.pad(each, (0, len(tiles) * fields - each.shape[1])).t().reshape(-1, fields, 1, N)
    return torch.cat([tiles, _join(each, bits)], 1).reshape(-1, N)


def _without_zeros(words: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Undo `_with_zeros`: words, and zeros uint8 `[N, G]` and more."""
    N, sub = words.shape[1], sub_rows(bits, group)
    tiles = words.reshape(-1, sub + 1, N)
    each = _split(tiles[:, sub:], bits, FIELDS[bits]).reshape(-1, N).t()
    return tiles[:, :sub].reshape(-1, N), each[:, :: group // sub]


def _codes(words: Tensor, bits: int, sub: int) -> Tensor:
    """Undo `_words`: uint8 `[N, K]`."""
    N = words.shape[1]
    if bits != 3:
        return _split(words.reshape(-1, sub, N), bits, FIELDS[bits]).reshape(-1, N).t()
    planes = [_split(plane, 3, 6) for plane in words.reshape(-1, 3, sub, N).unbind(1)]
    last = torch.stack([(plane[:, 5:] & 1) << word for word, plane in enumerate(planes)]).sum(0, dtype=torch.uint8)
    return torch.cat([*(plane[:, :5] for plane in planes), last], dim=1).reshape(-1, N).t()


def _split(words_TRN: Tensor, bits: int, fields: int) -> Tensor:
    word = words_TRN.to(torch.int32)
    parts = [(word >> (bits * f)) & (2**bits - 1) for f in range(fields)]
    return torch.stack(parts, dim=1).to(torch.uint8)
