"""One linear on its way from a format to another: its codes on the target's grid, packed, and read back.

    scales and zeros   repeated where the target's groups are finer; in float16 where a format stores that and it is
                       exact, in bfloat16 where the source has that (the peers write such files too), else rounded
    codes, g_idx       as they are

Not here: which linears there are (_as_format.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.export._integers import of_integers
from llmq.export._target import EXACT, REQUANTIZED
from llmq.formats._folder import FolderFormat
from llmq.grids._biased import Biased
from llmq.params import Parameters
from llmq.pipeline.records import Line
from llmq.types import FloatParams, LinearSpec, Params, QTensor

SCALED, FACTOR, ROUNDED = "codes exact, scales rounded", "codes exact, factor rounded", "codes exact, minimum rounded"
"""Outcomes: by at most 2^-11 of each scale; by one rounding of NVFP4's divisor; by one of zero times scale."""
_BOUND = 2.0**-11  # of a scale, relative, that float16 rounds within its normal numbers


@dataclass(frozen=True)
class Kept:
    """A linear on the target's grid: its tensors by their local names, what became of it, what is recorded."""

    laid: QTensor
    tensors: Mapping[str, Tensor]
    outcome: str
    line: dict[str, Any]

    @classmethod
    def rounded(cls, q: QTensor, spec: LinearSpec, form: FolderFormat) -> Kept:
        """Return a linear rounded to nearest on another grid."""
        W_NK = q.dequantize()
        found = QTensor.rounded(W_NK, spec.scheme.weight)
        line = Line().add(found, found.dequantize(), W_NK).to_json()
        return cls(found, form.pack(found, spec), REQUANTIZED, {"method": "rtn", "bits": found.grid.bits, **line})


def keep(q: QTensor, spec: LinearSpec, form: FolderFormat) -> Kept:
    """Return a linear whose codes the format keeps. Raises LlmqError, with the reason, where it does not."""
    laid = _laid(q, spec, form)
    tensors = form.pack(laid, spec)
    back = form.unpack(tensors, spec)
    if not torch.equal(back.codes, q.codes) or not torch.equal(back.group_K, laid.group_K):
        raise LlmqError(f"{form.quant_method} gives other codes back: a fault of llmq, please report it")
    W_NK = q.dequantize()
    said = laid if isinstance(laid.params, Params) else back
    line = Line().add(said, back.dequantize(), W_NK).to_json()
    return Kept(laid, tensors, _outcome(back, q, W_NK), {"method": "export", "bits": q.grid.bits, **line})


def _laid(q: QTensor, spec: LinearSpec, form: FolderFormat) -> QTensor:
    """Return a QTensor on the target's grid: the groups, the scales and the inputs that its file has."""
    grid, G = spec.scheme.weight, spec.scheme.weight.granularity.groups(spec.K)
    times = G // q.params.scale.shape[1]
    q = q if isinstance(grid, Biased) else of_integers(q)
    params = q.params if times == 1 else q.params.map(lambda p: p.repeat_interleave(times, 1))
    if isinstance(params, Params):
        params = replace(params, scale=_scale(params.scale, form))
    return QTensor(q.codes, params, grid, q.g_idx, q.input if spec.scheme.activation is not None else None)


def _scale(scale: Tensor, form: FolderFormat) -> Tensor:
    """Return scales as the format stores them. Raises LlmqError for some that would lose more than their last digit."""
    stored = scale.to(form.scale_dtype(scale.dtype))
    error = (stored.float() - scale.float()).abs()
    if scale.dtype == torch.bfloat16 and bool(error.any()):
        return scale
    bad = int((~(error <= _BOUND * scale.float().abs())).sum())
    if bad:
        kind = str(stored.dtype).removeprefix("torch.")
        raise LlmqError(f"{bad} of {scale.numel()} scales are beyond {kind}, in which {form.quant_method} stores them")
    return stored


def _outcome(back: QTensor, q: QTensor, W_NK: Tensor) -> str:
    if torch.equal(back.dequantize(), W_NK):
        return EXACT
    if isinstance(back.params, FloatParams):
        return FACTOR
    return SCALED if not torch.equal(_spread(back.params, q), _spread(q.params, q)) else ROUNDED


def _spread(params: Parameters, q: QTensor) -> Tensor:
    return params.scale.float().repeat_interleave(q.codes.shape[1] // params.scale.shape[1], 1)
