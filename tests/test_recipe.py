"""Recipes: defaults, files, and the errors of both."""

import dataclasses
import json
import math
import sys

import pytest
import torch
import yaml

from llmq.pipeline.method import method_of
from llmq.recipe import Recipe
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
        assert method_of(Recipe(quality=quality, bits=8, act_bits=8), torch.float16).transforms
    gguf = [Recipe(quality=q, format="gguf").resolved().method for q in names]
    assert gguf == ["rtn", "qep,gptq,descent", "qep,gptq,descent"]
    with pytest.raises(LlmqError, match="not both"):
        Recipe(quality="fast", method="rtn")
    with pytest.raises(LlmqError, match="--quality takes fast or balanced or best or none, not 'good'"):
        Recipe(quality="good").resolved()


def test_a_share_of_varied_text_is_said_once():
    assert Recipe(calib="a.txt", varied=0.5).resolved().calib == ("a.txt", "varied:weight=1")
    for calib in ("varied", ("a.txt", "varied:weight=2")):
        with pytest.raises(LlmqError, match="leave --varied out"):
            Recipe(calib=calib, varied=0.5)


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
        method_of(Recipe(method=method), torch.float16)


def test_awq_clips_all_but_q_and_k_unless_a_range_is_named():
    chosen = method_of(Recipe(method="awq,rtn"), torch.float16)
    ranges = {
        n: type(chosen.scheme(f"model.layers.0.self_attn.{n}").weight.range).__name__ for n in ("q_proj", "v_proj")
    }
    assert ranges == {"q_proj": "MinMax", "v_proj": "Output"}
    named = method_of(Recipe(method="awq,rtn", range="mse"), torch.float16)
    assert type(named.scheme("model.layers.0.self_attn.q_proj").weight.range).__name__ == "Mse"


