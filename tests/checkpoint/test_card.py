"""The model card: names and values from files are text in it, in the front matter as in the body; no path is."""

import pytest
import yaml
from huggingface_hub import ModelCard

from llmq.checkpoint import card
from llmq.checkpoint.hub_metadata import NO_CARD, SourceCard
from llmq.readers import table

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
READERS = table(("transformers", True, "with gptqmodel", "ran"), ("vLLM", True, "", "ran"), ("SGLang", None, "", ""))
EVALUATION = {
    "text": "/home/me/data/held-out.txt",
    "convention": "gptq",
    "baseline": "org/name",
    "perplexity": 12.3456,
    "baseline_perplexity": 11.9,
    "kl_mean": 0.0521,
    "kl_standard_error": 0.0012,
    "kl_p99": 0.7,
    "kl_p999": 1.9,
    "top1": 0.9123,
}


def made(name="tiny", said=None, source_card=NO_CARD, readers=READERS, record=None, **recipe):
    summary = (
        SUMMARY | (record or {}) | {"source": SUMMARY["source"] | {"name": name}, "recipe": SUMMARY["recipe"] | recipe}
    )
    return card.model_card(summary, "gptq", {"_name_or_path": said}, source_card, readers)


def parts(text):
    """Return what the Hub reads, by its own parser too, and the rest."""
    lines = text.split("\n")
    end = lines.index("---", 1)
    assert lines[0] == "---"
    about = yaml.safe_load("\n".join(lines[1:end]))
    parsed = ModelCard(text)
    assert parsed.data.to_dict() == about
    return about, "\n".join(lines[end + 1 :])


def test_what_the_hub_reads():
    said = SourceCard({"license": "llama3.2"}, ["en", "no"], ["chat", "gptq"], "text-generation")
    about, _ = parts(made("org/name", source_card=said))
    assert about == {
        "base_model": "org/name",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "llama3.2",
        "language": ["en", "no"],
        "tags": ["gptq", "4-bit", "llmq", "chat"],
    }


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_is_text(name):
    about, body = parts(made(name))
    assert about.keys() == {"library_name", "pipeline_tag", "tags"}
    heading = next(line for line in body.splitlines() if line)
    assert heading.startswith("# ") and heading.endswith(", 4-bit weights") and heading.isprintable()
    for mark in "[]<>|*`":
        assert heading.count(mark) == heading.count("\\" + mark)


@pytest.mark.parametrize("value", [*HOSTILE, "```\n# out\n```", ["a\n---", "b"]], ids=range(len(HOSTILE) + 2))
def test_a_value_of_the_recipe_is_text(value):
    _, body = parts(made(calib=value))
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
        ("folder", "/home/me/models--org--name/snapshots/0123", None),
        ("folder", "x\n---\nlicense: mit", None),
        ("folder", "a/b\n", None),
        ("folder", {"a": 1}, None),
        ("folder", "../up", None),
    ],
)
def test_the_base_model_is_a_repository_where_one_is_named_and_else_left_out(name, said, base):
    about, _ = parts(made(name, said))
    assert about.get("base_model") == base
    assert about.get("base_model_relation") == ("quantized" if base else None)


def test_no_path_of_the_machine_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/calib.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for calib in (tmp_path / "texts/calib.txt", "texts/calib.txt", "./texts/calib.txt", "~/calib.txt"):
        text = made("folder", f"{tmp_path}", calib=str(calib), imatrix=f"{tmp_path}/im.dat")
        assert str(tmp_path) not in text and "texts/" not in text and "~" not in text
        assert "calib: calib.txt" in text and "imatrix: im.dat" in text
        assert "OUT --recipe recipe.yaml --calib CALIB --imatrix IMATRIX\n" in text
    text = made(calib="org/set:config:split", method="gptq")
    assert "calib: org/set:config:split" in text and "OUT --recipe recipe.yaml\n" in text


def test_several_calibration_texts_are_named_with_their_shares(tmp_path):
    (tmp_path / "texts").mkdir()
    sources = [f"{tmp_path}/texts/prose.txt", "org/set", f"{tmp_path}/texts/code.txt"]
    gave = [{"source": s, "samples": n, "share": n / 8} for s, n in zip(sources, (4, 2, 2), strict=True)]
    calib = [f"{sources[0]}:weight=2", sources[1], sources[2]]
    text = made(record={"calibration": gave}, calib=calib)
    assert "calibrated on samples of 50% prose.txt, 25% org/set, 25% code.txt; per-linear" in text
    assert "- prose.txt:weight=2\n" in text and str(tmp_path) not in text
    assert "--recipe recipe.yaml --calib CALIB_1:weight=2 --calib org/set --calib CALIB_3\n" in text


