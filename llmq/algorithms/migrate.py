"""Migrate: the channel scales with which the quantized products of a site are expected to err least.

Rounding to a step d errs by d^2 / 12 on average. Where x / s and W * s are rounded, activations with a scale for each
token and weights with one for each row (or group), the product's expected squared error is, but for the 1 / 12,
    sum_r mean_t d_t^2 sum_j (W_rj s_j)^2            d_t = max_j |x_tj / s_j| / 127
    + f sum_rg d_rg^2 sum_j mean_t (x_tj / s_j)^2    d_rg = max_j |W_rj s_j| / ((2^b - 1) / 2), j in group g
f being what the solver's error feedback leaves of it. Zero points of tokens count as if there were none. Sums, products
and maxima of monomials in s are convex in log s, so that descent ends at the least value there is, wherever it starts.
A static scale is d_t = max_tj |x_tj / s_j| / 127 for all tokens; as only ratios in s matter, s_j >= max_t |x_tj| makes
it 1 / 127.
The migration is that of SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, section 4), which takes s from a formula in
maxima; the scales of all channels at once and the objective are ours. A transform: rtn or gptq rounds afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmq.algorithms._shares import shared
from llmq.stats import AbsMax, MeanSquare, Sample, Stat
from llmq.steps import Held, Operations, Scaling, SiteView, Transform
from llmq.types import LlmqError, Site

_PANEL = 2**18  # products at a time


@dataclass(frozen=True)
class Migrate(Transform):
    """Scales by expected error.

    feedback: the share of the weights' expected error that the solver leaves (gptq about half of it, rtn all).
    steps: of Adam, on log s, from sqrt(max|X_j| / max|W_j|); 30 come within 1 % of the least error.
    """

    feedback: float = 0.5
    steps: int = 30

    of_integers: ClassVar[bool] = True
    held: ClassVar[Held] = Held(0, 4)

    def __post_init__(self) -> None:
        if not 0 < self.feedback <= 1 or self.steps < 1:
            raise ValueError("feedback lies above 0 and at most at 1, and steps is at least 1")

    def needs(self, site: Site) -> tuple[type[Stat], ...]:
        """Return what the error is expected from, where the site has a producer to fold into."""
        return (AbsMax, MeanSquare, Sample) if site.producer else ()

    def operations(self, N: int, K: int) -> Operations:
        """Return the passes over the weight that each step of Adam takes."""
        return Operations(passes=6 * self.steps * N * K)

    def forwards(self, samples: int, length: int) -> float:
        """Return the forward that is observed."""
        return 1.0

    def search(self, view: SiteView) -> Scaling | None:
        """Return this site's scales."""
        producer = view.site.producer
        if producer is None or not any(view.schemes):
            return None
        error = _ExpectedError(view, self.feedback)
        largest_K = shared(view.stats[AbsMax].max, producer, largest=True).clamp(min=1e-5).log()
        floor_K = largest_K if error.static else torch.full_like(largest_K, -math.inf)
        start_K = shared(largest_K - error.largest().clamp(min=1e-5).log(), producer) / 2
        if error.static:
            start_K = start_K - (start_K - floor_K).amin()
        log_K, ratio = self._descend(error, start_K, floor_K, lambda g_K: shared(g_K, producer))
        scale_K = (log_K - log_K.mean()).exp()  # fp16's scales of the producer's rows have a floor
        return Scaling(scale_K, {"migrate": {"expected_error_over_start": ratio}})

    def _descend(
        self, error: _ExpectedError, start_K: Tensor, floor_K: Tensor, tied: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, float]:
        """Return the log scales with the least error, none below its floor, and that error in parts of the start's."""
        point = start_K.clone()
        optimizer = torch.optim.Adam([point], lr=0.1)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        best, values = start_K, list[float]()
        for _ in range(self.steps):
            value, gradient_K = error(point.exp())
            if not math.isfinite(value):
                raise LlmqError(
                    "activations or weights are not finite, so that no scale can be chosen; try --dtype float32"
                )
            if value < min(values, default=math.inf):
                best = point.clone()
            values.append(value)
            point.grad = tied(gradient_K).div_(max(value, 1e-30))  # of its logarithm
            optimizer.step()
            torch.maximum(point, floor_K, out=point)
            falling.step()
        return best, min(values) / max(values[0], 1e-30)


class _ExpectedError:
    """What the module's formula gives for one site, and its gradient, as a function of the scales `[K]`."""

    def __init__(self, view: SiteView, feedback: float) -> None:
        self.feedback = feedback
        self.moments_K = view.stats[MeanSquare].mean()
        self.weights = [
            (view.modules[name].weight.detach(), scheme.weight)
            for name, scheme in zip(view.site.linears, view.schemes, strict=True)
            if scheme
        ]
        scheme = next(s for s in view.schemes if s)  # whose activation is that of all
        self.static, per_token = scheme.static, scheme.activation is not None and not scheme.static
        self.tokens_TK = view.stats[Sample].rows.float() if per_token else None
        self.energy_K = torch.stack([W_NK.square().sum(0) for W_NK, _ in self.weights]).sum(0)

    def largest(self) -> Tensor:
        """Return the largest weight of every channel, `[K]`."""
        return torch.stack([W_NK.abs().amax(0) for W_NK, _ in self.weights]).amax(0)

    def __call__(self, scale_K: Tensor) -> tuple[float, Tensor]:
        """Return the error, and its derivatives by the logarithms of the scales, float32 `[K]`."""
        K = len(scale_K)
        total, gradient_K = 0.0, torch.zeros_like(scale_K)
        energy_K = self.energy_K * scale_K.square()
        if self.static:
            total += energy_K.sum().item() / 127**2
            gradient_K += 2 * energy_K / 127**2
        if self.tokens_TK is not None:
            step_K = _largest(self.tokens_TK, 1 / scale_K, K).div_(len(self.tokens_TK) * 127**2)
            total += (energy_K.sum() * step_K.sum()).item()
            gradient_K += 2 * (energy_K * step_K.sum() - energy_K.sum() * step_K)
        moment_K = self.moments_K / scale_K.square()
        for W_NK, grid in self.weights:
            group = grid.granularity.columns(K)
            rows = len(W_NK) // grid.granularity.rows(len(W_NK))  # that share a scale
            held = _largest(W_NK.reshape(-1, rows * K), scale_K.repeat(rows), rows * group)
            step_K = held.view(rows, K).sum(0).mul_(rows * self.feedback / ((2**grid.bits - 1) / 2) ** 2)
            steps_G1, moments_G1 = (x.view(-1, group).sum(1, keepdim=True) for x in (step_K, moment_K))
            total += (steps_G1 * moments_G1).sum().item()
            gradient_K += 2 * (step_K.view(-1, group) * moments_G1 - steps_G1 * moment_K.view(-1, group)).flatten()
        return total, gradient_K


def _largest(values_MK: Tensor, factor_K: Tensor, group: int) -> Tensor:
    """Return the sum over the rows of the largest (v f)^2 of every group, at the columns that hold it, `[K]`.

    In panels that a processor's cache holds.
    """
    panel = max(1, _PANEL // len(factor_K))
    products = torch.empty_like(values_MK[:panel])
    held_K = torch.zeros_like(factor_K)
    for values in values_MK.split(panel):
        at = torch.mul(values, factor_K, out=products[: len(values)]).square_().unflatten(1, (-1, group))
        largest = at.amax(2, keepdim=True)
        held_K += at.eq_(largest).mul_(largest).sum(0).flatten()
    return held_K
