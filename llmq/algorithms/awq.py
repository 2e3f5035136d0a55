"""AWQ: scale up the input channels that carry large activations before rounding, and undo it in their producer.

s_j = mean|x_j|^r / sqrt(max s * min s), r searched on a grid of 20; the loss is the squared error of the parent
module's output with the site's linears rounded to nearest (for a lone linear, whose output that is, it equals
tr(E H E^T) over all calibration tokens; for attention and MLP the parent runs on a sample of tokens).
Lin et al. 2024, arXiv:2306.00978, section 3.2. The paper's clip search is the range `output`, which a recipe with awq
uses unless it names another, on all linears but q and k. A transform: rtn or gptq rounds afterwards. Several processes
deal the exponents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llmq.algorithms._shares import shared
from llmq.stats import AbsMean, Hessian, Stat
from llmq.steps import Held, Operations, Scaling, SiteView, Transform
from llmq.types import Grid, QTensor, Site


@dataclass(frozen=True)
class Awq(Transform):
    """Activation-aware scaling.

    steps: exponents tried, evenly from 0 (no scaling, always a candidate) to below 1.
    call_tokens: tokens on which a parent module's output is compared.
    """

    steps: int = 20
    call_tokens: int = 4096

    preferred_range: ClassVar[str | None] = "output"

    @property
    def candidates(self) -> int:
        """See `Transform`: the exponents."""
        return self.steps

    held: ClassVar[Held] = Held(1, 5)

    def __post_init__(self) -> None:
        if self.steps < 2 or self.call_tokens < 1:
            raise ValueError("steps is at least 2 and call_tokens at least 1")

    def needs(self, site: Site) -> tuple[type[Stat], ...]:
        """Return the mean magnitudes, and the Hessian where the loss is a lone linear's."""
        if site.producer is None:
            return ()
        return (AbsMean, Hessian) if site.parent in site.linears else (AbsMean,)

    def operations(self, N: int, K: int) -> Operations:
        """Return the weight rounded plainly, exponent by exponent."""
        return Operations(passes=10 * self.steps * N * K)

    def forwards(self, samples: int, length: int) -> float:
        """Return the forward that is observed, and those of parents on a sample of tokens, exponent by exponent."""
        return 1 + self.steps * min(1, self.call_tokens / (samples * length))

    def search(self, view: SiteView) -> Scaling | None:
        """Return the best scales, or None where no exponent beats r = 0."""
        producer = view.site.producer
        if producer is None or all(g is None for g in view.grids):
            return None
        mean_K = shared(view.stats[AbsMean].mean(), producer).clamp(min=1e-4)
        loss = self._lone_loss(view) if Hessian in view.stats else self._parent_loss(view)
        tried = range(self.steps)
        losses = view.team.dealt([loss(self._scale(mean_K, i)) for i in view.team.own(tried)])
        best = min((i for i in tried if losses[i] < float("inf")), key=losses.__getitem__, default=0)
        if best == 0:
            return None
        line = {"ratio": best / self.steps, "loss_over_unscaled": losses[best] / losses[0] if losses[0] else 1.0}
        return Scaling(self._scale(mean_K, best), {"awq": line})

    def _scale(self, mean_K: Tensor, i: int) -> Tensor:
        """Return the scales of the exponent of that number."""
        scale_K = mean_K ** (i / self.steps)
        return scale_K / (scale_K.max() * scale_K.min()).sqrt()

    def _lone_loss(self, view: SiteView) -> Callable[[Tensor], float]:
        W_NK = view.modules[view.site.linears[0]].weight.detach().clone()
        (grid,) = (g for g in view.grids if g is not None)
        H_KK = view.stats[Hessian].mean()

        def loss(scale_K: Tensor) -> float:
            E_NK = _rounded(W_NK, scale_K, grid) - W_NK
            return ((E_NK @ H_KK) * E_NK).sum().item()

        return loss

    def _parent_loss(self, view: SiteView) -> Callable[[Tensor], float]:
        parent = view.modules[view.site.parent]
        linears = [view.modules[n] for n in view.site.linears]
        weights = [m.weight.detach().clone() for m in linears]
        wanted = [_output(parent(*args, **kwargs)) for args, kwargs in view.calls]

        def loss(scale_K: Tensor) -> float:
            for m, W_NK, grid in zip(linears, weights, view.grids, strict=True):
                if grid is not None:
                    m.weight.copy_(_rounded(W_NK, scale_K, grid))
            total = 0.0
            for (args, kwargs), want in zip(view.calls, wanted, strict=True):
                total += (_output(parent(*args, **kwargs)) - want).float().square().sum().item()
            for m, W_NK in zip(linears, weights, strict=True):
                m.weight.copy_(W_NK)
            return total

        return loss


def _rounded(W_NK: Tensor, scale_K: Tensor, grid: Grid) -> Tensor:
    """Return the weight that scaling, rounding to nearest (a plain fit: min-max) and unscaling give."""
    return QTensor.rounded(W_NK.float() * scale_K, grid.plain()).dequantize().div_(scale_K)


def _output(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
