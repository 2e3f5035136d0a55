"""Qwen3: Llama's block with RMSNorms on the heads of q and k, behind the linears, which take no part in folds."""

from dataclasses import dataclass

from llmq.families.llama import Llama


@dataclass(frozen=True)
class Qwen3(Llama):
    """Llama's sites."""
