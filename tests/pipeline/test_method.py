"""What a recipe names becomes objects; a pattern of a stranger's recipe cannot hang."""

import time

import pytest
import torch

from llmq.overrides import parse
from llmq.pipeline.method import method_of
from llmq.recipe import Recipe
from llmq.types import LlmqError


def test_a_pattern_that_takes_for_ever_is_refused():
    hanging = "(.|.)+[XY]"
    steps = method_of(Recipe(skip=(hanging,), method="rtn"), torch.float16)
    start = time.process_time()
    with pytest.raises(LlmqError, match=r"--skip .* takes more than 1 second on model\.layers"):
        steps.scheme("model.layers.0.self_attn.q_proj.and.some.more.to.make.it.long")
    assert time.process_time() - start < 10
    override = parse(f"{hanging}:type=Q8_0")
    with pytest.raises(LlmqError, match="--override .* takes more than 1 second"):
        override.pattern.search("blk.0.attn_q.weight.and.some.more.to.make.it.long.enough")
