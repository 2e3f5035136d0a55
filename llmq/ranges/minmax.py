"""Min-max: cover every value. No clipping, so the largest value sets the step of its group."""

from dataclasses import dataclass

from torch import Tensor

from llmq.types import RangedGrid


@dataclass(frozen=True)
class MinMax:
    """The whole interval of the values that carry weight."""

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the extremes of `w[..., g]`, zero included."""
        return w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
