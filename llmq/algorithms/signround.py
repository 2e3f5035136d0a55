"""SignRound: tune the roundings and scales of a whole block by the gradient of its output error.

A weight rounds to `q = clip(round(u))`, u its place in code units inside the cell it was rounded to, and decodes to
`w = s (q - z)`; on small floats q is the rank of a value, `w = s v_q`. By the straight-through estimate (round' = 1)
the gradient with respect to u is `s dL/dw` times a positive number, of which only the sign is used:
u <- u - lr sign(s dL/dw),   lr falling linearly to 0 over `steps`; the scales likewise.
Cheng et al. 2023, arXiv:2309.05516, equations 3 to 5 (AutoRound), there from the float weights; here from the point
that GPTQ and descent have reached. This is quantization-aware training of one block against its float outputs.

The loss is the squared error of the block's output relative to the output's energy, token by token: the RMSNorm behind
it sees nothing else, and the first token's massive activations do not drown the rest. Every `check` steps it is
measured on sequences that are never trained on; the best codes and scales are kept, the start among them.
Not here: choosing the start (gptq.py, descent.py), the forward (model/lanes.py).
"""

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from llmq.minifloat import rescaled
from llmq.steps import BlockView, Held, Operations, Solved, Tuner
from llmq.types import Lattice, LlmqError, QTensor, RangedGrid

_EDGE = 0.4  # how near to the edge of its cell a weight may start, in code units
_PACE = 0.4  # measured on E2M1 and E4M3


@dataclass(frozen=True)
class SignRound(Tuner):
    """Learned rounding.

    steps: gradient steps a block. batch: sequences a step. lr: the first step of V, in code units (None: 1 / steps).
    scale_lr: the first step of a scale, relative (None: lr / 10). check: steps between two looks at held-out sequences.
    """

    steps: int = 50
    batch: int = 4
    lr: float | None = None
    scale_lr: float | None = None
    check: int = 10

    held: ClassVar[Held] = Held(0, 7)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.check < 1:
            raise ValueError("steps, batch and check are at least 1")

    def operations(self, N: int, K: int) -> Operations:
        """Return the passes over places and scales that each step takes."""
        return Operations(passes=12 * self.steps * N * K)

    def forwards(self, samples: int, length: int) -> float:
        """Return the steps, forward and backward, and the looks at the held-out eighth."""
        looks = 1 + -(-self.steps // self.check)
        return 3 * self.steps * min(self.batch, samples) / samples + looks / 8

    def tune(self, view: BlockView) -> dict[str, Solved]:
        """Return the block's linears with the best codes and scales met."""
        trials = {n: _Trial(view.targets[n], s.q) for n, s in view.solved.items()}
        train, held = _divide(view)
        draw = torch.Generator().manual_seed(view.seed)
        first = best = _loss(view, trials, held)
        kept = {n: t.quantized() for n, t in trials.items()}
        lr = self.lr if self.lr is not None else 1 / self.steps
        scale_lr = self.scale_lr if self.scale_lr is not None else lr / 10
        for step in range(self.steps):
            for i in torch.randperm(len(train), generator=draw)[: self.batch].tolist():
                with torch.enable_grad():
                    _miss(view, trials, train[i]).backward()
            falling = 1 - step / self.steps
            for t in trials.values():
                t.move(lr * falling, scale_lr * falling)
            if (step + 1) % self.check == 0 or step + 1 == self.steps:
                value = _loss(view, trials, held)
                if value < best:
                    best, kept = value, {n: t.quantized() for n, t in trials.items()}
        line = {"signround": round(best / first, 4)}
        return {n: Solved(kept[n], {**s.report, **line}) for n, s in view.solved.items()}


class _Trial:
    """One linear while it is tuned: its place in code units, its relative scales, and the weight they decode to."""

    def __init__(self, W_NK: Tensor, q: QTensor) -> None:
        self.q, self.group_K = q, q.group_K
        lattice = q.grid.lattice(q.params)
        if lattice is None or not isinstance(q.grid, RangedGrid):
            raise LlmqError(f"signround tunes no {type(q.grid).__name__} grid; leave it out of --method")
        self.values = _Values.of(lattice)
        self.zero_NK = lattice.zero[:, self.group_K]
        self.scale_NG = q.params.scale.float().clone()
        level = W_NK / self.scale_NG[:, self.group_K] + self.zero_NK
        center = self.values.ranks(q.codes)
        self.place_NK = center + self.values.away(level, center).clamp_(-_EDGE, _EDGE)
        self.weight = self.decode().requires_grad_()

    def ranks(self) -> Tensor:
        return self.place_NK.round().clamp_(self.values.low, self.values.high)

    def _levels(self) -> Tensor:
        return self.values.levels(self.ranks()) - self.zero_NK

    def decode(self) -> Tensor:
        """Return the weight, with the scales as they will be stored."""
        scale = rescaled(self.q.params, self.scale_NG).scale.float()
        return self._levels().mul_(scale[:, self.group_K])

    def move(self, lr: float, scale_lr: float) -> None:
        """Step against the sign of the gradient, then decode again."""
        slope = self.weight.grad
        if slope is None:
            return
        span_NK = self._levels() * slope
        span_NG = torch.zeros_like(self.scale_NG).index_add_(1, self.group_K, span_NK)
        self.place_NK.sub_(slope.mul_(self.scale_NG.sign()[:, self.group_K]).sign_(), alpha=lr * self.values.pace)
        self.place_NK.clamp_(self.values.low - 0.5, self.values.high + 0.5)
        self.scale_NG.mul_(1 - scale_lr * (span_NG * self.scale_NG).sign())
        self.weight.grad = None
        self.weight.data = self.decode()

    def quantized(self) -> QTensor:
        params = rescaled(self.q.params, self.scale_NG)
        return QTensor(self.values.codes(self.ranks()), params, self.q.grid, self.q.g_idx, self.q.input)


class _Values(NamedTuple):
    """The values of a grid by rank, from low to high.

    value, code: those of a table, `[L]`, without one of two zeros; rank: of each code, `[256]`. None where evenly
    spaced. pace: of steps: in a table the widest cells, whose turns cost most, would else turn as often as narrow ones.
    """

    low: float
    high: float
    value: Tensor | None = None
    code: Tensor | None = None
    rank: Tensor | None = None
    pace: float = 1.0

    @classmethod
    def of(cls, lattice: Lattice) -> Self:
        if (levels := lattice.levels) is None:
            return cls(lattice.low, lattice.high)
        value, at = levels.value[: len(levels.code)], lattice.scale.device
        last = torch.cat([value.diff() > 0, torch.ones(1, dtype=torch.bool)])
        rank = (last.cumsum(0) - last.int())[levels.rank.long()].float()
        return cls(0.0, float(last.sum()) - 1, value[last].to(at), levels.code[last].to(at), rank.to(at), _PACE)

    def ranks(self, codes: Tensor) -> Tensor:
        return codes.float() if self.rank is None else self.rank[codes.int()]

    def codes(self, ranks: Tensor) -> Tensor:
        return ranks.to(torch.uint8) if self.code is None else self.code[ranks.int()]

    def levels(self, ranks: Tensor) -> Tensor:
        return ranks if self.value is None else self.value[ranks.int()]

    def away(self, level: Tensor, ranks: Tensor) -> Tensor:
        """Return how far levels lie from those of ranks, in steps to the next value on that side."""
        away = level - self.levels(ranks)
        if self.value is None:
            return away
        up, down = (self.levels((ranks + i).clamp(self.low, self.high)) - self.levels(ranks) for i in (1, -1))
        return away / torch.where(away > 0, up, -down).clamp(min=1e-30)


_Sequence = tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]
"""One calibration sequence: the block's input and float output `[1, S, H]`, and the other arguments of its call."""


