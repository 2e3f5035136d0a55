"""What a recipe names becomes objects; a pattern of a stranger's recipe cannot hang."""

import re
import time

import pytest
import torch

from llmq.gguf.pipeline import overrides_of
from llmq.method import Pattern, plan
from llmq.recipe import Recipe
from llmq.types import LlmqError

NAMES = [f"model.layers.{i}.{n}_proj" for i in (0, 1, 11) for n in ("self_attn.q", "mlp.down")]


@pytest.mark.parametrize(
    "text", [r"layers\.1\.", "down_proj$", "^model", "(?!.*q_proj).*1", "a|b", "^(model.layers.0.mlp.down_proj)$"]
)
def test_a_pattern_finds_what_re_finds(text):
    assert [Pattern(text, "x").search(n) for n in NAMES] == [bool(re.search(text, n)) for n in NAMES]


@pytest.mark.parametrize("text", ["(", "a{99999999999}", "(?R)", "(" * 5000, "a" * 200_000], ids=lambda t: t[:9])
def test_what_is_no_pattern_is_named_in_one_line(text):
    with pytest.raises(LlmqError, match="--skip") as e:
        Pattern(text, f"--skip {text!r}")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_pattern_that_takes_for_ever_is_refused():
    hanging = "(.|.)+[XY]"
    steps = plan(Recipe(skip=(hanging,), method="rtn"), torch.float16)
    start = time.process_time()
    with pytest.raises(LlmqError, match=r"--skip .* takes more than 1 second on model\.layers"):
        steps.scheme("model.layers.0.self_attn.q_proj.and.some.more.to.make.it.long")
    assert time.process_time() - start < 10
    ((pattern, _),) = overrides_of([f"{hanging}:type=Q8_0"])
    with pytest.raises(LlmqError, match="--override .* takes more than 1 second"):
        pattern.search("blk.0.attn_q.weight.and.some.more.to.make.it.long.enough")
