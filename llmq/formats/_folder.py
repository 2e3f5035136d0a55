"""What the formats of a checkpoint folder share: which matrices they quantize.

Not here: the words of a linear (gptq.py, awq.py, compressed_tensors.py).
"""

from __future__ import annotations

from llmq.types import Assignment, FloatModel, LlmqError, Wanted


class Folder:
    """The base of these formats."""

    def assign(self, model: FloatModel, wanted: Wanted) -> Assignment:
        """Return what the recipe says of the linears of the blocks, and of the head where it is asked for.

        Raises LlmqError where none is left to quantize.
        """
        schemes = wanted.schemes([*model.linears, *([model.head] if wanted.head else [])])
        if not schemes:
            raise LlmqError("every linear is skipped; nothing to quantize")
        return Assignment(schemes)