def _divide(view: BlockView) -> tuple[list[_Sequence], list[_Sequence]]:
    """Return the sequences to train on and the last eighth (one at least), to judge by."""
    sequences: list[_Sequence] = []
    for x, y, (args, kwargs) in zip(view.inputs, view.outputs, view.calls, strict=True):
        for i in range(len(x)):
            own = {k: _row(i, len(x), v) for k, v in kwargs.items()}
            sequences.append((x[i : i + 1], y[i : i + 1], _row(i, len(x), args), own))
    held = max(1, len(sequences) // 8)
    if len(sequences) < 2:
        raise LlmqError("signround judges by sequences that it does not train on; give at least 2 --samples")
    return sequences[:-held], sequences[-held:]


def _row(i: int, B: int, value: Any) -> Any:
    """Return row i of what a batch of B holds for each sequence; what all sequences share is left alone."""
    if isinstance(value, tuple):
        return tuple(_row(i, B, v) for v in value)
    if isinstance(value, dict | UserDict):  # keys and values that blocks hand on
        return type(value)({k: _row(i, B, v) for k, v in value.items()})
    return value[i : i + 1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == B else value


def _miss(view: BlockView, trials: Mapping[str, _Trial], sequence: _Sequence) -> Tensor:
    """Return the mean over the tokens of the squared error of the block's output, relative to its energy."""
    x, y, args, kwargs = sequence
    weights = {f"{n}.weight": t.weight.to(x.dtype) for n, t in trials.items()}
    out = torch.func.functional_call(view.block, weights, (x, *args), kwargs)
    out = out[0] if isinstance(out, tuple) else out
    y = y.float()
    return ((out.float() - y).square().sum(-1) / y.square().sum(-1).clamp(min=1e-12)).mean()


def _loss(view: BlockView, trials: Mapping[str, _Trial], sequences: list[_Sequence]) -> float:
    return sum(_miss(view, trials, s).item() for s in sequences) / len(sequences)
