"""Recipes: defaults, files, and the errors of both."""

import json

import pytest
import torch

from llmq.recipe import Recipe, plan
from llmq.types import LlmqError


def test_defaults_that_depend_on_other_options():
    assert Recipe().resolved().group_size == 128 and Recipe().resolved().format == "gptq"
    w8a8 = Recipe(bits=8, act_bits=8).resolved()
    assert w8a8.group_size == "channel" and w8a8.format == "compressed-tensors"
    assert Recipe(method="gptq").resolved().range == "minmax"
    assert Recipe(method="awq,rtn").resolved().range == "output"


def test_a_quality_stands_for_a_method_and_a_range():
    names = ("fast", "balanced", "best")
    resolved = {q: Recipe(quality=q).resolved() for q in names}
    assert Recipe().resolved() == resolved["balanced"]
    assert len({r.method for r in resolved.values()}) == 3 and {r.range for r in resolved.values()} == {"mse"}
    assert all(Recipe(**{**vars(r)}).resolved() == r for r in resolved.values()), "what is recorded repeats the run"
    assert Recipe(quality="fast", range="minmax").resolved().range == "minmax"
    assert Recipe(quality="best", bits=2).resolved().method == f"{resolved['best'].method},distill"
    assert ",distill:epochs=1" in str(Recipe(quality="best", bits=3).resolved().method)
    for quality in names:
        assert plan(Recipe(quality=quality, bits=8, act_bits=8), torch.float16).transforms
    gguf = [Recipe(quality=q, format="gguf").resolved().method for q in names]
    assert gguf == ["rtn", "qep,gptq,descent", "qep,gptq,descent"]
    with pytest.raises(LlmqError, match="not both"):
        Recipe(quality="fast", method="rtn")
    with pytest.raises(LlmqError, match="fast, balanced, best, not"):
        Recipe(quality="good").resolved()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("gptq,rtn", "cannot follow"),
        ("gptq,qep", "cannot follow"),
        ("descent,gptq", "cannot follow"),
        ("qep", "no solver"),
    ],
)
def test_steps_out_of_order_are_refused(method, message):
    with pytest.raises(LlmqError, match=message):
        plan(Recipe(method=method), torch.float16)


def test_awq_clips_all_but_q_and_k_unless_a_range_is_named():
    chosen = plan(Recipe(method="awq,rtn"), torch.float16)
    ranges = {
        n: type(chosen.scheme(f"model.layers.0.self_attn.{n}").weight.range).__name__ for n in ("q_proj", "v_proj")
    }
    assert ranges == {"q_proj": "MinMax", "v_proj": "Output"}
    named = plan(Recipe(method="awq,rtn", range="mse"), torch.float16)
    assert type(named.scheme("model.layers.0.self_attn.q_proj").weight.range).__name__ == "Mse"


def test_yaml_and_json_files_round_trip(tmp_path):
    recipe = Recipe(method="awq,gptq:damp=0.05", bits=3, skip=("a", "b"), sym=False)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml", {}) == recipe
    (tmp_path / "r.json").write_text(json.dumps({"bits": 8, "group-size": "channel"}))
    assert Recipe.load(tmp_path / "r.json", {"bits": 4}) == Recipe(bits=4, group_size="channel")


@pytest.mark.parametrize(
    ("content", "message"),
    [("bitz: 4", "no option 'bitz'"), ("- 4", "option: value"), ("{", "cannot be read")],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(LlmqError, match=message):
        Recipe.load(tmp_path / "r.yaml", {})
    with pytest.raises(LlmqError, match=r"absent\.yaml"):
        Recipe.load(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize(
    "options",
    [{"act": "row"}, {"act_bits": 4}, {"act_bits": 8}, {"act_sym": False}, {"samples": 0}, {"dtype": "int8"}],
    ids=str,
)
def test_impossible_combinations_are_refused(options):
    with pytest.raises(LlmqError):
        Recipe(**options)


def test_overrides_apply_in_order_and_keep_the_rest_of_the_grid():
    recipe = Recipe(override=(r"mlp\.:bits=8", r"down_proj$:group_size=32,range=mse:norm=2.4"), sym=False)
    grid = plan(recipe, torch.float16).scheme("model.layers.0.mlp.down_proj").weight
    assert (grid.bits, grid.group_size, grid.sym, grid.range.norm) == (8, 32, False, 2.4)
    assert plan(recipe, torch.float16).scheme("model.layers.0.self_attn.o_proj").weight.bits == 4
