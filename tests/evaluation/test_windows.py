from __future__ import annotations

from pathlib import Path

import pytest

from llmq.evaluation import windows
from llmq.evaluation.windows import articles, detokenise, find_convention, load_text
from llmq.types import LlmqError

ROOT = Path(__file__).parents[2]


def test_published_windows():
    def shape(name: str) -> tuple:
        c = find_convention(name)
        return c.window, c.half, c.bos, c.unit

    assert shape("gptq") == (2048, False, "text", "token")
    assert shape("llama.cpp") == (512, True, "window", "token")
    assert shape("lm-eval") == (0, False, "document", "word")


def test_detokenise():
    tokenised = (
        ' = Title = \n \n The player \'s 5 @-@ year , $ 1 @.@ 5 million ( or 1 @,@ 000 ) deal : " fine " . It is 5'
        " \xb0 C ; so ? \n = = Part = = \n The players ' [ old ] team . \n"
    )
    assert detokenise(tokenised) == (
        ' = Title =\n\nThe player\'s 5-year, $ 1.5 million (or 1,000) deal: "fine". It is 5\xb0C; so?\n'
        "== Part ==\nThe players' [old] team.\n"
    )


def test_data_sets_join_rows_by_convention(monkeypatch):
    rows = [" = One = \n", "", " text . \n"]
    monkeypatch.setattr(windows, "hub_rows", lambda place, remedy: ({"text": t} for t in rows))
    assert load_text(None, "wikitext2", find_convention("gptq")) == " = One = \n\n\n\n\n text . \n"
    assert load_text(None, "wikitext2", find_convention("llama.cpp")) == " = One = \n \n text . \n"
    assert load_text(None, "c4", find_convention("lm-eval")) == rows
    assert load_text(None, "c4", find_convention("gptq")) == " ".join(rows)


def test_data_set_out_of_reach(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(LlmqError, match=r"reach it on the Hub: give a text, as --text FILE$"):
        load_text(None, "wikitext2", find_convention("gptq"))


def test_sample_text_is_long_enough():
    """8 windows of 2048 must fit; byte-level BPE of 49152 entries takes 4.4 characters a token here."""
    sample = (ROOT / "eval/data/sample.txt").read_text(encoding="utf-8")
    assert len(articles(sample)) == 4
    assert len(sample) / 5.5 > 8 * 2048
    assert "CC BY-SA 3.0" in (ROOT / "eval/data/LICENSE.md").read_text(encoding="utf-8")


def test_errors(tmp_path):
    how = find_convention("gptq", 64)
    with pytest.raises(LlmqError, match=r"no convention 'ggml' \(there are: gptq, llama.cpp, lm-eval\)"):
        find_convention("ggml")
    with pytest.raises(LlmqError, match="too short"):
        find_convention("gptq", 2)
    with pytest.raises(LlmqError, match=r"cannot read .*none.txt"):
        load_text(tmp_path / "none.txt", None, how)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LlmqError, match=r"latin.txt as UTF-8"):
        load_text(tmp_path / "latin.txt", None, how)
    with pytest.raises(LlmqError, match=r"no evaluation set 'wiki'.*--text FILE"):
        load_text(None, "wiki", how)


def test_a_text_that_is_no_file_or_too_large_is_refused(tmp_path, monkeypatch):
    how = find_convention("gptq")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(LlmqError, match="zero.txt is no regular file"):
        load_text(tmp_path / "zero.txt", None, how)
    monkeypatch.setattr(windows, "TEXT_BYTES", 3)
    (tmp_path / "long.txt").write_text("four")
    with pytest.raises(LlmqError, match="long.txt is larger than .*score a part"):
        load_text(tmp_path / "long.txt", None, how)
