"""8-bit weights, float activations, through torch's int8 product for CPUs.

    few rows of x:   y = sum_g bf16(x_g) @ (w_g * s_g)^T by `_weight_int8pack_mm`, one call for each group of columns
    many rows:       panels of W decoded to float32, exactly as the reference does, and multiplied in float32

The product takes one scale per output row, so a group is a product of its own and the groups are added in float32. In
the first case activations, scales and the groups' results are rounded to bfloat16 (2^-9, relative). It reads past the
end of a row where 16 does not divide K, and so crashes the process: such groups are refused.

`w` int8 `[G, N, g]`, the codes less 128. Columns are sorted by group where the checkpoint has an activation order.
Not here: asymmetric grids, whose zero would be subtracted after rounding; 8-bit activations (int_mm.py, fbgemm.py).
"""

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, by_group, centred, in_file_order, many_rows, one_op, refuses_weight_only
from llmq.types import AffineGrid, LinearSpec, Params, QTensor

_PANEL = 256  # rows of W decoded at once: fewer halve the speed of the product


class Int8Pack(Prepacked):
    """An 8-bit symmetric weight for `_weight_int8pack_mm`."""

    name = "int8pack"
    rank = 3
    w: Tensor
    scale: Tensor
    order: Tensor | None
    g_idx: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        if reason := refuses_weight_only(spec, device, bits=8, divisor=16):
            return reason
        grid = spec.scheme.weight
        if not (isinstance(grid, AffineGrid) and grid.sym):
            return "it takes symmetric weights"
        return None if hasattr(torch.ops.aten, "_weight_int8pack_mm") else "this torch has no int8 product"

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`."""
        return super().holds(q) and centred(q)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        codes, order = by_group(q)
        w = (codes ^ 0x80).view(torch.int8).view(self.N, q.params.scale.shape[1], -1).transpose(0, 1).contiguous()
        self.keep(w=w, scale=q.params.scale.T.contiguous(), order=order, g_idx=q.g_idx)

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return _linear(x, self.w, self.scale)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        codes = self.w.transpose(0, 1).reshape(self.N, self.K).view(torch.uint8) ^ 0x80
        codes = in_file_order(codes, self.order)
        scale = self.scale.T.contiguous()
        zero = torch.full(scale.shape, 128, dtype=torch.int32, device=scale.device)
        return QTensor(codes, Params(scale, zero), self.grid, self.g_idx)


@one_op("(Tensor x, Tensor w, Tensor scale) -> Tensor", lambda w, scale: w.shape[1])
def _linear(x: Tensor, w_GNg: Tensor, scale_GN: Tensor) -> Tensor:
    """Return `x @ W^T` in the dtype of `x`."""
    G, N, g = w_GNg.shape
    x_MK = x.reshape(-1, G * g)
    if len(x_MK) <= many_rows():
        y = packed_product(x_MK.bfloat16(), w_GNg, scale_GN.bfloat16())
    else:
        y = decoded_product(x_MK.float(), w_GNg, scale_GN.float())
    return y.to(x.dtype).reshape(*x.shape[:-1], N)


def packed_product(x_MK: Tensor, w_GNg: Tensor, scale_GN: Tensor) -> Tensor:
    """Return `x @ W^T` for bfloat16 `x` and scales, by torch's product, group by group."""
    g = w_GNg.shape[2]
    product = torch.ops.aten._weight_int8pack_mm
    if len(w_GNg) == 1:
        return product(x_MK.contiguous(), w_GNg[0], scale_GN[0])
    y_MN = x_MK.new_zeros(len(x_MK), w_GNg.shape[1], dtype=torch.float32)
    for i in range(len(w_GNg)):
        y_MN += product(x_MK[:, i * g : (i + 1) * g].contiguous(), w_GNg[i], scale_GN[i])
    return y_MN


def decoded_product(x_MK: Tensor, w_GNg: Tensor, scale_GN: Tensor) -> Tensor:
    """Return `x @ W^T` in float32, decoding a panel of W at a time: some rows, all columns."""
    G, N, g = w_GNg.shape
    panels = []
    for n in range(0, N, _PANEL):
        panel = w_GNg[:, n : n + _PANEL].transpose(0, 1)
        W_nGg = torch.empty(panel.shape).copy_(panel).mul_(scale_GN.T[n : n + _PANEL, :, None])
        panels.append(x_MK @ W_nGg.view(-1, G * g).T)
    return torch.cat(panels, dim=1)