def test_it_says_how_each_runtime_runs_it_that_takes_it():
    _, body = parts(made())
    assert '| transformers 5.24 | `AutoModelForCausalLM.from_pretrained("MODEL")` | with gptqmodel |' in body
    assert "| vLLM 0.32 | `vllm serve MODEL` |  |" in body and "`llmq chat MODEL`" in body
    assert "SGLang" not in body and "MLX" not in body  # what is not known is not promised


def test_the_library_is_one_that_takes_it():
    assert parts(made(readers=table(("MLX", True, "", "ran"))))[0]["library_name"] == "mlx"
    assert "library_name" not in parts(made(readers=table(("vLLM", True, "", "ran"))))[0]


def test_figures_take_their_place_and_are_replaced():
    before = made()
    assert "## Measured" not in before
    once = card.with_figures(before, [EVALUATION])
    row = "| held-out.txt, convention gptq | 12.346 | 11.900 | 0.0521 ± 0.0012 | 0.700 | 1.900 | 91.23% |"
    assert row in once and once.index(row) < once.index("## Run it")
    assert "against org/name." in once and "/home/me" not in once
    other = card.with_figures(once, [EVALUATION | {"text": "a.txt"}, {"text": "b.txt", "perplexity": 5.0}])
    assert row not in other and "| b.txt | 5.000 |  |  |  |  |  |" in other and other.count("## Measured") == 1
    assert card.with_figures(other, []) == before
    parts(other)


def test_a_card_of_the_users_own_gets_the_figures_at_its_end():
    once = card.with_figures("# Mine\n", [EVALUATION])
    assert once.startswith("# Mine\n\n<!--") and "| held-out.txt" in once
    assert card.with_figures(once, [EVALUATION]) == once


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
    text = card.model_card(SUMMARY | {"decoded": summary}, "gptq", {}, NO_CARD, READERS)
    assert "from tiny, whose weights were quantized already (FP8, blocks of 128 x 128) and decoded;" in text


def test_an_exported_checkpoint_has_the_base_of_the_one_it_was_made_of():
    export = {"llmq": "0", "from": "gptq", "to": "mlx", "outcomes": {"values exact": 7}}
    record = {"export": export, "source": SUMMARY["source"] | {"name": "me/int4"}, "size": SUMMARY["size"]}
    said = SourceCard({"license": "mit"}, (), ["gptq", "4-bit", "chat"], None, "org/name")
    about, body = parts(card.export_card(record, "mlx", {}, said, table(("MLX", True, "", "ran"))))
    assert about["base_model"] == "org/name" and about["base_model_relation"] == "quantized"
    assert about["tags"] == ["mlx", "llmq", "chat"] and about["library_name"] == "mlx"
    assert "mlx_lm.generate --model MODEL" in body
    about, _ = parts(card.export_card(record, "mlx", {}, NO_CARD, ()))
    assert about["base_model"] == "me/int4"


def test_a_decoded_checkpoint_is_no_quantization():
    decoded = {"quant_method": "gptq", "dtype": "bfloat16", "weights": {"GPTQ, 4 bits": 7}}
    record = {"llmq": "0", "source": SUMMARY["source"] | {"name": "me/int4"}, "decoded": decoded}
    said = SourceCard({"license": "mit"}, (), ["gptq", "4-bit", "chat"], None, "org/name")
    about, body = parts(card.float_card(record, {}, said))
    assert about["base_model"] == "me/int4" and "base_model_relation" not in about
    assert about["tags"] == ["llmq", "chat"] and "(7 GPTQ, 4 bits)" in body


@pytest.mark.parametrize("odd", [10**400, float("nan"), "x", [1]], ids=["huge", "nan", "text", "list"])
def test_figures_of_another_type_are_left_out(odd):
    found = card.with_figures("", [{"text": odd, "baseline": odd, "kl_mean": 0.5, "kl_p99": odd, "perplexity": odd}])
    assert "perplexity" not in found and "99 %" not in found and "0.5000" in found
