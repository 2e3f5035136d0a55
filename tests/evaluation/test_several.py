"""Several models are measured as each alone is, on a baseline that is run once; categories part the same tokens."""

import dataclasses
import json
import math

import pytest

import llmq
from llmq.evaluation import scores, several, shown
from llmq.types import LlmqError

QUICK = {"window": 48, "windows": 4, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def folder(tmp_path, prose):
    """Categories: a file, code, rows of chat, a sub-folder of documents."""
    texts = tmp_path / "texts"
    (texts / "long").mkdir(parents=True)
    (texts / "english.txt").write_text(prose(200))
    (texts / "code.py").write_text("for x in range(3):\n    print(x)\n" * 40)
    rows = [{"messages": [{"role": "user", "content": prose(60, seed=i)}]} for i in range(4)]
    (texts / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (texts / "long/a.md").write_text(prose(100, seed=2))
    (texts / "long/b.md").write_text(prose(100, seed=3))
    (texts / ".hidden").write_bytes(b"\xff")
    return texts


@pytest.mark.parametrize("stream", [False, True])
def test_each_has_the_figures_that_it_has_alone(tiny_checkpoint, folder, stream, monkeypatch):
    src, others = tiny_checkpoint(seed=0), [tiny_checkpoint(seed=1), tiny_checkpoint(seed=2)]
    options = QUICK | {"baseline": src, "text": folder / "english.txt", "stream": stream}
    alone = [llmq.evaluate(m, **options).to_json() | {"seconds": 0} for m in others]
    runs = []
    each = scores.Predictor.each
    monkeypatch.setattr(scores.Predictor, "each", lambda self, w: runs.append(self.name) or each(self, w))
    found = llmq.evaluate_all(others, **options)
    assert [e.to_json() | {"seconds": 0} for e in found.evaluations.values()] == alone
    assert runs == ([] if stream else ["the model", "the baseline", "the model"])
    (pair,) = found.pairs
    assert pair in found.neighbours and [pair.a, pair.b] == found.ranked
    kl = {name: e.kl_mean for name, e in found.evaluations.items()}
    assert pair.difference == pytest.approx(kl[pair.a] - kl[pair.b], rel=1e-6) and pair.difference < 0 < pair.half
    assert json.loads(json.dumps(found.to_json()))["pairs"][0]["interval"][0] == pytest.approx(
        pair.difference - pair.half
    )


def test_a_model_does_not_differ_from_itself(tiny_checkpoint, folder, tmp_path):
    a = tiny_checkpoint(seed=1)
    (tmp_path / "same").symlink_to(a)
    found = llmq.evaluate_all([a, tmp_path / "same"], text=folder / "english.txt", **QUICK)
    assert found.pairs[0].of == several.NLL and "no difference seen" in found.pairs[0].said


def test_categories(tiny_checkpoint, folder):
    src, model = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1)
    found = llmq.evaluate_all([model], baseline=src, text=folder, **QUICK)
    (e,) = found.evaluations.values()
    assert set(e.categories) == {"english", "code", "chat", "long"}
    alone = llmq.evaluate(model, baseline=src, text=folder / "english.txt", **QUICK)
    for key, value in e.categories["english"].items():
        assert getattr(alone, key) == value
    assert sum(c["tokens"] for c in e.categories.values()) == e.tokens
    whole = sum(c["kl_mean"] * c["tokens"] for c in e.categories.values()) / e.tokens
    assert whole == pytest.approx(e.kl_mean)
    worst = max(e.categories, key=lambda c: e.categories[c]["kl_mean"])
    assert f"most is lost in {worst}" in " ".join(shown.lines(found))
    assert shown.categories("m", e).columns[0]._cells[0].plain == worst
    assert shown.categories("m", dataclasses.replace(e, kl_mean=None)).row_count == 4


def test_what_cannot_be_scored_is_refused(tiny_checkpoint, folder, tmp_path):
    model = tiny_checkpoint()
    (tmp_path / "none").mkdir()
    with pytest.raises(LlmqError, match="holds no text"):
        llmq.evaluate(model, text=tmp_path / "none", **QUICK)
    (folder / "short.txt").write_text("One.")
    with pytest.raises(LlmqError, match=r"^short: the text has \d+ tokens, one window needs 48"):
        llmq.evaluate(model, text=folder, **QUICK)
    with pytest.raises(LlmqError, match="cannot be paired"):
        llmq.evaluate_all([model, tiny_checkpoint(bos=False)], text=folder / "english.txt", **QUICK)


def test_a_gguf_file_is_scored_by_its_weights(tiny_checkpoint, folder, tmp_path):
    src = tiny_checkpoint(hidden_size=256, intermediate_size=256)
    out = tmp_path / "m.gguf"
    llmq.quantize(src, out, type="Q8_0", quality="fast", device="cpu", warn=str)
    found = llmq.evaluate(out, baseline=src, text=folder / "english.txt", keep=True, **QUICK)
    assert 0 < found.kl_mean < 5e-3 and math.isfinite(found.perplexity)
    assert (tmp_path / "m.evaluation.json").is_file()
