"""The tensors of weights in small floats, under whatever names a format gives them.

    codes      E2M1: uint8 [N, K/2], the even column in the low half of a byte;  E4M3: float8_e4m3fn [N, K]
    scales     fp8: floats [N, G], [1] for one in all, [ceil(N/n), K/k] for blocks;  nvfp4: float8_e4m3fn [N, K/16];
               mxfp4, mxfp8: uint8 [N, K/32], E8M0
    divisor    nvfp4: float32 [1]

Not here: names, and configs (_ct_floats.py, modelopt.py), what the bits are worth (minifloat.py, grids/).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.formats import _common, _reading
from llmq.grids._float import FloatGrid
from llmq.grids._microscaling import Microscaling
from llmq.grids.fp8 import Fp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import E4M3
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor


def float_grid(spec: LinearSpec, method: str) -> FloatGrid:
    """Return the grid of `spec`. Raises LlmqError for another than one of small floats."""
    grid = spec.scheme.weight
    if not isinstance(grid, FloatGrid):
        raise LlmqError(f"{spec.name}: {method} holds small floats, not {type(grid).__name__}; use --weights nvfp4")
    return grid


def layout(spec: LinearSpec, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """Return codes and scales on the meta device. Raises LlmqError where the groups do not divide K."""
    _common.groups(spec)
    K, dtype = (spec.K // 2, torch.uint8) if grid.bits == 4 else (spec.K, torch.float8_e4m3fn)
    scales = torch.empty(grid.granularity.shape(spec.N, spec.K), dtype=_scale_dtype(grid), device="meta")
    return torch.empty(spec.N, K, dtype=dtype, device="meta"), scales


def one(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a scale for all, `[1]`, on the meta device."""
    return torch.empty(1, dtype=dtype, device="meta")


def stored(q: QTensor, spec: LinearSpec) -> tuple[Tensor, Tensor]:
    """Return codes and scales as they are stored, contiguous."""
    params, by = FloatParams.of(q.params), spec.scheme.weight.granularity
    codes = q.codes[:, ::2] | (q.codes[:, 1::2] << 4) if q.grid.bits == 4 else q.codes.view(torch.float8_e4m3fn)
    scales = params.scale if params.stored is None else params.stored
    scales = scales[:: by.height(spec.N)].reshape(by.shape(spec.N, spec.K))
    return codes.contiguous(), (scales.view(torch.float8_e4m3fn) if params.divisor is not None else scales).contiguous()


def restored(
    codes: Tensor, scales: Tensor, spec: LinearSpec, grid: FloatGrid, divisor: Tensor | None = None
) -> QTensor:
    """Invert `stored`. divisor: `[1]`, of nvfp4."""
    raw = codes.view(torch.uint8)
    if grid.bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1)
    by = grid.granularity
    rows = scales.reshape(by.rows(spec.N), -1)
    return QTensor(raw, _params(rows, grid, divisor).map(lambda p: by.spread(p, spec.N)), grid)


def sound(q: QTensor, spec: LinearSpec, names: Mapping[str, str]) -> QTensor:
    """Return `q`. Raises LlmqError, naming the tensor, for a scale that is not finite or not above 0, and for NaN.

    names: the local names of "codes", "scale", "divisor" and "input".
    """
    params = FloatParams.of(q.params)
    if params.divisor is not None:
        _refuse(params.divisor, spec, names["divisor"])
    _refuse(params.scale, spec, names["scale"])
    if q.grid.bits == E4M3.bits and bool(((q.codes & 0x7F) == 0x7F).any()):
        raise LlmqError(f"{spec.name}.{names['codes']} holds NaN, {_reading.DAMAGED}")
    if q.input is not None:
        _refuse(q.input.scale, spec, names["input"])
    return q


def _params(scales: Tensor, grid: FloatGrid, divisor: Tensor | None) -> FloatParams:
    if isinstance(grid, Microscaling):
        return grid.of_bits(scales)
    if isinstance(grid, Nvfp4) and divisor is not None:
        return grid.of_bits(scales.view(torch.uint8), divisor)
    return FloatParams(scales)


def _refuse(scales: Tensor, spec: LinearSpec, name: str) -> None:
    bad = ~(scales.isfinite() & (scales > 0))
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise LlmqError(f"{spec.name}.{name}: the scale at {at} is {scales[tuple(at)].item()}, {_reading.DAMAGED}")


def _scale_dtype(grid: FloatGrid) -> torch.dtype:
    if isinstance(grid, Fp8):
        return grid.scale_dtype
    return torch.float8_e4m3fn if isinstance(grid, Nvfp4) else torch.uint8