def test_yaml_and_json_files_round_trip(tmp_path):
    recipe = Recipe(method="awq,gptq:damp=0.05", bits=3, skip=("a", "b"), sym=False)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yaml", {}) == recipe
    (tmp_path / "r.json").write_text(json.dumps({"bits": 8, "group-size": "channel"}))
    assert Recipe.load(tmp_path / "r.json", {"bits": 4}) == Recipe(bits=4, group_size="channel")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bitz: 4", "no option 'bitz'"),
        ("- 4", "an object of named values"),
        ("{", "not valid YAML"),
        ("1: 2", "an object of named values"),
        ("bits: 4\nbits: 8", "'bits' is given twice"),
        ("group-size: 32\ngroup_size: 64", "group_size is given twice"),
        ("act: &a [lol]\nkv: *a", "aliases"),
        ("a: " * 300, "not valid YAML"),
        ("[" * 50000, "nested too deep"),
        ("{a: " * 250 + "1" + "}" * 250, "nested"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(LlmqError, match=message):
        Recipe.load(tmp_path / "r.yaml", {})
    with pytest.raises(LlmqError, match=r"absent\.yaml"):
        Recipe.load(tmp_path / "absent.yaml", {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act": "row"}, "--act takes token or tensor, not 'row'"),
        ({"act_bits": 4}, "--act-bits takes 8 or none, not 4"),
        ({"act_bits": 8}, "say --bits 8"),
        ({"act_bits": 8, "bits": 8, "act": "tensor", "act_sym": False}, "per token"),
        ({"act_bits": 8, "bits": 8, "act": "tensor", "act_range": "output"}, "--act-range output"),
        ({"act_bits": 8, "bits": 8, "act": "tensor", "act_range": "entrpy"}, "did you mean 'entropy'"),
        ({"dtype": "int8"}, "--dtype takes auto or float32 or bfloat16"),
        ({"bits": 9}, "--bits takes a whole number from 2 to 8, not 9"),
        ({"sym": "false"}, "--sym takes true or false, not 'false'"),
        ({"lm_head": "no"}, "--lm-head takes true or false, not 'no'"),
        ({"samples": 1.5}, "--samples takes a whole number from 1 to"),
        ({"samples": "4"}, "--samples takes"),
        ({"samples": True}, "--samples takes"),
        ({"samples": 0}, "--samples takes"),
        ({"seq_len": 10**12}, "--seq-len takes"),
        ({"seed": -1}, "--seed takes a whole number from 0 to"),
        ({"seed": 2**70}, "--seed takes"),
        ({"seed": "abc"}, "--seed takes"),
        ({"target_bpw": math.nan}, "--target-bpw takes a number from 1 to 16"),
        ({"target_bpw": math.inf}, "--target-bpw takes"),
        ({"target_bpw": 0.5}, "--target-bpw takes"),
        ({"group_size": 0}, "group_size is"),
        ({"group_size": "-5"}, "group_size is"),
        ({"group_size": "9" * 5000}, "group_size is"),
        ({"group_size": [32]}, "--group-size takes a whole number or a text"),
        ({"group_size": math.nan}, "--group-size takes"),
        ({"method": 5}, "--method takes a text, not 5"),
        ({"skip": 5}, "--skip takes a list of texts"),
        ({"override": [5]}, "--override takes a list of texts"),
        ({"quality": ["best"]}, "--quality takes"),
        ({"target_bpw": 4, "bit_choices": 3}, "--bit-choices takes a text"),
        ({"format": {"a": 1}}, "--format takes a text"),
        ({"format": ""}, "--format takes a text, not ''"),
        ({"skip": ("",)}, "--skip takes a list of texts"),
        ({"format": "gguf", "split_max_size": 4}, "--split-max-size takes"),
        ({"method": "awq," * 10**5 + "rtn"}, "--method has 100,001 steps"),
        ({"override": ("a:bits=9",)}, "bits takes a whole number from 2 to 8, not '9'"),
        ({"override": ("a:sym=maybe",)}, "sym takes true or false"),
        ({"override": ("a:bits=4,skip=b",)}, "has no option 'skip'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_values_of_another_kind_and_impossible_combinations_are_refused(options, message):
    with pytest.raises(LlmqError, match=message) as e:
        method_of(Recipe(**options), torch.float16)
    assert len(str(e.value)) < 300


def test_a_number_that_python_does_not_print_is_refused_too():
    with pytest.raises(LlmqError, match="not a number of thousands of digits"):
        Recipe(samples=10**5000)


def test_every_option_has_a_kind():
    for name in (f.name for f in dataclasses.fields(Recipe)):
        with pytest.raises(LlmqError, match=f"--{name.replace('_', '-')} takes "):
            Recipe(**{name: object()})


MEANINGLESS = [
    *(
        ({"format": "gguf"} | option, "choose by --type alone")
        for option in ({"bits": 4}, {"bits": 3}, {"sym": True}, {"sym": False}, {"lm_head": False}, {"lm_head": True},
                       {"group_size": 128}, {"range": "minmax"}, {"act_bits": 8})
    ),
    *(({"format": "gguf"} | {name: value}, f"--{name.replace('_', '-')} means nothing here")
      for name, value in (("act", "token"), ("act_sym", True), ("act_range", "minmax"), ("kv", "tensor"),
                          ("bit_choices", "3,4,5,6,8"))),
    ({"act": "token"}, "--act means nothing here: .*--act-bits 8"),
    ({"act_sym": False}, "--act-sym means nothing here"),
    ({"act_range": "minmax"}, "--act-range means nothing here"),
    ({"bits": 8, "act_bits": 8, "act_range": "minmax"}, "say --act-bits 8 --act tensor"),
    ({"kv": "tensor"}, "say --kv-bits 8"),
    ({"bit_choices": "3,4,5,6,8"}, "say --target-bpw"),
    ({"type": "Q4_K_M"}, "say --format gguf"),
    ({"imatrix": "a"}, "say --format gguf"),
    ({"imatrix_out": "a"}, "say --format gguf"),
    ({"split_max_size": "4G"}, "say --format gguf"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MEANINGLESS, ids=lambda v: str(v)[:60])
def test_an_option_that_means_nothing_beside_the_others_is_refused_whatever_its_default(tmp_path, options, message):
    with pytest.raises(LlmqError, match=message):
        Recipe(**options)
    (tmp_path / "r.json").write_text(json.dumps(options))
    with pytest.raises(LlmqError, match=message):
        Recipe.load(tmp_path / "r.json", {})


@pytest.mark.parametrize(
    "options",
    [{}, {"quality": "best", "bits": 2}, {"method": "awq,rtn", "override": ("a:bits=8",), "skip": ["b"]},
     {"kv_bits": 8}, {"weights": "nvfp4", "inputs": "nvfp4"},
     {"weights": "fp8", "inputs": "fp8:group=tensor:range=mse"},
     {"bits": 8, "act_bits": 8}, {"bits": 8, "act_bits": 8, "act": "tensor"}, {"target_bpw": 4.5}, {"format": "gguf"},
     {"format": "gguf:pre=llama-bpe", "type": "Q8_0", "method": "rtn", "split_max_size": "4G"}],
    ids=str,
)  # fmt: skip
def test_what_is_resolved_is_written_and_read_back_and_means_the_same(tmp_path, options):
    resolved = Recipe(**options).resolved()
    (tmp_path / "recipe.yaml").write_text(resolved.to_yaml())
    again = Recipe.load(tmp_path / "recipe.yaml", {})
    assert again == resolved == again.resolved()
    assert again.to_yaml() == resolved.to_yaml() and "null" not in resolved.to_yaml()
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(resolved)))) == resolved, "as quantization.json has it"


@pytest.mark.parametrize(
    "text",
    ["method: evil.step", "method: 'awq, evil.step:x=1'", "method: gptq\nrange: evil.step", "format: evil.step",
     "method: gptq\noverride: ['a:range=evil.step']", "override: 'a:bits=4, range = evil.step:x=1'",
     "override: 'a:weights=evil.step'", "override: 'a:inputs=fp8:group=tensor:range=evil.step'",
     "bits: 8\nact_bits: 8\nact: tensor\nact_range: evil.step", "method: .evil",
     "weights: fp8\ninputs: evil.step", "weights: fp8\ninputs: 'fp8:group=tensor:range=evil.step'",
     "method: llmq.calibration"],
)  # fmt: skip
def test_a_file_names_no_code_unless_the_user_allows_it(tmp_path, monkeypatch, text):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/__init__.py").write_text("raise RuntimeError('it ran')\n")
    (tmp_path / "evil/step.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(LlmqError, match="names code outside llmq .* --allow-code"):
        Recipe.load(tmp_path / "r.yaml", {})
    with pytest.raises(LlmqError, match="it ran|no third-party"):
        method_of(Recipe.load(tmp_path / "r.yaml", {}, allow_code=True), torch.float16)
    if "method: evil" in text:  # what the command line says in its place, or says itself, is the user's own
        assert Recipe.load(tmp_path / "r.yaml", {"method": "rtn"}).method == "rtn"
        assert Recipe.load(None, {"method": "evil.step"}).method == "evil.step"
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("object", "lazy.step is no step; the class of a step derives from one of Rotation, Weighting, Transform"),
        ("Refiner", "lazy.step.*abstract.*needs, refine"),
    ],
)
def test_a_step_of_no_kind_or_without_its_verb_is_named(tmp_path, monkeypatch, base, said):
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy/step.py").write_text(
        "from dataclasses import dataclass\nfrom llmq.steps import Refiner\n"
        f"@dataclass\nclass Lazy({base}):\n    x: int = 1\n    def refin(self, W_NK, solved, stats): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lazy.step", raising=False)
    with pytest.raises(LlmqError, match=said):
        method_of(Recipe(method="lazy.step,rtn"), torch.float16)


