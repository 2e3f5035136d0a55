"""One set of options: the command line's, a recipe's and Python's agree, and give the same files and the same lines."""

import dataclasses
import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from typer.testing import CliRunner

import llmq
from llmq import api, cli
from llmq.integrations.transformers import unregister
from llmq.recipe import KINDS, Recipe

USAGE = (Path(__file__).parent.parent / "docs/usage.md").read_text()
SMALL = {"group_size": "32", "samples": 8, "seq_len": 32, "seed": 1, "skip": ["o_proj"], "sym": False}


def parameters(function):
    return dict(inspect.signature(function, eval_str=True).parameters)


def types_of(kind):
    """Return the plain types that an annotation admits: without bounds, words and what is in a list."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {type(a) for a in args}
    if origin is Annotated:
        return types_of(args[0])
    if origin in (Union, UnionType):
        return set().union(*map(types_of, args)) - {NoneType}
    return {list} if origin in (tuple, list) else {kind}


def test_an_option_of_the_recipe_is_one_of_the_command_line_and_of_python():
    asked = {name.rstrip("_"): p for name, p in parameters(cli.quantize).items()}
    assert asked.keys() - {"log_json"} == {*api.OF_THE_RUN, *KINDS}
    for field in dataclasses.fields(Recipe):
        text_alone = {"group_size": {int}, "embeddings": {int}, "calib": {str}}.get(field.name, set())  # or given once
        assert types_of(asked[field.name].annotation) == types_of(KINDS[field.name]) - text_alone, field.name
        assert asked[field.name].default is None and field.default in (None, ()), field.name


def test_what_the_command_line_says_of_a_default_is_the_default():
    default = {f.name: f.metadata.get("default") for f in dataclasses.fields(Recipe)}
    default |= {"quality": "balanced", "group_size": Recipe().resolved().group_size}
    default |= {name: "sym" for name in ("sym", "act_sym") if default[name] is True}
    said = {n.rstrip("_"): p.annotation.__metadata__[0].help for n, p in parameters(cli.quantize).items()}
    shown = {name: m[1] for name, line in said.items() if (m := re.search(r"\[([\w,]+)\]$", line or ""))}
    assert len(shown) > 9 and shown == {name: str(default[name]) for name in shown}
    assert Recipe(quality="balanced").resolved() == Recipe().resolved()


OF_TASKS = {"tasks", "limit", "task_path"}  # options of another function, `evaluate_tasks`


@pytest.mark.parametrize(
    ("command", "function", "of_the_terminal", "of_python"),
    [
        (cli.quantize, llmq.quantize, {"log_json"}, {"warn", "progress", "options"}),
        (cli.dequantize, llmq.dequantize, set(), {"warn", "progress"}),
        (cli.evaluate, api.evaluate_all, {"json_file", "log_json", "overwrite", *OF_TASKS}, {"progress", "held"}),
    ],
)
def test_the_other_options_are_the_same(command, function, of_the_terminal, of_python):
    asked, taken = parameters(command), parameters(function)
    alike = taken.keys() - of_python
    assert alike == {name for name in asked if name.rstrip("_") not in KINDS or name in taken} - of_the_terminal
    for name in alike - {"models"}:  # a list here, any sequence there
        assert types_of(asked[name].annotation) <= types_of(taken[name].annotation), name
        said = re.search(r"\[(\w+)\]$", asked[name].annotation.__metadata__[0].help or "")
        assert (said[1] if said else asked[name].default) == taken[name].default, name


def flags(options):
    for name, value in options.items():
        dashed = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield dashed if value else {"--sym": "--asym"}[dashed]
        else:
            for v in value if isinstance(value, list) else [value]:
                yield from (dashed, str(v))


def test_the_command_line_a_recipe_and_python_write_the_same_files(tiny_checkpoint, tmp_path, prose):
    src, out, text, file = tiny_checkpoint(), tmp_path / "out", tmp_path / "t.txt", tmp_path / "r.yaml"
    text.write_text(prose(2000))
    file.write_text(yaml.safe_dump(SMALL))
    command = ["quantize", str(src), str(out), "--calib", str(text), "--overwrite"]
    written, steps = [], []

    def keep():
        written.append({p.name: p.read_bytes() for p in out.iterdir()})

    for more in (flags(SMALL), ["--recipe", str(file)]):
        done = CliRunner().invoke(cli.app, [*command, *more])
        assert done.exit_code == 0, done.exception
        keep()
    warned = []
    record = llmq.quantize(
        src, out, calib=text, overwrite=True, warn=warned.append, progress=lambda *step: steps.append(step), **SMALL
    )
    keep()
    assert len(written) == 3 and written[0] == written[1] == written[2]
    assert steps[-1] == (2, 2, "verifying") and warned == record["warnings"]
    assert record["recipe"]["seed"] == 1 and len(record["linears"]) == 12


@pytest.mark.parametrize(
    "options", [{"bits": 9}, {"method": "gtpq"}, {"group_size": 48}, {"act": "token"}, {"skip": "("}]
)
def test_the_command_line_and_python_refuse_with_the_same_line(options, tiny_checkpoint, tmp_path):
    src, out = tiny_checkpoint(), tmp_path / "out"
    done = CliRunner().invoke(cli.app, ["quantize", str(src), str(out), *flags(options)])
    with pytest.raises(llmq.LlmqError) as e:
        llmq.quantize(src, out, **options)
    assert isinstance(done.exception, llmq.LlmqError) and str(done.exception) == str(e.value)
    assert not out.exists()


def test_an_option_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(
        llmq.LlmqError, match=r"no option 'bitz' \(options: src, out, recipe, .*, bits, group_size, .*\)"
    ):
        llmq.quantize(tmp_path, tmp_path / "out", bitz=4)


def test_none_is_an_option_not_given_and_a_gguf_file_its_format(tiny_checkpoint, tmp_path):
    record = llmq.quantize(tiny_checkpoint(), tmp_path / "m.gguf", type="Q8_0", method="rtn", bits=None)
    assert (tmp_path / "m.gguf").is_file() and record["recipe"]["format"] == "gguf"


def test_the_example_of_the_docs_runs(tiny_checkpoint, tmp_path, prose, monkeypatch, capsys):
    example = re.search(r"## From Python\n\n```python\n(.*?)```", USAGE, re.DOTALL)[1]
    tiny_checkpoint(max_position_embeddings=2048).rename(tmp_path / "my-llama")
    (tmp_path / "text.txt").write_text(prose(4000))
    (tmp_path / "held-out.txt").write_text(prose(1500, seed=1))
    monkeypatch.chdir(tmp_path)
    try:
        exec(example, {})  # noqa: S102, ours
    finally:
        unregister()
    bits, perplexity, kl, top1 = map(float, capsys.readouterr().out.split())
    assert 4 < bits < 5 and perplexity > 1 and kl > 0 and 0 < top1 < 1
