"""MXFP8: E4M3 floats of 8 bits, scales that are powers of two for 32 columns (8.25 bits).

Facts: docs/floats.md.
"""

from dataclasses import dataclass

from llmq.grids._microscaling import Microscaling
from llmq.minifloat import E4M3


@dataclass(frozen=True)
class Mxfp8(Microscaling):
    """E4M3 floats with E8M0 scales. range: how `fit` chooses what is covered; None is min-max."""

    value = E4M3
