"""A checkpoint on several kinds of text: the figures that each kind has alone, and paired differences by kind."""

from __future__ import annotations

import argparse
import json
import math

import _kinds
import pytest
from _scored import Scores, add_options

import llmq
from llmq.evaluation.paired import Mean


@pytest.fixture
def texts(tmp_path, prose):
    """Two lengths of window, four kinds, and a home text."""
    folder = tmp_path / "texts"
    for name, window, text in (
        ("prose.txt", 48, prose(300)),
        ("code.txt", 48, "for x in range(3):\n    print(x)\n" * 60),
        ("long.txt", 96, prose(600, seed=2)),
        ("prose.txt", 96, prose(400, seed=5)),
    ):
        (folder / f"window-{window}").mkdir(parents=True, exist_ok=True)
        (folder / f"window-{window}" / name).write_text(text)
    (folder / "SOURCES.md").write_text("no text to score")
    (tmp_path / "home.txt").write_text(prose(2000, seed=4))
    return folder


@pytest.fixture
def scored(tmp_path, texts, tiny_checkpoint):
    """`scored(seed)`: a row of a model, and where its tokens lie."""
    base = tiny_checkpoint(seed=0)
    (tmp_path / "states").mkdir()
    of = _kinds.groups(texts, tmp_path / "home.txt")
    scorer = _kinds.Scorer(base, of, 0.5, "llama.cpp", tmp_path / "states")

    def row(seed, name):
        kinds = scorer.score(tiny_checkpoint(seed=seed), tmp_path / name)
        return json.loads(json.dumps({"kinds": kinds, "tokens": name}))

    return row


def test_kinds_are_scored_in_their_windows_and_compared_as_eval_compares(tmp_path, texts, scored, tiny_checkpoint):
    a, b = scored(1, "a"), scored(2, "b")
    assert list(a["kinds"]) == ["home", "code", "prose", "long", "prose 96"]
    assert [f["window"] for f in a["kinds"].values()] == [512, 48, 48, 96, 96]
    assert a["kinds"]["home"]["tokens"] == 2 * 255  # two windows of 512 hold 0.5 x 2048, half of it scored
    how = {"baseline": tiny_checkpoint(seed=0), "convention": "llama.cpp", "dtype": "float32"}
    models = [tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)]
    found = llmq.evaluate_all(models, text=texts / "window-96/long.txt", window=96, windows=11, **how)
    alone = found.evaluations[str(models[0])]
    for key in _kinds.KEPT:
        assert a["kinds"]["long"][key] == pytest.approx(getattr(alone, key))
    by = _kinds.differences(a, b, lambda r: tmp_path / r["tokens"])
    assert list(by) == list(a["kinds"])
    (pair,) = found.pairs
    sign = 1 if pair.a == str(models[0]) else -1
    assert by["long"].mean == pytest.approx(sign * pair.difference, rel=1e-4)
    assert by["long"].half == pytest.approx(pair.half, rel=1e-4)


def test_the_table_has_a_mean_without_home_and_compares_on_the_same_tokens_alone(tmp_path, scored):
    a, b = scored(1, "a"), scored(2, "b")
    b["kinds"]["code"]["ids"] = "others"
    rows = {"rtn": a, "gptq": b}
    lines = _kinds.table(rows, lambda r: tmp_path / r["tokens"]).splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["method", "home", "code", "prose", "long", "prose 96", "mean but home"]
    assert [c[0] for c in cells[2:]] == ["rtn", "gptq", "… less `rtn`"]
    mean = sum(a["kinds"][k]["kl_mean"] for k in ("code", "prose", "long", "prose 96")) / 4
    assert cells[2][-1] == f"{mean:.4f}"
    figures = a["kinds"]["prose"]
    assert cells[2][3] == f"{figures['kl_mean']:.4f} / {figures['kl_p99']:.2f} / {100 * figures['top1']:.1f} %"
    assert cells[4][2] == "" and cells[4][-1] == "" and " ± " in cells[4][3]
    against = _kinds.table(rows, lambda r: tmp_path / r["tokens"], "gptq").splitlines()
    assert [line.split("|")[1].strip() for line in against[2:]] == ["rtn", "… less `gptq`", "gptq"]


def test_intervals_of_independent_kinds_add_up_in_squares():
    values = {"home": Mean(9.0, 9.0), "a": Mean(1.0, 3.0), "b": Mean(2.0, 4.0)}
    assert _kinds.travelled(values, list(values)) == Mean(1.5, 2.5)
    assert _kinds.travelled(values, ["home"]) is None
    assert _kinds.travelled(values, ["home", "a", "c"]) is None
    assert math.isinf(_kinds.travelled({"a": Mean(1.0, math.inf)}, ["a"]).half)


def test_a_folder_without_windows_is_one_group(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert _kinds.groups(tmp_path) == [_kinds.Group(tmp_path)]


@pytest.fixture
def told(tmp_path, texts, tiny_checkpoint):
    """`told(words)`: the scores of a bench that was told these options beside a model and where its rows go."""
    parser = argparse.ArgumentParser()
    add_options(parser)

    def scores(*words):
        args = parser.parse_args(["--out", str(tmp_path / "bench"), *map(str, words)])
        args.model = tiny_checkpoint(seed=0)
        return Scores(args, "peers", tmp_path)

    return scores


def test_a_bench_keeps_its_rows_by_what_it_scores(tmp_path, texts, told, tiny_checkpoint, capsys):
    assert told("--text", tmp_path / "home.txt").rows.file.name == "peers.json"
    with pytest.raises(SystemExit, match="give --text FOLDER"):
        told("--text", tmp_path / "home.txt", "--home", tmp_path / "home.txt")
    several = told("--text", texts / "window-48", "--convention", "llama.cpp", "--windows", 1)
    assert several.floats() == ""
    several.rows.fill(["a 4"], lambda name: several.of(name, tiny_checkpoint(seed=1)), several.show)
    assert several.rows.file.name == "kinds.json" and (tmp_path / "bench/tokens/a-4.safetensors").exists()
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()] == ["method", "---", "a 4"]
    assert [part.split(" on ")[1] for part in several.floats().split(", ")] == ["code", "prose"]
