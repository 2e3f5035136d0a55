"""Quantized keys and values: an append-only store, and attention that reads it without ever decoding it whole.

Tokens arrive in float and stay so in a window of the latest; the oldest leave it into the packed store, once, and are
never quantized again. Two axes, each with its own scale (Liu et al. 2024, KIVI, arXiv:2402.02750, for the asymmetry):

    token     one scale for each token and head, D values share it
    channel   one scale for each channel of a run of `RUN` tokens, for keys, whose outliers keep to few channels

    8 bits             x = scale * q            scale = max|x| / 127.5, q in -128 .. 127;  static: a given scale
    fp8                x = scale * value(q)     q the bits of an E4M3 float; the scale is given
    4, 2 by token      x = scale * (q - zero)   scale = (max - min) / (2^b - 1), min <= 0 <= max; zero a whole number
    4, 2 by channel    x = scale * q + low      low = min, which may be far from 0;  here and above q in 0 .. 2^b - 1

    codes   int8 [B, H, T, D], fp8 as uint8, or uint8 [B, H, T, D*b/8]: byte j holds channels j, j + D*b/8, ...,
            from the lowest bits
    scale   float32 [B, H, T, 1] or [B, H, T/RUN, D]; where there is a zero, the 8 lowest bits of its mantissa
    low     [B, H, T/RUN, D], then both bfloat16 (float16 in a float16 model)

B batch, H key-value heads, T tokens, D channels of a head, Q query tokens. Scale and low are rounded, or cut to 24
bits, before the codes are chosen. By token it is the arithmetic of `llmq_kernels.kv`, bit for bit, so that a cache is
the same on every device. Attention walks over the store a tile of tokens at a time with a running maximum and sum
(Milakov and Gimelshein 2018, arXiv:1805.02867), so that no more than a tile is ever in float.
Not here: transformers' cache and attention interfaces (integrations/cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.minifloat import E4M3

RUN = 64
"""Tokens whose keys share the scales of their channels."""
TILE = 1024  # tokens decoded at once in attention; a multiple of RUN
STEP = 128
"""Tokens by which a store grows."""
_FLOOR, _ZERO = 1e-8, 0xFF  # the least scale, the bits of a scale that hold a zero


@dataclass(frozen=True)
class KVGrid:
    """How one of the two, keys or values, is quantized.

    bits: 8, 4 or 2. axis: "token" or "channel". static: a given symmetric 8-bit scale, `[1]` or `[H, 1, 1]`, or None.
    fp8: whether entries with a given scale are E4M3 floats, not integers.
    """

    bits: int
    axis: str = "token"
    static: Tensor | None = None
    fp8: bool = False

    @property
    def run(self) -> int:
        """How many tokens have to be quantized together."""
        return RUN if self.axis == "channel" else 1


@dataclass
class Packed:
    """Some quantized tokens: `codes`, `scale` and, for asymmetric grids by channel, `low` (see the module)."""

    codes: Tensor
    scale: Tensor
    low: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Packed:
        """Apply `f` to every tensor."""
        return Packed(f(self.codes), f(self.scale), None if self.low is None else f(self.low))


def quantize(x_BHTD: Tensor, grid: KVGrid) -> Packed:
    """Return the tokens `x` quantized; with `axis` "channel", T is a multiple of `RUN`."""
    x = x_BHTD.float()
    stored = x_BHTD.dtype if x_BHTD.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    if grid.static is not None and grid.fp8:
        return Packed(E4M3.encode(x / grid.static.float()), grid.static)
    if grid.static is not None:
        codes = (x / grid.static.float()).round_().clamp_(-128, 127)
        return Packed(codes.to(torch.int8), grid.static)
    runs = x.unflatten(2, (-1, grid.run)) if grid.axis == "channel" else x.unsqueeze(2)  # [B, H, T/RUN, RUN, D]
    dim = 3 if grid.axis == "channel" else -1
    least, most = runs.amin(dim, keepdim=True), runs.amax(dim, keepdim=True)
    if grid.bits == 8:
        scale = _step(torch.maximum(most, -least), 127.5)
        codes = (runs / scale).round_().clamp_(-128, 127).to(torch.int8)
        return Packed(codes.reshape(x.shape), _flat(scale, grid))
    top = 2**grid.bits - 1
    if grid.axis == "token":
        least, most = least.clamp_(max=0), most.clamp_(min=0)
        params = _step(most - least, top).view(torch.int32) & ~_ZERO
        step = params.view(torch.float32)
        zero = (-least / step).round_().clamp_(0, top)
        codes, scale, low = (runs / step).round_() + zero, (params | zero.to(torch.int32)).view(torch.float32), None
    else:
        low = least.to(stored)
        scale = ((most - low.float()) / top).clamp_(min=torch.finfo(stored).tiny).to(stored)
        codes = ((runs - low.float()) / scale.float()).round_()
    packed = _pack(codes.clamp_(0, top).to(torch.uint8).reshape(x.shape), grid.bits)
    return Packed(packed, _flat(scale, grid), None if low is None else _flat(low, grid))


def _step(width: Tensor, steps: float) -> Tensor:
    """Return the scale at which `steps` steps span a width; by a number, torch multiplies by its inverse on a GPU."""
    return (width / torch.full_like(width, steps)).clamp_(min=_FLOOR)


def dequantize(packed: Packed, grid: KVGrid, dtype: torch.dtype) -> Tensor:
    """Return the tokens in `dtype`, `[B, H, T, D]`."""
    codes = packed.codes if grid.bits == 8 else _unpack(packed.codes, grid.bits)
    if grid.static is not None and grid.fp8:
        return E4M3.decode(codes).mul_(grid.static.float()).to(dtype)
    if grid.static is not None:
        return (codes.float() * grid.static.float()).to(dtype)
    B, H, T, D = codes.shape
    runs, scale = codes.float().view(B, H, T // grid.run, grid.run, D), packed.scale.float()
    if grid.bits < 8 and grid.axis == "token":
        params = scale.view(torch.int32)
        runs, scale = runs.sub_((params & _ZERO).unsqueeze(3)), (params & ~_ZERO).view(torch.float32)
    runs = runs.mul_(scale.unsqueeze(3))
    if packed.low is not None:
        runs.add_(packed.low.float().unsqueeze(3))
    return runs.view(B, H, T, D).to(dtype)


def _flat(p: Tensor, grid: KVGrid) -> Tensor:
    """Return scales of runs `[B, H, T/RUN, 1, D]` or of tokens `[B, H, 1, T, 1]` with the 1 between taken out."""
    return p.squeeze(3) if grid.axis == "channel" else p.squeeze(2)


def _pack(codes: Tensor, bits: int) -> Tensor:
    parts = codes.chunk(8 // bits, dim=-1)
    out = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        out |= part << (i * bits)
    return out


def _unpack(words: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(words >> shift) & mask for shift in range(0, 8, bits)], dim=-1)


class Store:
    """Quantized tokens of one layer, keys or values, in buffers with room to grow."""

    def __init__(self, grid: KVGrid) -> None:
        self.grid = grid
        self.length = 0
        self._room: Packed | None = None

    def append(self, x_BHTD: Tensor) -> None:
        """Quantize tokens and add them; T is a multiple of `grid.run`."""
        new, end = quantize(x_BHTD, self.grid), self.length + x_BHTD.shape[2]
        if self._room is None or end > self._room.codes.shape[2]:
            self._grow(new, -(-end // STEP) * STEP)
        for room, part in self._parts(new):
            run = self.length * part.shape[2] // x_BHTD.shape[2]
            room[:, :, run : run + part.shape[2]] = part
        self.length = end

    def _grow(self, like: Packed, tokens: int) -> None:
        """Make room for `tokens`, keeping what is there."""
        old = self.tokens(0, self.length) if self.length else None
        per = self.grid.run

        def room(part: Tensor, runs: int) -> Tensor:
            return part.new_empty(*part.shape[:2], runs, part.shape[3])

        static = self.grid.static is not None
        scale = like.scale if static else room(like.scale, tokens // per)
        low = None if like.low is None else room(like.low, tokens // per)
        self._room = Packed(room(like.codes, tokens), scale, low)
        for to, part in self._parts(old) if old else ():
            to[:, :, : part.shape[2]] = part

    def _parts(self, packed: Packed) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the buffers that grow, each with its counterpart in `packed`."""
        if self._room is None:
            raise RuntimeError("nothing was appended")
        yield self._room.codes, packed.codes
        if self.grid.static is None:
            yield self._room.scale, packed.scale
        if self._room.low is not None and packed.low is not None:
            yield self._room.low, packed.low

    def tokens(self, start: int, end: int) -> Packed:
        """Return views of tokens `start` to `end`, both multiples of `grid.run`."""
        if self._room is None:
            raise RuntimeError("nothing was appended")
        per = self.grid.run
        cut = self._room.map(lambda p: p[:, :, start // per : end // per] if p.ndim == 4 else p)
        cut.codes = self._room.codes[:, :, start:end]
        return cut

    def decode(self, dtype: torch.dtype, start: int = 0, end: int | None = None) -> Tensor:
        """Return tokens `start` to `end` in `dtype`, `[B, H, T, D]`."""
        return dequantize(self.tokens(start, self.length if end is None else end), self.grid, dtype)

    def truncate(self, length: int) -> None:
        """Forget what comes after `length` tokens, a multiple of `grid.run`; the room stays."""
        self.length = length

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Apply `f`, which may change the batch or the device, to every buffer."""
        if self._room is not None:
            static = self.grid.static is not None
            self._room = Packed(
                f(self._room.codes),
                self._room.scale if static else f(self._room.scale),
                None if self._room.low is None else f(self._room.low),
            )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        room = self._room
        return (
            0 if room is None else room.codes.nbytes + room.scale.nbytes + (0 if room.low is None else room.low.nbytes)
        )


def attend(
    query: Tensor, tiles: Iterator[tuple[Tensor, Tensor]], scaling: float, visible: Callable[[int, int], Tensor | None]
) -> Tensor:
    """Return softmax(query keys^T * scaling) values, `[B, Hq, Q, D]`, reading keys and values tile by tile.

    query: `[B, Hq, Q, D]`, Hq a multiple of H (grouped queries).
    tiles: keys and values `[B, H, t, D]` of consecutive tokens, as float32.
    visible: of the tokens `start` to `end`, a bool mask that broadcasts to `[B, Hq, Q, t]`, None where all are; or a
        float one, which is added.
    A query that sees no token at all gives zeros.
    """
    B, Hq, Q, D = query.shape
    q = (query * scaling).float()
    top = q.new_full((B, Hq, Q, 1), -torch.inf)
    total = q.new_zeros(B, Hq, Q, 1)
    out, start = None, 0
    for keys, values in tiles:
        H, t = keys.shape[1], keys.shape[2]
        scores = (q.reshape(B, H, -1, D) @ keys.transpose(2, 3)).view(B, Hq, Q, t)
        mask = visible(start, start + t)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        finite = new_top.masked_fill(new_top == -torch.inf, 0)
        weights = (scores - finite).exp_()
        shrink = (top - finite).exp_()
        part = (weights.view(B, H, -1, t) @ values).view(B, Hq, Q, -1)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = part if out is None else out * shrink + part
        top, start = new_top, start + t
    if out is None:
        raise ValueError("there is nothing to attend to")
    return (out / total.masked_fill(total == 0, 1)).to(query.dtype)
