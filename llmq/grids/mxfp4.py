"""MXFP4: E2M1 floats of 4 bits, scales that are powers of two for 32 columns (4.25 bits): gpt-oss, AMD, Blackwell.

Facts: docs/floats.md.
"""

from dataclasses import dataclass

from torch import Tensor

from llmq.grids._ggml_floats import FloatBlocks
from llmq.grids._microscaling import Microscaling
from llmq.minifloat import E2M1
from llmq.types import FloatParams


@dataclass(frozen=True)
class Mxfp4(Microscaling, FloatBlocks):
    """E2M1 floats with E8M0 scales. range: how `fit` chooses what is covered; None is min-max."""

    value = E2M1
    qblock = 32

    def read(self, scales: Tensor, once: object) -> FloatParams:
        """See `FloatBlocks.read`."""
        return self.of_bits(scales)
