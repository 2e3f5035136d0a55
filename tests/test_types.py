"""A QTensor says which group each of its columns is in, however its groups lie."""

from __future__ import annotations

import pytest
import torch

from llmq.grids.int import Int
from llmq.types import Params, QTensor


@pytest.mark.parametrize("g_idx", [None, [0, 1, 0, 1, 2, 2], [0, 0, 0, 0, 1, 2]])
def test_the_group_of_a_column_is_the_one_whose_scale_it_has(g_idx: list[int] | None) -> None:
    params = Params(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 3, dtype=torch.int32))
    ids = None if g_idx is None else torch.tensor(g_idx, dtype=torch.int32)
    q = QTensor(torch.ones(1, 6, dtype=torch.uint8), params, Int(4, False, 2), ids)
    assert q.group_K.dtype == torch.int64 and q.group_K.tolist() == (g_idx or [0, 0, 1, 1, 2, 2])
    assert torch.equal(params.scale[:, q.group_K], q.dequantize())
