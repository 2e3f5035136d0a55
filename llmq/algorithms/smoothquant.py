"""SmoothQuant: move the difficulty of outlier activations into the weights, so that both fit int8.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), folded as x / s and W * s.
Xiao et al. 2023, arXiv:2211.10438, equation 4. A transform: the function is unchanged; rtn or gptq rounds afterwards.
Not here: how activations are quantized (the runtime; calibration/ measures static scales).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from llmq.algorithms._shares import shared
from llmq.stats import AbsMax, Stat
from llmq.steps import Held, Scaling, SiteView, Transform
from llmq.types import Site


@dataclass(frozen=True)
class SmoothQuant(Transform):
    """Migrates activation outliers.

    alpha: how much of the difficulty moves to the weights (0.5 in the paper, 0.8 for large Llamas; with `linears` 0.65
        measured best here).
    linears: also fold into linear producers (v -> o, up -> down), which the paper leaves alone; it is what brings a
        small Llama within 1 % of its float perplexity (docs/accuracy.md).
    """

    alpha: float = 0.65
    linears: bool = True

    held: ClassVar[Held] = Held(0, 2)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha lies between 0 and 1, not {self.alpha}")

    def needs(self, site: Site) -> tuple[type[Stat], ...]:
        """Return the largest magnitudes, where the site has a producer to fold into."""
        wanted = site.producer is not None and (self.linears or site.producer.gain != "")
        return (AbsMax,) if wanted else ()

    def forwards(self, samples: int, length: int) -> float:
        """Return the forward that is observed."""
        return 1.0

    def search(self, view: SiteView) -> Scaling | None:
        """Return this site's migration scales."""
        producer = view.site.producer
        if producer is None or all(g is None for g in view.grids):
            return None
        x_max = shared(view.stats[AbsMax].max, producer, largest=True).clamp(min=1e-5)
        w_max = torch.stack([view.modules[n].weight.abs().amax(0) for n in view.site.linears]).amax(0)
        w_max = shared(w_max, producer, largest=True).clamp(min=1e-5)
        scale_K = (x_max**self.alpha / w_max ** (1 - self.alpha)).clamp(min=1e-5)
        line = {"alpha": self.alpha, "scale_min": scale_K.min().item(), "scale_max": scale_K.max().item()}
        return Scaling(scale_K, {"smoothquant": line})
