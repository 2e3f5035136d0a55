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


UP = "model.layers.0.mlp.up_proj"


def test_an_override_may_name_whole_grids():
    recipe = Recipe(weights="fp8:range=percentile", inputs="fp8", method="rtn", override=(
        "up_proj:weights=nvfp4,inputs=nvfp4", "down_proj:weights=fp8:group=tensor:range=[mse:norm=2.4], inputs = none",
        "o_proj:range=minmax", "gate_proj:inputs=fp8:group=tensor:range=percentile"))  # fmt: skip
    made = method_of(recipe, torch.float16)
    up, down, out, gate = (
        made.scheme(f"model.layers.0.{n}_proj") for n in ("mlp.up", "mlp.down", "self_attn.o", "mlp.gate")
    )
    assert [type(g).__name__ for g in (up.weight, up.activation)] == ["Nvfp4", "Nvfp4"]
    assert type(up.weight.range).__name__ == "Percentile", "the range of the rest"
    assert down.weight.group == "tensor" and down.weight.range.norm == 2.4 and down.activation is None
    assert type(out.weight.range).__name__ == "MinMax" and out.activation == made.base.activation
    assert gate.static and gate.weight == made.base.weight


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:weights=nvfp5", "'nvfp5' is none of llmq's grids"),
        ("a:weights=nvfp4,range=mse", "weights= says all of the grid; say range there"),
        ("a:inputs=fp8:range=mse", "a range means nothing where scales are found at run time"),
        ("a:inputs=int:bits=8:group=32", "scales per token"),
        ("a:bits=4", "has no option 'bits'"),
        ("weights", "does not read; write REGEX:bits=8,group_size=32 .*REGEX:weights=fp8,inputs=fp8"),
    ],
)
def test_what_an_override_may_not_say_is_one_line(text, said):
    with pytest.raises(LlmqError, match=said) as e:
        method_of(Recipe(weights="fp8", inputs="fp8", override=(text,)), torch.float16)
    assert "\n" not in str(e.value)
