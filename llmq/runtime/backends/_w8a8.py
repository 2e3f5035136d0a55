"""What the W8A8 back-ends share: which linears they take, the input's static grid, what sums stand for, the way back.

Not here: the products (int_mm.py, fbgemm.py, triton_w8a8.py), how activations are rounded (reference.py).
"""

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, centred
from llmq.types import AffineGrid, LinearSpec, Params, QTensor


class PrepackedW8A8(Prepacked):
    """An int8 weight, the codes less 128, for inputs that are rounded to int8.

    sums: of each row of the weight `[1, N]`, float32, where tokens have zero points.
    """

    scale: Tensor
    sums: Tensor | None
    in_scale: Tensor | None
    in_zero: Tensor | None

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`."""
        return centred(q)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        if not isinstance(spec.scheme.activation, AffineGrid):
            raise ValueError(f"{spec.name} has no integer activations")
        self.activation = spec.scheme.activation
        self.scale_dtype = q.params.scale.dtype
        sums = None if self.activation.sym else centred_int8(q).float().sum(1)[None]
        self.keep(in_scale=None, in_zero=None, sums=sums)
        if q.input is not None:
            self.keep(in_scale=q.input.scale, in_zero=Params.of(q.input).zero)

    @property
    def input(self) -> Params | None:
        """The static grid of the activation."""
        if self.in_scale is None or self.in_zero is None:
            return None
        return Params(self.in_scale, self.in_zero)

    def rescaled(self, y_MN: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the product that float32 `y_MN` of integers stands for, the input having had `scale` and `zero`."""
        if zero is not None and self.sums is not None:
            y_MN.addcmul_(zero.float(), self.sums, value=-1)
        return y_MN.mul_(self.scale.float().T).mul_(scale.float())

    def quantized(self, w_NK: Tensor, scale: Tensor) -> QTensor:
        """Return the `QTensor` of int8 `w_NK` and scales `[N, 1]`."""
        zero = torch.full(scale.shape, 128, dtype=torch.int32, device=scale.device)
        params = Params(scale.to(self.scale_dtype), zero)
        return QTensor(w_NK.view(torch.uint8) ^ 0x80, params, self.grid, None, self.input)


def centred_int8(q: QTensor) -> Tensor:
    """Return the codes less 128, int8 `[N, K]`."""
    return (q.codes ^ 0x80).view(torch.int8)


def refuses_scheme(spec: LinearSpec) -> str | None:
    """Return why an int8 x int8 product cannot run a linear: its scheme, or a sum that int32 might not hold."""
    grid = spec.scheme.weight
    if not isinstance(grid, AffineGrid) or not isinstance(spec.scheme.activation, AffineGrid):
        return "it takes integer weights and 8-bit activations"
    if grid.bits != 8 or not grid.sym or grid.granularity.group_size is not None:
        return "it takes symmetric 8-bit weights with a scale per channel or tensor, and 8-bit activations"
    return "the sum over K might not fit int32" if spec.K > 131071 else None
