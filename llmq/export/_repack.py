"""Codes of a solved linear as blocks of ggml, kept where a type holds them.

    levels = code - zero
    all in -2 .. 1 or -1 .. 2, groups of 64 columns -> Q2_0   d = -scale or scale                values exact
    all in -8 .. 7                                  -> Q4_0   d = scale                          values exact
    4 bits, any zero                                -> Q4_1   d = scale, m = fp16(-zero*scale)   minimum off by <= 2^-11
    all in -16 .. 15                                -> Q5_0   d = scale                          values exact
    5 bits, any zero                                -> Q5_1   as Q4_1
    all in -128 .. 127                              -> Q8_0   d = scale                          values exact
    minima that are no zeros (MLX)                  -> Q4_1, Q5_1  m = fp16(minimum)             exact where that is
    NVFP4, MXFP4                                    -> themselves; the reciprocal of a divisor lies beside them

A scale is repeated for every 32 (or 64) columns of its group. That takes groups of a multiple of 32 columns (or whole
rows) in their natural order, and scales that float16 can hold; where it does not work out, the linear is refused, or
rounded again if the user asks for it.
Not here: the file (gguf.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmq.export._kept import FACTOR, ROUNDED
from llmq.export._target import EXACT, REQUANTIZED
from llmq.gguf import container, kinds, mixture
from llmq.grids._biased import Biased, as_integers
from llmq.grids._float import FloatGrid
from llmq.grids._ggml import held
from llmq.grids._ggml_floats import FloatBlocks
from llmq.pipeline.records import Line, rounded
from llmq.types import FloatParams, GgmlParams, LinearSpec, LlmqError, Params, QTensor

_QBLOCK = 32  # columns of a qblock of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0
_MIDDLES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # the code of level 0
_BITS = {"Q4_1": 4, "Q5_1": 5}  # of types with minima
_WIDE = 64  # of Q2_0


@dataclass(frozen=True)
class Exported:
    """One tensor: its ggml type and stored rows; of a linear also what became of its codes, and what is recorded.

    beside: what is stored once for it, by local names.
    """

    kind: str
    rows: Tensor
    outcome: str = ""
    line: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)


def convert(
    q: QTensor,
    name: str,
    requantize: str | None,
    together: int | None = None,
    *,
    factor: bool = True,
    kind: str | None = None,
) -> Exported:
    """Return the ggml rows of a solved linear, its codes kept; minima that are floats of their own as they are.

    together: the columns that stay together in the file (`Architecture.together`); None for all.
    factor: whether llama.cpp multiplies what the linear gives by a factor that lies beside it (`Architecture.factors`).
    kind: the type that is to hold the codes; None takes the smallest that does.
    Raises LlmqError, with the reason, where they cannot be kept and `requantize` names no type instead.
    """
    together, q = together or q.codes.shape[1], _with_zeros(q)
    floats = isinstance(q.params, FloatParams)
    why = _obstacle_of_floats(q, together, factor) if floats else _obstacle(q, together)
    if why is None:
        kinds_ = [str(getattr(q.grid, "kind", ""))] if floats else _holding(q, together)
        if kind in (None, *kinds_) and kinds_:
            return _small_floats(q) if floats else _packed_as(kind or kinds_[0], q)
        what = f"{q.grid.bits}-bit {'symmetric' if getattr(q.grid, 'sym', False) else 'asymmetric'}"
        why = f"{kind} does not hold them, {', '.join(kinds_)} does" if kinds_ else f"{what} codes have no ggml type"
    if requantize is None:
        raise LlmqError(
            f"{name}: its codes cannot be kept: {why}; say --requantize TYPE (Q8_0, Q6_K ...) to round it anew"
        )
    return round_anew(q.dequantize(), name, mixture.fallback(requantize, together), REQUANTIZED)


def _with_zeros(q: QTensor) -> QTensor:
    """Return codes whose minima are floats with zeros that give the same values, if there are any: Q4_0 holds some."""
    if not isinstance(q.grid, Biased):
        return q
    params = as_integers(GgmlParams.of(q.params), q.grid.bits)
    if params is None:
        return q
    zeros = replace(q, params=params, grid=q.grid.integers)
    return zeros if torch.equal(zeros.dequantize(), q.dequantize()) else q


def unheld(spec: LinearSpec) -> str | None:
    """Return why no type of ggml holds codes on a planned linear's grid, None where one does as far as that tells."""
    grid = spec.scheme.weight
    if isinstance(grid, FloatGrid):
        return None if isinstance(grid, FloatBlocks) else f"no type of ggml is {type(grid).__name__}"
    columns = grid.granularity.columns(spec.K)
    if columns % _QBLOCK:
        return f"{grid.granularity} is no multiple of {_QBLOCK} columns"
    return "8-bit asymmetric codes have no ggml type" if grid.bits == 8 and not getattr(grid, "sym", True) else None


def _obstacle_of_floats(q: QTensor, together: int, factor: bool) -> str | None:
    """Return why no block of ggml holds the codes of small floats, None where one does."""
    if not isinstance(q.grid, FloatBlocks):
        return f"no type of ggml is {type(q.grid).__name__}"
    if together % q.grid.qblock:
        return f"rows of {together} columns are no multiple of {q.grid.qblock}"
    if FloatParams.of(q.params).divisor is not None and not factor:
        return "llama.cpp passes over the factor (.scale) that would lie beside it"
    return None


