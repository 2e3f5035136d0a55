"""Codes of a solved linear as blocks of ggml, kept where a type holds them.

    levels = code - zero
    all in -2 .. 1 or -1 .. 2, groups of 64 columns -> Q2_0   d = -scale or scale                values exact
    all in -8 .. 7                                  -> Q4_0   d = scale                          values exact
    4 bits, any zero                                -> Q4_1   d = scale, m = fp16(-zero*scale)   minimum off by <= 2^-11
    all in -128 .. 127                              -> Q8_0   d = scale                          values exact
    NVFP4, MXFP4                                    -> themselves; the reciprocal of a divisor lies beside them

A scale is repeated for every 32 (or 64) columns of its group. That takes groups of a multiple of 32 columns (or whole
rows) in their natural order, and scales that float16 can hold; where it does not work out, the linear is refused, or
rounded again if the user asks for it.
Not here: reading the formats (formats/), the file (gguf.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.gguf import container, kinds, mixture
from llmq.grids._ggml_floats import FloatBlocks
from llmq.pipeline.records import Line, rounded
from llmq.types import FloatParams, GgmlParams, LlmqError, Params, QTensor

EXACT, ROUNDED, REQUANTIZED = "values exact", "codes exact, minimum rounded", "requantized"
FACTOR = "codes exact, factor rounded"
_QBLOCK = 32  # columns of a qblock of Q4_0, Q4_1 and Q8_0
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
    q: QTensor, name: str, requantize: str | None, together: int | None = None, *, factor: bool = True
) -> Exported:
    """Return the ggml rows of a solved linear, its codes kept.

    together: the columns that stay together in the file (`Architecture.together`); None for all.
    factor: whether llama.cpp multiplies what the linear gives by a factor that lies beside it (`Architecture.factors`).
    Raises LlmqError, with the reason, where they cannot be kept and `requantize` names no type instead.
    """
    together = together or q.codes.shape[1]
    floats = isinstance(q.params, FloatParams)
    why = _obstacle_of_floats(q, together, factor) if floats else _obstacle(q, together)
    if why is None and floats:
        return _small_floats(q)
    if why is None:
        level, scale = _levels(q)
        kept = _two_bits(q, level, scale, together) or _more_bits(q, level, scale)
        if kept is not None:
            return kept
        why = f"{q.grid.bits}-bit asymmetric codes have no ggml type"
    if requantize is None:
        raise LlmqError(
            f"{name}: its codes cannot be kept: {why}; say --requantize TYPE (Q8_0, Q6_K ...) to round it anew"
        )
    return round_anew(q.dequantize(), name, mixture.fallback(requantize, together), REQUANTIZED)


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
    codes, params = grid.from_bytes(rows, once)
    found = QTensor(codes, params, grid)
    line = Line().add(found, found.dequantize(), q.dequantize()).to_json()
    kept = torch.equal(found.params.scale, q.params.scale)
    outcome = EXACT if kept else FACTOR
    return Exported(grid.kind, rows, outcome, {"method": "export", "bits": grid.bits} | line, once)


def _levels(q: QTensor) -> tuple[Tensor, Tensor]:
    """Return `code - zero`, int16 `[N, K]`, and the scale of every block, float16 `[N, K / 32]`."""
    params = Params.of(q.params)
    level = q.codes.to(torch.int16) - params.zero[:, q.group_K].to(torch.int16)
    return level, params.scale[:, q.group_K[::_QBLOCK]].half()


def _two_bits(q: QTensor, level_NK: Tensor, scale: Tensor, together: int) -> Exported | None:
    """Return the codes as Q2_0; None where it does not hold them. Its levels reach from -1 to 2, or back."""
    lo, hi = int(level_NK.min()), int(level_NK.max())
    if together % _WIDE or not _alike(q, _WIDE) or hi - lo > 3 or lo < -2 or hi > 2:
        return None
    d = scale[:, :: _WIDE // _QBLOCK]
    return _pack("Q2_0", level_NK + 1, d, None, q) if lo >= -1 else _pack("Q2_0", 1 - level_NK, -d, None, q)


def _more_bits(q: QTensor, level_NK: Tensor, d: Tensor) -> Exported | None:
    """Return the codes as the smallest of Q4_0, Q4_1 and Q8_0 that holds them; None where none does."""
    lo, hi = int(level_NK.min()), int(level_NK.max())
    if lo >= -8 and hi <= 7:
        return _pack("Q4_0", level_NK + 8, d, None, q)
    if q.grid.bits == 4:
        zero = Params.of(q.params).zero[:, q.group_K[::_QBLOCK]]
        return _pack("Q4_1", q.codes, d, (zero.float() * d.float()).half(), q)
    return _pack("Q8_0", level_NK + 128, d, None, q) if lo >= -128 and hi <= 127 else None


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
    if q.grid.bits == 4 and not torch.isfinite((Params.of(q.params).zero.float() * scale.float()).half()).all():
        return "a minimum is beyond float16"
    return None


def _pack(kind: str, codes: Tensor, d: Tensor, dmin: Tensor | None, q: QTensor) -> Exported:
    """Return the codes of `q` as blocks: codes `[N, K]`, scales d and minima float16 `[N, B]`."""
    params = GgmlParams(d.float(), None if dmin is None else -dmin.float(), d, dmin)
    grid = kinds.grid(kind)
    packed = QTensor(codes.to(torch.uint8).reshape(q.codes.shape), params, grid)
    outcome = EXACT if dmin is None else ROUNDED
    line = Line().add(packed, packed.dequantize(), q.dequantize()).to_json()
    return Exported(kind, grid.to_bytes(packed.codes, params), outcome, {"method": "export", "bits": grid.bits} | line)


def round_anew(W_NK: Tensor, name: str, kind: str, outcome: str) -> Exported:
    """Return a float matrix rounded to nearest."""
    if kind in mixture.FLOATS:
        return Exported(kind, container.as_float(W_NK, kind, name), outcome)
    grid = kinds.grid(kind)
    rows, line = rounded(W_NK, grid, lambda q: grid.to_bytes(q.codes, q.params))
    return Exported(kind, rows, outcome, {"method": "export", "bits": grid.bits} | line)
