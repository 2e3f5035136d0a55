"""What the back-ends of small floats share: which weights they take, how scales are held, the rounding of the input.

Scales that the file holds as bits stay so; their values are a table of 256, `value / divisor`, as one divisor serves a
whole weight. Not here: the products (floatloop.py, ...), the bits themselves (llmq/minifloat.py).
"""

import torch
from torch import Tensor

from llmq.minifloat import E2M1, E4M3, scales_of
from llmq.runtime.backends import Prepacked
from llmq.types import AffineGrid, FloatParams, LinearSpec, QTensor, RangedGrid

_KINDS = (E2M1, E4M3)


class FloatPrepacked(Prepacked):
    """A weight of small floats. divisor: of the stored scales `[1, 1]`, None where they have none.

    activation: the grid that the input is rounded to, None where it stays float.
    in_*: what calibration fixed of the input's grid, `[1]` each, None where nothing is.
    """

    activation: RangedGrid | None
    divisor: Tensor | None
    in_scale: Tensor | None
    in_divisor: Tensor | None

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """See `Prepacked.holds`: no code is NaN, and the stored scales have their values and one divisor."""
        params = FloatParams.of(q.params)
        if q.g_idx is not None or (q.grid.bits == 8 and bool(((q.codes & 0x7F) == 0x7F).any())):
            return False
        if params.stored is None:
            return True
        one = params.divisor is None or bool((params.divisor == params.divisor[:1]).all())
        return one and torch.equal(table(params)[params.stored.int()], params.scale)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        self.activation = spec.scheme.activation
        params = FloatParams.of(q.params)
        self.scale_dtype = params.scale.dtype
        self.keep(in_scale=None, in_divisor=None)
        self.keep(divisor=None if params.divisor is None else params.divisor[:1].clone())
        if q.input is not None:
            fixed = FloatParams.of(q.input)
            self.keep(in_scale=fixed.scale, in_divisor=fixed.divisor)

    @property
    def input(self) -> FloatParams | None:
        """What calibration fixed of the grid of the activation."""
        return None if self.in_scale is None else FloatParams(self.in_scale, divisor=self.in_divisor)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the values that the activation is rounded to, as the reference has them."""
        return x if self.activation is None else self.activation.fake_quantize(x, self.input)

    def quantized(self, codes: Tensor, scale: Tensor | None, stored: Tensor | None) -> QTensor:
        """Return the `QTensor` of uint8 `codes` `[N, K]` and of scales `[N, G]`, or of their bits."""
        if stored is None and scale is not None:
            params = FloatParams(scale.to(self.scale_dtype))
        elif stored is not None:
            divisor = None if self.divisor is None else self.divisor.expand(self.N, 1).contiguous()
            bits = FloatParams(stored, stored, divisor)
            params = FloatParams(table(bits)[stored.int()], stored, divisor)
        else:
            raise ValueError("a weight has scales, or their bits")
        return QTensor(codes, params, self.grid, None, self.input)


def table(params: FloatParams) -> Tensor:
    """Return what each byte stands for where scales are stored: E4M3 over the divisor, else E8M0; float32 `[256]`."""
    bits = torch.arange(256, device=params.scale.device)
    return scales_of(bits, None if params.divisor is None else params.divisor[0])


def refuses_floats(spec: LinearSpec) -> str | None:
    """Return why a back-end of small floats cannot run a linear, by its scheme."""
    grid, activation = spec.scheme.weight, spec.scheme.activation
    if getattr(grid, "value", None) not in _KINDS:
        return "it takes weights of small floats (E2M1, E4M3)"
    if isinstance(activation, AffineGrid):
        return "it takes activations that are floats, or small floats"
    columns = grid.granularity.columns(spec.K)
    return f"{columns} does not divide K = {spec.K}" if spec.K % columns else None
