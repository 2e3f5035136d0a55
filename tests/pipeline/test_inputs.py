"""Which inputs go with which weights, and what is said where they do not."""

import pytest
import torch

from llmq import registry
from llmq.pipeline.inputs import unpaired
from llmq.pipeline.method import method_of
from llmq.pipeline.plan import outline
from llmq.recipe import Recipe
from llmq.types import LlmqError, Scheme

PAIRED = [
    ("int:bits=8:group=channel", "int:bits=8:group=channel"),
    ("int:bits=8:group=64", "int:bits=8:group=tensor"),
    ("int:bits=4:group=128", "fp8"),
    ("fp8", "fp8"),
    ("fp8:range=mse", "fp8:group=tensor:range=mse"),
    ("fp8:group=tensor", "fp8:group=tensor"),
    ("fp8:group=128x128", "fp8:group=128"),
    ("nvfp4", "nvfp4"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "fp8:group=128"),
    ("mxfp8", "mxfp8"),
]


def scheme(weights, inputs):
    return Scheme(*(registry.load("grids", text) for text in (weights, inputs)))


@pytest.mark.parametrize(("weights", "inputs"), PAIRED)
def test_what_some_runtime_multiplies_goes_together(weights, inputs):
    assert unpaired(scheme(weights, inputs)) == ""
    assert unpaired(Scheme(registry.load("grids", weights))) == ""
    made = method_of(Recipe(weights=weights, inputs=inputs, method="rtn"), torch.bfloat16)
    assert made.base.activation == registry.load("grids", inputs)


@pytest.mark.parametrize(
    ("weights", "inputs", "said"),
    [
        ("int:bits=4", "int:bits=8:group=channel", "8-bit activations need 8-bit weights, not 4; say --weights int:b"),
        ("int:bits=4:group=64", "fp8", "no runtime multiplies int:group=64 weights with fp8 inputs; leave --inputs ou"),
        ("int:bits=4", "nvfp4", "no runtime multiplies int weights with nvfp4 inputs; say --inputs fp8, --weights nv"),
        ("nvfp4", "fp8", "say --inputs nvfp4, --weights int:bits=4:group=128 or fp8 or fp8:group=tensor"),
        ("fp8", "int:bits=8:group=channel", "no runtime multiplies fp8 weights with int:bits=8:group=channel inputs"),
        ("fp8:group=128x128", "fp8", "say --inputs fp8:group=128"),
        ("nvfp4:range=mse", "mxfp4", "multiplies nvfp4 weights with mxfp4 inputs; say --inputs nvfp4, --weights mxfp4"),
    ],
)
def test_what_none_does_is_refused_with_what_would(weights, inputs, said):
    assert said in unpaired(scheme(weights, inputs))
    with pytest.raises(LlmqError, match="say --weights int:bits=8|no runtime multiplies|need 8-bit weights"):
        method_of(Recipe(weights=weights, inputs=inputs, method="rtn"), torch.bfloat16)


def test_migrate_is_refused_where_there_are_floats(tiny_checkpoint):
    recipe = Recipe(weights="int:bits=4:group=128", inputs="fp8", method="migrate,rtn")
    with pytest.raises(LlmqError, match="migrate reckons with integers, not with fp8: .* leave it out"):
        outline(str(tiny_checkpoint(intermediate_size=128, hidden_size=128)), recipe, "cpu")
