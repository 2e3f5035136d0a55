"""4-bit weights, float activations, through torch's int4 packed product for CPUs.

    few rows of x:   y = bf16(x) @ W'^T by `_weight_int4pack_mm_for_cpu`,  w' = (code - 8) * s + z
    many rows:       panels of W decoded to float32, exactly as the reference does, and multiplied in float32

s and z = (8 - zero) * s are bfloat16, the only dtype for which the product is vectorized: in the first case
activations, scales, offsets and results are rounded to bfloat16 (2^-9, relative); in the second nothing is. What
rounding took from a scale is kept in `residual`, so the checkpoint's scales come back bit for bit and the second case
uses them.

`codes`, as torch packs them: tiles of B output rows (32 with AVX2, 64 with AVX-512; the packer is asked), one nibble a
weight:

    uint8 [N/B, K, B/2]    byte j of column k:  low nibble row j of the tile, high nibble row B/2 + j

`sz` bfloat16 `[K/g, N, 2]`. Columns are sorted by group where the checkpoint has an activation order, and x follows.
Not here: 8 bits (int8pack.py).
"""

from functools import cache

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, by_group, in_file_order, many_rows, one_op, refuses_weight_only
from llmq.types import LinearSpec, Params, QTensor

_GROUPS = (256, 128, 64, 32)  # the group sizes that the product takes
_PANEL = 256  # columns decoded at once: 2 MB at N = 2048, in cache


class Int4Pack(Prepacked):
    """A 4-bit weight for `_weight_int4pack_mm_for_cpu`."""

    name = "int4pack"
    rank = 3
    codes: Tensor
    sz: Tensor
    residual: Tensor | None
    order: Tensor | None
    g_idx: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if reason := refuses_weight_only(spec, device, bits=4, divisor=32):
            return reason
        rows = tile_rows()
        if rows is None:
            return "this torch has no int4 product, or packs in an unknown order"
        return f"{rows} does not divide N = {spec.N}" if spec.N % rows else None

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        G = q.params.scale.shape[1]
        size = self.K // G
        self.group = next(g for g in _GROUPS if size % g == 0)
        self.repeats = size // self.group
        codes, order = by_group(q)
        scale = q.params.scale.repeat_interleave(self.repeats, dim=1).T
        zero = Params.of(q.params).zero.repeat_interleave(self.repeats, dim=1).T
        s = scale.to(torch.bfloat16)
        z = ((8 - zero) * s.float()).to(torch.bfloat16)
        self.scale_dtype = q.params.scale.dtype
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        self.keep(
            codes=packed,
            sz=torch.stack([s, z], dim=-1).contiguous(),
            residual=_residual(scale),
            order=order,
            g_idx=q.g_idx,
        )

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return _linear(x, self.codes, self.sz, self.residual, self.group)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        N, K = self.N, self.K
        codes = _nibbles(_tiles(self.codes, N, K)).transpose(1, 2).reshape(N, K)
        codes = in_file_order(codes, self.order)
        first = slice(None, None, self.repeats)
        scale, zero = exact_params(self.sz[first], None if self.residual is None else self.residual[first])
        params = Params(scale.T.to(self.scale_dtype).contiguous(), zero.T.to(torch.int32).contiguous())
        return QTensor(codes, params, self.grid, self.g_idx)


def exact_params(sz_GN2: Tensor, residual_GN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scales and zeros, float32 `[G, N]`, that `sz` was rounded from."""
    s, z = sz_GN2[..., 0].float(), sz_GN2[..., 1].float()
    zero = 8 - (z / s).round()
    if residual_GN is not None:
        shift = 13 if residual_GN.dtype == torch.int8 else 0
        s = (s.view(torch.int32) + (residual_GN.to(torch.int32) << shift)).view(torch.float32)
    return s, zero


def _residual(scale: Tensor) -> Tensor | None:
    """Return what rounding to bfloat16 takes from the bits of a scale as float32.

    A float16 holds 3 bits more than a bfloat16 (a subnormal fewer), so the difference counts steps of 2^13, at most 4.
    """
    if scale.dtype == torch.bfloat16:
        return None
    exact = scale.float().contiguous()
    difference = exact.view(torch.int32) - exact.bfloat16().float().view(torch.int32)
    return (difference >> 13).to(torch.int8) if scale.dtype == torch.float16 else difference


@one_op("(Tensor x, Tensor codes, Tensor sz, Tensor? residual, int group) -> Tensor", lambda codes, sz, *_: sz.shape[1])
def _linear(x: Tensor, codes: Tensor, sz: Tensor, residual: Tensor | None, group: int) -> Tensor:
    """Return `x @ W^T` in the dtype of `x`."""
    K, N = x.shape[-1], sz.shape[1]
    x_MK = x.reshape(-1, K)
    if len(x_MK) <= many_rows():
        y = packed_product(x_MK, codes, sz, group)
    else:
        y = decoded_product(x_MK.float(), codes, sz, residual, group)
    return y.to(x.dtype).reshape(*x.shape[:-1], N)


def packed_product(x_MK: Tensor, codes: Tensor, sz: Tensor, group: int) -> Tensor:
    """Return `x @ W'^T` in bfloat16, by torch's product."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.bfloat16().contiguous(), codes, group, sz)


def decoded_product(x_MK: Tensor, codes: Tensor, sz: Tensor, residual: Tensor | None, group: int) -> Tensor:
    """Return `x @ W^T` in float32, decoding `_PANEL` columns of W at a time."""
    K, N = x_MK.shape[1], sz.shape[1]
    scale_GN, zero_GN = exact_params(sz, residual)
    tiles = _tiles(codes, N, K)
    y_MN = x_MK.new_zeros(len(x_MK), N)
    for k in range(0, K, _PANEL):
        panel = tiles[:, k : k + _PANEL]
        kp, groups = panel.shape[1], slice(k // group, (k + panel.shape[1]) // group)
        W = torch.empty(kp, len(tiles), 2, panel.shape[2])  # k, tile, half, row
        W[:, :, 0].copy_((panel & 15).transpose(0, 1))
        W[:, :, 1].copy_((panel >> 4).transpose(0, 1))
        W_GgN = W.view(-1, group, N)
        W_GgN.sub_(zero_GN[groups, None]).mul_(scale_GN[groups, None])
        y_MN.addmm_(x_MK[:, k : k + kp], W.view(kp, N))
    return y_MN


def _tiles(codes: Tensor, N: int, K: int) -> Tensor:
    rows = tile_rows()
    if rows is None:  # `refuses` has asked before
        raise RuntimeError("torch packs int4 weights in an unknown order")
    return codes.view(N // rows, K, rows // 2)


def _nibbles(tiles: Tensor) -> Tensor:
    """Return the codes `[N/B, K, B]` of packed tiles `[N/B, K, B/2]`."""
    return torch.cat([tiles & 15, tiles >> 4], dim=-1)


@cache
def tile_rows() -> int | None:
    """Return B, found by packing a weight whose codes are all known, or None where no B explains the result."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    N, K = 128, 32
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for rows in (64, 32):
        unpacked = _nibbles(packed.view(N // rows, K, rows // 2)).transpose(1, 2).reshape(N, K)
        if torch.equal(unpacked.int(), codes):
            return rows
    return None