def test_overrides_apply_in_order_and_keep_the_rest_of_the_grid():
    recipe = Recipe(override=(r"mlp\.:bits=8", r"down_proj$:group_size=32,range=mse:norm=2.4"), sym=False)
    grid = method_of(recipe, torch.float16).scheme("model.layers.0.mlp.down_proj").weight
    assert (grid.bits, grid.group, grid.sym, grid.range.norm) == (8, 32, False, 2.4)
    assert method_of(recipe, torch.float16).scheme("model.layers.0.self_attn.o_proj").weight.bits == 4


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({}, "int"),
        ({"bits": 3, "group_size": 64, "sym": False}, "int:bits=3:group=64:asym"),
        ({"bits": 8, "group_size": "tensor", "range": "mse:norm=2.4"}, "int:bits=8:group=tensor:range=[mse:norm=2.4]"),
        ({"group_size": "channel", "method": "awq,gptq"}, "int:group=channel:sym"),
        ({"quality": "best", "bits": 2}, "int:bits=2"),
        ({"override": (r"down_proj$:bits=8,group_size=32,range=minmax",), "method": "rtn"}, "int"),
    ],
)
def test_the_flags_are_short_for_weights(flags, weights):
    rest = {k: v for k, v in flags.items() if k not in ("bits", "group_size", "sym", "range")}
    short, long = (method_of(Recipe(**given), torch.float16) for given in (flags, rest | {"weights": weights}))
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        grids = [m.scheme(name).weight for m in (short, long)]
        assert grids[0] == grids[1] and grids[0].range == grids[1].range and grids[0].scale_dtype == torch.float16
    assert short.recipe.method == long.recipe.method
    again = Recipe(**yaml.safe_load(long.recipe.to_yaml()))  # what recipe.yaml says is all there is to say
    assert again.resolved() == long.recipe


