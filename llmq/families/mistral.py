"""Mistral: Llama's block; sliding-window attention changes the mask, not the linears."""

from dataclasses import dataclass

from llmq.families.llama import Llama


@dataclass(frozen=True)
class Mistral(Llama):
    """Llama's sites."""
