"""Tasks of lm-eval on a local task: the harness' own figures, item by item against the baseline."""

import json

import pytest
import torch
from typer.testing import CliRunner

import llmq
from llmq.cli import app
from llmq.evaluation import kept, tasks
from llmq.evaluation.tasks import _items, _task
from llmq.types import LlmqError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path, prose):
    place = tmp_path / "tasks"
    place.mkdir()
    for n, name in enumerate(("tiny_alone", "tiny_words", "tiny_more")):
        rows = [
            {"question": prose(8, seed=i + n)[:-2], "choices": [" the", " school"], "answer": i % 2} for i in range(6)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (place / f"{name}.yaml").write_text(TASK.format(name=name, file=place / f"{name}.jsonl"))
    (place / "tiny_both.yaml").write_text(
        "group: tiny_both\ntask: [tiny_words, tiny_more]\naggregate_metric_list:\n  - metric: acc\n"
    )
    return place


def test_figures_are_the_items_of_the_harness(tiny_checkpoint, folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install -e '.[tasks]'), which takes half a minute")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    src, model, file = tiny_checkpoint(seed=0), tiny_checkpoint(seed=1), tmp_path / "t.json"
    args = ["eval", model, "--baseline", src, "--tasks", "tiny_alone,tiny_both", "--task-path", folder, "--keep"]
    args += ["--json", file, "--device", "cpu"]
    said = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False, env={"COLUMNS": "200"})
    assert said.exit_code == 0 and "tiny_both" in said.output
    found = json.loads(file.read_text())[str(model)]["tasks"]
    assert (found["tiny_alone"]["items"], found["tiny_both"]["items"]) == (6, 12)
    loaded = llmq.load(model, device="cpu"), llmq.load_tokenizer(model)
    right = 0
    for line in (folder / "tiny_alone.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = [_log_likelihood(*loaded, row["question"], c) for c in row["choices"]]
        right += int(torch.tensor(scores).argmax()) == row["answer"]
    assert found["tiny_alone"]["value"] == pytest.approx(right / 6)
    for of in found.values():
        assert of["difference"] == pytest.approx(of["value"] - of["baseline"])
    assert kept.read(model)[0]["tasks"].keys() == found.keys()
    with pytest.raises(LlmqError, match=r"lm-eval knows no task tiny_bothh \(near it: tiny_both"):
        llmq.evaluate_tasks([model], ["tiny_bothh"], task_path=folder)


def _log_likelihood(model, tokenizer, question, choice):
    ids, whole = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (question, question + choice))
    with torch.no_grad():
        log_p = model(whole).logits[0, :-1].log_softmax(-1)
    return sum(float(log_p[t - 1, whole[0, t]]) for t in range(ids.shape[1], whole.shape[1]))


def test_items_are_paired_in_their_order():
    samples = [
        {"doc_id": i, "filter": f, "metrics": ["acc"], "acc": float(i > 1)} for f in ("none", "x") for i in (2, 0, 1)
    ]
    of = _items([samples, samples[:3]], "t")
    assert of["acc"].tolist() == [0, 0, 1, 0, 0, 1]
    truth = {"acc": torch.tensor([1.0, 0, 1, 1, 1, 1])}
    found = _task("t", "m", of, truth)
    assert (found.value, found.baseline) == pytest.approx((2 / 6, 5 / 6)) and found.difference == pytest.approx(-0.5)
    assert found.p == pytest.approx(0.25) and "no difference seen in t acc (-0.50" in found.said
    with pytest.raises(LlmqError, match="no figure for each item"):
        _items([[{"doc_id": 0, "metrics": ["word_perplexity"], "word_perplexity": (1.0, 2)}]], "wikitext")


def test_what_is_missing_is_said(tiny_checkpoint, folder, monkeypatch):
    model = tiny_checkpoint()
    with pytest.raises(LlmqError, match="--limit and --task-path are for tasks"):
        CliRunner().invoke(app, ["eval", str(model), "--limit", "3"], catch_exceptions=False)
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"lm_eval, which is not installed: pip install 'llmq-quant\[tasks\]'"):
        tasks.run({}, None, ["arc_easy"])
