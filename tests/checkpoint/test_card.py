"""The model card: names and values from files are text in it, in the front matter as in the body."""

import pytest
import yaml

from llmq.checkpoint import card

HOSTILE = [
    "plain",
    "a: b\n---\nlicense: mit",
    "---\n# title",
    "[click](http://x) <img src=x> `code` | cell *bold*",
    "'\"\\ é  {a: b} [c] # d",
    "~",
    "1e3",
    "yes",
    "\x1b[2J\u202eevil",
]


SUMMARY = {
    "llmq": "0",
    "source": {"name": "tiny", "commit": None, "adapter": None},
    "recipe": {"bits": 4, "act_bits": None},
    "size": {"float_bytes": 2000, "bytes": 1000, "bits_per_weight": 4.5},
    "linears": {"model.layers.0.q_proj": {"weight_error": 0.01}},
}


def made(name="tiny", said=None, **recipe):
    source = SUMMARY["source"] | {"name": name}
    return card.model_card(SUMMARY | {"source": source, "recipe": SUMMARY["recipe"] | recipe}, "gptq", said)


def parts(text):
    """Return what the Hub reads, and the rest."""
    lines = text.split("\n")
    end = lines.index("---", 1)
    assert lines[0] == "---"
    return yaml.safe_load("\n".join(lines[1:end])), "\n".join(lines[end + 1 :])


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_is_text(name):
    about, body = parts(made(name))
    assert about == {"base_model": name, "library_name": "transformers", "tags": ["gptq", "4-bit", "llmq"]}
    heading = next(line for line in body.splitlines() if line)
    assert heading.startswith("# ") and heading.endswith(", 4-bit weights") and heading.isprintable()
    for mark in "[]<>|*`":
        assert heading.count(mark) == heading.count("\\" + mark)


@pytest.mark.parametrize("value", [*HOSTILE, "```\n# out\n```", ["a\n---", "b"]], ids=range(len(HOSTILE) + 2))
def test_a_value_of_the_recipe_is_text(value):
    about, body = parts(made(calib=value))
    assert about["base_model"] == "tiny"
    fence = body.rstrip().splitlines()[-1]
    assert set(fence) == {"`"}
    (block,) = [part for part in body.split(f"{fence}yaml\n")[1:]]
    assert yaml.safe_load(block.rpartition(f"\n{fence}")[0])["calib"] == value
    assert f"\n{fence}" not in block.rpartition(f"\n{fence}")[0]


@pytest.mark.parametrize(
    ("name", "said", "base"),
    [
        ("folder", "org/name", "org/name"),
        ("org/name", "another/one", "org/name"),
        ("folder", "/home/me/models--org--name/snapshots/0123", "folder"),
        ("folder", "x\n---\nlicense: mit", "folder"),
        ("folder", "a/b\n", "folder"),
        ("folder", {"a": 1}, "folder"),
        ("folder", "../up", "folder"),
    ],
)
def test_the_base_model_is_a_repository_where_one_is_named(name, said, base):
    assert parts(made(name, said))[0]["base_model"] == base


def test_the_card_names_the_commit_and_the_adapter():
    summary = {"name": "org/name", "commit": "c0ffee", "adapter": {"name": "me/lora", "commit": "beef"}}
    assert card._origin(summary) == "org/name at commit c0ffee with the adapter me/lora at commit beef"
    command = "llmq quantize org/name@c0ffee OUT --recipe recipe.yaml --adapter me/lora@beef"
    assert card._command(summary) == command
    assert card._command({"name": "a/b", "commit": "$(reboot)", "adapter": None}) == (
        "llmq quantize SRC OUT --recipe recipe.yaml"
    )


def test_a_source_that_was_quantized_is_told():
    assert "quantized already" not in made()
    summary = {"weights": {"FP8, blocks of 128 x 128": 7}}
    text = card.model_card(SUMMARY | {"decoded": summary}, "gptq", None)
    assert "from tiny, whose weights were quantized already (FP8, blocks of 128 x 128) and decoded;" in text
