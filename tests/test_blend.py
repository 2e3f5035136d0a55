from __future__ import annotations

import pytest
import torch

from llmq import blend
from llmq.calibration import Writer, tokens
from llmq.recipe import Recipe
from llmq.types import LlmqError


def counts(calib, samples):
    return [p.samples for p in blend.dealt(calib, samples)]


@pytest.mark.parametrize(
    ("calib", "samples", "found"),
    [
        ("a.txt", 7, [7]),
        (None, 7, []),
        (["a.txt", "b.txt"], 8, [4, 4]),
        (["a.txt", "b.txt", "self"], 8, [3, 3, 2]),  # two of three remainders, the earlier sources'
        (["a.txt:weight=3", "b.txt", "self:weight=1"], 8, [5, 2, 1]),  # 4.8, 1.6, 1.6: the largest remainder first
        (["a:b/c.txt:weight=.5", "org/name:config:split:weight=1.5"], 16, [4, 12]),
    ],
)
def test_samples_are_dealt_by_largest_remainder(calib, samples, found):
    assert counts(calib, samples) == found


def test_shares_are_within_a_sample_of_the_weights():
    for samples in range(12, 90, 7):
        got = counts(["a:weight=5", "b:weight=1", "c:weight=2.5"], samples)
        assert sum(got) == samples
        assert all(abs(n - samples * w / 8.5) < 1 for n, w in zip(got, (5, 1, 2.5), strict=True))


@pytest.mark.parametrize(
    ("calib", "share", "found"),
    [
        ("a.txt", 0.25, {"a.txt": 24, "varied": 8}),
        (("a.txt:weight=3", "b.txt"), 0.5, {"a.txt": 12, "b.txt": 4, "varied": 16}),
        (("a.txt", "varied:weight=3"), 0.25, {"a.txt": 8, "varied": 24}),  # it is as the user has it
    ],
)
def test_varied_text_gets_its_share_beside_the_others(calib, share, found):
    assert {p.source: p.samples for p in blend.dealt(blend.sharing(calib, share), 32)} == found


def test_a_path_may_hold_any_character(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b*2.txt", "x:weight=3", "y:z@1"):
        (tmp_path / name).write_text("x")
        assert blend.parted(name) == {name: 1.0}
    assert blend.parted(["x:weight=3:weight=2", "a,b*2.txt:weight=4"]) == {"x:weight=3": 2.0, "a,b*2.txt": 4.0}
    assert list(blend.parted(["c:weight=2/d.txt", "n" * 5000])) == ["c:weight=2/d.txt", "n" * 5000]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "two", ""])
def test_a_weight_is_a_number_above_0(weight):
    with pytest.raises(LlmqError, match=r"--calib a.txt:weight=.*: a weight is a number above 0, as in a.txt:weight=2"):
        Recipe(calib=(f"a.txt:weight={weight}", "b.txt"))


def test_what_cannot_share_is_refused_before_any_work():
    with pytest.raises(LlmqError, match="names a.txt twice"):
        Recipe(calib=["a.txt", "a.txt:weight=2"])
    with pytest.raises(LlmqError, match="--calib b.txt would give none of 4 samples"):
        Recipe(calib=["a.txt:weight=9", "b.txt"], samples=4)


def test_a_list_of_one_is_that_one():
    assert Recipe(calib=["a.txt"]) == Recipe(calib="a.txt")
    several = Recipe(calib=["a.txt", "self:weight=2"])
    assert several.calib == ("a.txt", "self:weight=2")
    assert several.to_json()["calib"] == ["a.txt", "self:weight=2"]


def test_several_in_a_recipe_file(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("calib:\n- a.txt:weight=3\n- self\n")
    read = Recipe.load(file, {})
    assert blend.parted(read.calib) == {"a.txt": 3.0, "self": 1.0}
    file.write_text(read.to_yaml())
    assert Recipe.load(file, {}) == read


def test_any_part_of_the_rows_is_a_blend_too():
    order = blend.in_turns([6, 3])
    assert sorted(order) == list(range(9))
    for third in (order[:3], order[3:6], order[6:]):
        assert sum(row < 6 for row in third) == 2
    assert blend.in_turns([5]) == [0, 1, 2, 3, 4]


@pytest.fixture
def texts(tmp_path, prose):
    (tmp_path / "a.txt").write_text(prose(400))
    (tmp_path / "b.txt").write_text("a wholly different text. " * 300)
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def test_the_rows_are_those_that_each_source_gives_alone(texts, tokenizer_bos, tiny_llama):
    calib = [f"{texts[0]}:weight=2", texts[1], "self"]
    got = tokens(calib, tokenizer_bos, 8, 32, seed=3, writer=Writer(tiny_llama))
    alone = [
        tokens(source, tokenizer_bos, n, 32, seed=3, writer=Writer(tiny_llama))
        for source, n in ((texts[0], 4), (texts[1], 2), ("self", 2))
    ]
    assert torch.equal(got, torch.cat(alone)[[0, 4, 6, 1, 2, 5, 7, 3]])
    assert torch.equal(got, tokens(calib, tokenizer_bos, 8, 32, seed=3, writer=Writer(tiny_llama)))
    assert not torch.equal(got[0], tokens(calib, tokenizer_bos, 8, 32, seed=4, writer=Writer(tiny_llama))[0])


def test_one_source_is_as_without_weights(texts, tokenizer_bos):
    plain = tokens(texts[0], tokenizer_bos, 8, 32, seed=3)
    assert torch.equal(plain, tokens([f"{texts[0]}:weight=2"], tokenizer_bos, 8, 32, seed=3))


def test_an_error_names_the_source_that_fails(tmp_path, texts, tokenizer_bos):
    (tmp_path / "short.txt").write_text("too short")
    for bad, why in ((str(tmp_path / "short.txt"), "holds"), ("no/such.txt", "no calibration text at")):
        with pytest.raises(LlmqError, match=rf"--calib {bad} \(4 of 8 samples\): .*{why}"):
            tokens([texts[0], bad], tokenizer_bos, 8, 32, seed=0)
    with pytest.raises(LlmqError, match=r"^no calibration text at no/such.txt"):
        tokens("no/such.txt", tokenizer_bos, 8, 32, seed=0)
