"""Schemes by name: each stands for options that go together, and gives way to those that are said beside it."""

import pytest
import torch

from llmq.commands.look import list_
from llmq.pipeline.inputs import unpaired
from llmq.pipeline.method import method_of
from llmq.recipe import Recipe
from llmq.schemes import SCHEMES
from llmq.types import LlmqError

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_what_it_is_short_for(name):
    recipe = Recipe(scheme=name, quality="fast")
    assert recipe == Recipe(**SCHEMES[name].options, quality="fast") and recipe.scheme is None
    made = method_of(recipe, torch.bfloat16)
    assert not any(unpaired(made.scheme(n)) for n in (UP, Q))
    assert Recipe(**recipe.to_json()).resolved() == recipe.resolved(), "what is recorded repeats the run"


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [("fp8-block", ("block", 8), ("group", 8)), ("nvfp4a16", ("tensor_group", 4), None),
     ("w8a8", ("channel", 8), ("channel", 8)),
     ("fp8-static", ("channel", 8), ("tensor", 8)), ("mxfp4", ("group", 4), ("group", 4))],
)  # fmt: skip
def test_schemes_are_those_of_compressed_tensors(name, weights, inputs):
    scheme = method_of(Recipe(scheme=name), torch.bfloat16).scheme(UP)
    grids = [g and (g.args()["strategy"], g.args()["num_bits"]) for g in (scheme.weight, scheme.activation)]
    assert grids == [weights, inputs]


def test_mixed_has_mlps_in_nvfp4_and_the_rest_in_fp8():
    recipe = Recipe(scheme="mixed", override=(r"down_proj$:weights=fp8,inputs=fp8",))
    made = method_of(recipe, torch.bfloat16)
    kinds = {
        n: [type(g).__name__ for g in (made.scheme(n).weight, made.scheme(n).activation)]
        for n in (UP, Q, "lm_head", "model.layers.0.mlp.down_proj")
    }
    assert kinds[UP] == ["Nvfp4", "Nvfp4"] and kinds[Q] == kinds["lm_head"] == ["Fp8", "Fp8"]
    assert kinds["model.layers.0.mlp.down_proj"] == ["Fp8", "Fp8"], "what the user says comes last"
    assert made.scheme(UP).weight.range == made.scheme(Q).weight.range and made.recipe.lm_head


def test_what_stands_beside_a_scheme_wins_but_for_other_weights_and_inputs():
    assert method_of(Recipe(scheme="w4a16", group_size=32), torch.float16).base.weight.group == 32
    assert Recipe(scheme="mixed", lm_head=False).lm_head is False
    for flag in ({"weights": "fp8"}, {"inputs": "fp8"}, {"bits": 4}, {"act_bits": 8}):
        with pytest.raises(LlmqError, match="--scheme nvfp4 says what weights and inputs become; leave --"):
            Recipe(scheme="nvfp4", **flag)
    with pytest.raises(LlmqError, match="--group-size means nothing here: --weights says"):
        Recipe(scheme="nvfp4", group_size=32)
    with pytest.raises(LlmqError, match="--scheme means nothing here: .*--type"):
        Recipe(scheme="nvfp4", format="gguf")
    with pytest.raises(LlmqError, match="--scheme 'nvfp5' is none of: w4a16, w8a8, fp8"):
        Recipe(scheme="nvfp5")


def test_the_list_says_where_each_runs_and_when_not(capsys, monkeypatch):
    monkeypatch.setattr("llmq.commands.look.console.width", 160)
    list_("schemes")
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in SCHEMES) and "under 10B" in shown and "Blackwell" in shown
    assert "gptq" not in shown
    list_("ranges")
    assert "percentile" in (shown := capsys.readouterr().out) and "nvfp4" not in shown
    with pytest.raises(LlmqError, match="no list of 'scheme'; there are schemes, algorithms"):
        list_("scheme")