@pytest.mark.parametrize("flag", [{"bits": 4}, {"group_size": 64}, {"sym": False}, {"range": "mse"}])
def test_weights_and_the_flags_that_are_short_for_them_are_refused_together(flag):
    name = next(iter(flag)).replace("_", "-")
    with pytest.raises(LlmqError, match=f"^--{name} means nothing here: --weights says what a weight becomes; say it"):
        Recipe(weights="int", **flag)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "int:bits=9"}, "option bits takes a whole number from 2 to 8, not '9'"),
        ({"weights": "int:group=128x64"}, "scales per group, channel or tensor, not blocks of 128 x 64"),
        (
            {"weights": "int:group=0"},
            "a number of columns, 'channel', 'tensor' or a block '128x128', not 0",
        ),
        ({"weights": "int:scale_dtype=float32"}, "int has no option 'scale_dtype'"),
        ({"weights": "int:bits"}, "int has no option 'bits'"),
        ({"weights": "int:asym:sym=true"}, "option sym is given twice"),
        ({"weights": "integer"}, "'integer' is none of llmq's grids"),
        ({"weights": "int:range=mxe"}, "'mxe' is none of llmq's ranges"),
        ({"weights": "int", "act_bits": 8}, "8-bit activations need 8-bit weights, not 4; say --weights int:bits=8"),
        ({"inputs": "int:bits=8"}, "8-bit activations need 8-bit weights"),
        ({"bits": 8, "inputs": "int:bits=8"}, "--inputs int:bits=8: .*scales per token .group=channel. or one"),
        ({"bits": 8, "inputs": "int:bits=8:group=tensor:asym"}, "static activation scales are symmetric"),
        (
            {"weights": "fp8", "inputs": "q4_k"},
            "--inputs q4_k: inputs lie on int, fp8, nvfp4, mxfp4 or mxfp8, not",
        ),
        ({"weights": "fp8", "inputs": "fp8:range=mse"}, "--inputs fp8:range=mse: a range means nothing where scales"),
        ({"weights": "fp8", "inputs": "fp8:group=128x128"}, "not blocks of 128 x 128"),
        ({"weights": "int", "override": ("a:levels=3",)}, "has no option 'levels'"),
        ({"weights": "int", "format": "gguf"}, "--weights means nothing here: GGUF's types fix bits"),
    ],
)
def test_what_weights_may_not_say_is_one_line(given, said):
    with pytest.raises(LlmqError, match=said) as e:
        method_of(Recipe(**given), torch.float16)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("weights", ["fp8", "fp8:group=128x128", "nvfp4", "mxfp4", "mxfp8"])
def test_small_floats_are_searched_for_and_solved_like_integers_and_written_as_compressed_tensors(weights):
    for quality in ("fast", "balanced", "best"):
        resolved, integers = (Recipe(quality=quality, **w).resolved() for w in ({"weights": weights}, {}))
        assert resolved.method == integers.method and resolved.format == "compressed-tensors"
        assert resolved.weights == f"{weights}:range=[mse]" and resolved.resolved() == resolved
    with_inputs = Recipe(weights=weights, inputs="fp8").resolved()
    assert with_inputs.method == Recipe().resolved().method, "no migration: the error of a float is relative to it"
    for flag in ({"bits": 4}, {"group_size": 32}, {"range": "mse"}):
        with pytest.raises(LlmqError, match="--weights says what a weight becomes"):
            Recipe(weights=weights, **flag)


@pytest.mark.parametrize(
    ("flags", "inputs"),
    [
        ({}, "int:bits=8:group=channel"),
        ({"act_sym": False}, "int:bits=8:group=channel:asym"),
        ({"act": "tensor"}, "int:bits=8:group=tensor:range=minmax"),
        ({"act": "tensor", "act_range": "percentile:p=99.9"}, "int:bits=8:group=tensor:range=[percentile:p=99.9]"),
    ],
)
def test_the_flags_of_activations_are_short_for_inputs(flags, inputs):
    short, long = (Recipe(bits=8, **given) for given in ({"act_bits": 8} | flags, {"inputs": inputs}))
    resolved = [r.resolved() for r in (short, long)]
    assert len({(r.method, r.group_size, r.format) for r in resolved}) == 1
    name = "model.layers.0.mlp.down_proj"
    a, b = (method_of(r, torch.float16).scheme(name) for r in (short, long))
    assert a == b and a.activation.range == b.activation.range and b.weight.restricted
    with pytest.raises(LlmqError, match="--act-bits means nothing here: --inputs says what an input becomes"):
        Recipe(bits=8, act_bits=8, inputs=inputs)


def test_a_budget_chooses_bits_and_no_override_beside_it():
    with pytest.raises(LlmqError, match="'down_proj:bits=8': --target-bpw chooses the bits of every linear"):
        Recipe(target_bpw=4.5, override=("down_proj:bits=8",))
    assert Recipe(target_bpw=4.5, override=("down_proj:sym=false",)).target_bpw == 4.5


def test_no_key_of_an_override_in_a_file_names_code(tmp_path):
    (tmp_path / "r.yaml").write_text("override: ['down_proj:spread=tp.exit']\n")
    with pytest.raises(LlmqError, match="override names code outside llmq .tp.exit"):
        Recipe.load(tmp_path / "r.yaml", {})
    (tmp_path / "r.yaml").write_text("override: ['down_proj:range=mse:norm=2.5', 'up_proj:bits=8']\n")
    assert len(Recipe.load(tmp_path / "r.yaml", {}).override) == 2
