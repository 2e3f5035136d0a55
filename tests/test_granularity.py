"""Granularity: how many scales, of which shape, and in which words."""

import pytest
import torch

from llmq.errors import LlmqError
from llmq.granularity import PerBlock, PerGroup, PerRow, PerTensor, granularity


@pytest.mark.parametrize(
    ("said", "value", "columns", "groups", "shape", "words"),
    [
        ("tensor", PerTensor(), 256, 1, (1,), "per tensor"),
        ("channel", PerRow(), 256, 1, (64, 1), "per channel"),
        (-1, PerRow(), 256, 1, (64, 1), "per channel"),
        (32, PerGroup(32), 32, 8, (64, 8), "group size 32"),
        ("128", PerGroup(128), 128, 2, (64, 2), "group size 128"),
        ("16x128", PerBlock(16, 128), 128, 2, (4, 2), "blocks of 16 x 128"),
    ],
)
def test_each_knows_its_scales_of_64_rows_and_256_columns(said, value, columns, groups, shape, words):
    assert granularity(said) == value and str(value) == words
    assert (value.columns(256), value.groups(256), value.shape(64, 256)) == (columns, groups, shape)
    assert value.rows(64) == shape[0]
    assert value.group_size == (columns if isinstance(value, PerGroup) else None)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group size 96 does not divide K = 256"):
        PerGroup(96).groups(256)


def test_the_last_block_may_lack_rows_and_those_it_lacks_are_zeros():
    W_NK = torch.arange(1.0, 64 * 256 + 1).view(64, 256)
    assert PerBlock(48, 32).shape(64, 256) == (2, 8)
    blocks = PerBlock(48, 32).gathered(W_NK)
    assert torch.equal(blocks[0, 1], W_NK[:48, 32:64].flatten())
    assert torch.equal(blocks[1, 7], torch.cat([W_NK[48:, 224:].flatten(), torch.zeros(32 * 32)]))


@pytest.mark.parametrize("said", [0, -2, "0x8", "8x", "8x8x8", "row", "", 10**12, True])
def test_what_is_no_granularity_is_one_line(said):
    with pytest.raises(LlmqError, match="a number of columns, 'channel', 'tensor' or a block '128x128', not"):
        granularity(said)