def _small_floats(q: QTensor) -> Exported:
    """Return the codes of NVFP4 or MXFP4 in blocks of ggml, recorded as a reader of the file computes them."""
    grid: Any = q.grid
    rows, once = grid.to_bytes(q.codes, q.params), grid.stored_once(q.params)
    codes, params = grid.from_bytes(rows)
    values, W_NK = QTensor(codes, params, grid).dequantize(), q.dequantize()
    for factor in once.values():  # by which a reader multiplies what the blocks give
        values *= factor
    found = QTensor(codes, grid.from_bytes(rows, once)[1], grid)
    line = Line().add(found, values, W_NK).to_json()
    outcome = EXACT if torch.equal(values, W_NK) else FACTOR
    return Exported(grid.kind, rows, outcome, {"method": "export", "bits": grid.bits} | line, once)


def _levels(q: QTensor) -> Tensor:
    """Return `code - zero`, int16 `[N, K]`."""
    return q.codes.to(torch.int16) - Params.of(q.params).zero[:, q.group_K].to(torch.int16)


def _holding(q: QTensor, together: int) -> list[str]:
    """Return the types that hold the codes, the smallest first. Levels of Q2_0 reach from -1 to 2, or back."""
    if isinstance(q.grid, Biased):
        return [kind for kind, bits in _BITS.items() if q.grid.bits <= bits and _minima_are_held(q)]
    lo, hi = (int(x) for x in _levels(q).aminmax())
    narrow = hi - lo <= 3 and lo >= -2 and hi <= 2
    held = {
        "Q2_0": narrow and not together % _WIDE and _alike(q, _WIDE),
        "Q4_0": lo >= -8 and hi <= 7,
        "Q4_1": q.grid.bits == 4 and _minima_are_held(q),
        "Q5_0": lo >= -16 and hi <= 15,
        "Q5_1": q.grid.bits == 5 and _minima_are_held(q),
        "Q8_0": lo >= -128 and hi <= 127,
    }
    return [kind for kind, holds in held.items() if holds]


def _packed_as(kind: str, q: QTensor) -> Exported:
    """Return the codes in blocks of a type that holds them; the scale of a block is that of its first column."""
    first = q.group_K[::_QBLOCK]
    d = q.params.scale[:, first].half()
    if kind in _BITS:
        return _pack(kind, q.codes, d, _minima(q)[:, first].half(), q)
    level = _levels(q)
    if kind == "Q2_0":
        d = d[:, :: _WIDE // _QBLOCK]
        return _pack(kind, level + 1, d, None, q) if int(level.min()) >= -1 else _pack(kind, 1 - level, -d, None, q)
    return _pack(kind, level + _MIDDLES[kind], d, None, q)


def _minima(q: QTensor) -> Tensor:
    """Return what is taken off `scale * code`, float32 `[N, G]`."""
    if isinstance(q.params, Params):
        return q.params.zero.float() * q.params.scale.float()
    return -held(GgmlParams.of(q.params).offset).float()


def _minima_are_held(q: QTensor) -> bool:
    return bool(torch.isfinite(_minima(q).half()).all())


def _alike(q: QTensor, size: int) -> bool:
    """Say whether each `size` columns are of one group."""
    group = q.group_K.reshape(-1, size)
    return bool((group == group[:, :1]).all())


def _obstacle(q: QTensor, together: int) -> str | None:
    """Return why the codes cannot be kept in blocks of 32 columns, `together` of which stay so; None where they can."""
    K = q.codes.shape[1]
    if together % _QBLOCK:
        what = "rows" if together == K else "pieces, which the file has in another order,"
        return f"{what} of {together} columns are no multiple of {_QBLOCK}"
    if not _alike(q, _QBLOCK):
        if q.g_idx is None:
            return f"groups of {K // q.params.scale.shape[1]} columns are no multiple of {_QBLOCK}"
        return "its groups follow the activation order (desc_act), not the columns"
    scale = q.params.scale
    exact = scale.half()
    off = int((~torch.isfinite(exact) | (exact.float() != scale.float())).sum())
    if off:
        return f"{off} of {scale.numel()} scales are not float16 numbers"
    return None


def _pack(kind: str, codes: Tensor, d: Tensor, dmin: Tensor | None, q: QTensor) -> Exported:
    """Return the codes of `q` as blocks: codes `[N, K]`, scales d and minima float16 `[N, B]`."""
    params = GgmlParams(d.float(), None if dmin is None else -dmin.float(), d, dmin)
    grid = kinds.grid(kind)
    packed = QTensor(codes.to(torch.uint8).reshape(q.codes.shape), params, grid)
    values, W_NK = packed.dequantize(), q.dequantize()
    outcome = EXACT if torch.equal(values, W_NK) else ROUNDED
    line = Line().add(packed, values, W_NK).to_json()
    return Exported(kind, grid.to_bytes(packed.codes, params), outcome, {"method": "export", "bits": grid.bits} | line)


def round_anew(W_NK: Tensor, name: str, kind: str, outcome: str) -> Exported:
    """Return a float matrix rounded to nearest."""
    if kind in mixture.FLOATS:
        return Exported(kind, container.as_float(W_NK, kind, name), outcome)
    grid = kinds.grid(kind)
    rows = list[Tensor]()
    line = rounded(W_NK, grid, lambda q: rows.append(grid.to_bytes(q.codes, q.params)))
    return Exported(kind, torch.cat(rows), outcome, {"method": "export", "bits": grid.bits} | line)
