"""Channels that share a scale: those that one channel of the producer feeds, as grouped-query attention feeds heads.

Not here: what feeds what (model/producers.py), folding the scales (model/folding.py).
"""

import torch
from torch import Tensor

from llmq.types import Producer


def shared(per_input_K: Tensor, producer: Producer, *, largest: bool = False) -> Tensor:
    """Average (or take the largest of) a statistic over the channels that share a scale; shape `[K]` again."""
    if producer.rows is None:
        return per_input_K
    rows_K = torch.tensor(producer.rows, device=per_input_K.device)
    per_row = torch.zeros(max(producer.rows) + 1, dtype=per_input_K.dtype, device=per_input_K.device)
    how = "amax" if largest else "mean"
    return per_row.scatter_reduce(0, rows_K, per_input_K, how, include_self=False)[rows_K]
