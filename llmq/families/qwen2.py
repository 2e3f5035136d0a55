"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v (folds divide the producer's bias too)."""

from dataclasses import dataclass

from llmq.families.llama import Llama


@dataclass(frozen=True)
class Qwen2(Llama):
    """Llama's sites."""
