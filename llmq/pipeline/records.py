"""What `quantization.json` says of the weights: how far they are off, and checksums of what was solved and written.

    weight_error   |Q - W|^2 / |W|^2
    output_error   tr(E H E^T) / tr(W H W^T),   E = Q - W,   H = mean_t x_t x_t^T over the calibration's tokens

Q is the decoded weight that was packed, W the checkpoint's after its recorded transforms, x_t the linear's input as it
was when the linear was solved, times the square root of the token's weight where a step weighs tokens.

A checksum is a sha256 over the bytes of a tensor, C order, little endian. Of a linear they are taken from what the
solver found, before any packing, so that a reader that decodes the file by other means can tell a wrong packer:

    integer grids   codes   uint8 [N, K]                   scale   [N, G] in the dtype it is stored in ([1, 1] where
                    zero    int32 [N, G], unsigned codes            the whole tensor shares one), zero likewise
                    g_idx   int32 [K], where the groups are no runs of columns
                    input   [1], the static scale of the input, where it has one
    small floats    codes   uint8 [N, K]                   scale   as stored: bits of E4M3 or E8M0, floats of fp8
                    divisor float32 [1], of nvfp4          input   [1], the scale of what is fixed of the input
                    values  as below, -0 as 0: what GGUF keeps of them
    ggml's types    values  float32 [N, K], decoded, rows in the checkpoint's order

Not here: the transforms in a record (folding.py), writing it (report.py), comparing a file with it (verify).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.checkpoint.digest import raw
from llmq.pipeline.site import pieces
from llmq.stats import forms
from llmq.team import ALONE, Team
from llmq.types import FloatParams, Grid, Params, QTensor

if TYPE_CHECKING:
    from llmq.model.folding import Fold

_AT_ONCE = 2**22  # weights whose error is in memory at a time
_ROUNDED_AT_ONCE = 2**24  # weights of a matrix in float32 at a time


class Line:
    """The errors and checksums of one linear, from its rows: all at once, or in several parts."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}
        self._sums: dict[str, tuple[float, float]] = {}  # of squared errors, and of what they are relative to

    def add(self, q: QTensor, Q_NK: Tensor, W_NK: Tensor, H_KK: Tensor | None = None, team: Team = ALONE) -> Line:
        """Add rows of a solved linear, their decoded values and the float weights. Returns itself.

        team: whose processes share the work; the first one's checksums count.
        """
        for name, tensor in _solved(q, Q_NK).items() if team.leads else ():
            self._hashes.setdefault(name, hashlib.sha256()).update(raw(tensor))
        step = max(1, min(_AT_ONCE // W_NK.shape[1], -(-len(W_NK) // pieces(len(W_NK)))))
        rows = team.own(list(zip(Q_NK.split(step), W_NK.split(step), strict=True)))
        for sums in team.dealt([_errors(Q_nK, W_nK, H_KK) for Q_nK, W_nK in rows]):
            for kind, (error, whole) in sums.items():
                before = self._sums.get(kind, (0.0, 0.0))
                self._sums[kind] = (before[0] + error, before[1] + whole)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return what `quantization.json` says of the linear."""
        errors = {f"{kind}_error": error / max(whole, 1e-30) for kind, (error, whole) in self._sums.items()}
        return {**errors, "sha256": {name: h.hexdigest() for name, h in self._hashes.items()}}


def _errors(Q_nK: Tensor, W_nK: Tensor, H_KK: Tensor | None) -> dict[str, tuple[float, float]]:
    """Return the sums of squared errors of some rows, and of what they are relative to."""
    W = W_nK.float()
    E_nK = Q_nK.float() - W
    found = {} if H_KK is None else {"output": [forms(x, H_KK).sum() for x in (E_nK, W)]}
    weight = [E_nK.square_().sum(), torch.square(W, out=E_nK).sum()]  # in one memory: many are small
    return {kind: (error.item(), whole.item()) for kind, (error, whole) in {"weight": weight, **found}.items()}


def _solved(q: QTensor, Q_NK: Tensor) -> dict[str, Tensor]:
    """Return what the checksums of a linear are taken of."""
    found = {} if q.input is None else {"input": q.input.scale}
    if isinstance(q.params, FloatParams):
        scale = q.params.scale if q.params.stored is None else q.params.stored
        found |= {"codes": q.codes, "scale": scale[:: q.grid.granularity.height(len(q.codes))]}
        found |= {"values": Q_NK.float() + 0}
        return found if q.params.divisor is None else found | {"divisor": q.params.divisor[0]}
    if not isinstance(q.params, Params):
        return {"values": Q_NK.float(), **found}
    rows = q.grid.granularity.rows(len(q.codes))
    found |= {"codes": q.codes, "scale": q.params.scale[:rows], "zero": q.params.zero[:rows]}
    return found if q.g_idx is None else found | {"g_idx": q.g_idx.to(torch.int32)}


def rounded(
    W_NK: Tensor, grid: Grid, pack: Callable[[QTensor], Any], importance: Tensor | None = None
) -> dict[str, Any]:
    """Round a matrix to nearest, some rows at a time, so that no embedding is whole in float32.

    pack: is given one part after the other. importance: what the squared error of each input channel counts, `[K]`.
    Returns what `quantization.json` says of the matrix.
    """
    line = Line()
    for rows in W_NK.split(max(1, _ROUNDED_AT_ONCE // W_NK.shape[1])):
        W_nK = rows.float()
        q = QTensor.rounded(W_nK, grid, importance)
        pack(q)
        line.add(q, q.dequantize(), W_nK)
    return line.to_json()


@dataclass
class Record:
    """What a run records, block by block.

    linears: a line for each that was quantized, by full name. folds: what was done to the floats, in order.
    finished: what each finisher reports. tuned: the float tensors that finishers moved. experts: the calibration's
    tokens that were routed to each expert, by the module that holds them. activations: of the sites' channels
    (channels.py).
    """

    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    finished: dict[str, Any] = field(default_factory=dict)
    tuned: list[str] = field(default_factory=list)
    experts: dict[str, list[int]] = field(default_factory=dict)
    activations: list[dict[str, Any]] = field(default_factory=list)

    def note(self, linear: str, line: Mapping[str, Any]) -> None:
        """Add to the line of a linear; what it says already is replaced."""
        self.linears[linear] = self.linears.get(linear, {}) | dict(line)

    def add(self, other: Record) -> None:
        """Add what another block recorded."""
        self.linears |= other.linears
        self.experts |= other.experts
        self.folds += other.folds
        self.activations += other.activations
