"""Figures that are kept beside a checkpoint: one entry for what was measured, and no path of this machine."""

import json

import pytest

import llmq
from llmq.checkpoint.digest import holds
from llmq.evaluation import kept
from llmq.types import LlmqError
from llmq.verify import verify

QUICK = {"method": "rtn", "group_size": 32, "device": "cpu", "verify": False, "warn": str}


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "held-out.txt").write_text(prose(400))
    return tmp_path / "held-out.txt"


def test_figures_lie_beside_the_checkpoint_and_are_replaced_when_measured_again(tiny_checkpoint, tmp_path, text):
    src, out = tiny_checkpoint(), tmp_path / "out"
    llmq.quantize(src, out, **QUICK)
    options = {"baseline": src, "text": text, "window": 48, "device": "cpu"}
    assert kept.read(out) == []
    found = llmq.evaluate(out, windows=2, keep=True, **options)
    llmq.evaluate(out, windows=2, keep=True, **options)
    llmq.evaluate(out, windows=3, keep=True, **options)
    first, second = kept.read(out)
    assert (first["windows"], second["windows"]) == (2, 3)
    said = {"text": "held-out.txt", "baseline": src.name, "windows": 2}
    assert first | {"seconds": 0} == found.to_json() | said | {"seconds": 0}
    assert str(tmp_path) not in (out / "evaluation.json").read_text()
    assert str(src.parent) not in (out / "evaluation.json").read_text()
    assert holds(json.loads((out / "evaluation.json").read_text()))
    assert verify(out, src).passed
    card = (out / "README.md").read_text()
    assert f"{second['kl_mean']:.4f}"[:6] in card and "held-out.txt" in card
    (out / "README.md").write_text(card + "?")
    assert verify(out, src).failures == ["README.md is not as written: its checksum differs"]
    llmq.quantize(src, out, overwrite=True, **QUICK)
    assert kept.read(out) == []  # they were of the checkpoint that is gone


def test_figures_of_a_gguf_file_lie_beside_it(tmp_path):
    (tmp_path / "m.v1.gguf").write_bytes(b"GGUF")
    kept.keep(tmp_path / "m.v1.gguf", {"text": "a", "kl_mean": 0.1})
    assert kept.read(tmp_path / "m.v1.gguf") == [{"text": "a", "kl_mean": 0.1}]
    assert (tmp_path / "m.v1.evaluation.json").is_file()


def test_what_keeps_nothing_is_refused_before_any_work(tmp_path, tiny_checkpoint, text):
    with pytest.raises(LlmqError, match=r"org/name is no folder or .gguf file of this machine"):
        llmq.evaluate("org/name", text=text, keep=True)
    src = tiny_checkpoint()
    (src / "evaluation.json").write_text('{"evaluations": [1]}')
    with pytest.raises(LlmqError, match="must be objects"):
        kept.read(src)
    (src / "evaluation.json").write_text('{"evaluations": [{"tasks": 1}]}')
    with pytest.raises(LlmqError, match="and their tasks, must be objects"):
        kept.read(src)
    (src / "evaluation.json").write_text("{")
    with pytest.raises(LlmqError, match="not valid JSON"):
        llmq.evaluate(src, text=text, window=48, windows=1, keep=True, device="cpu")


def test_a_card_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "quantization.json").write_text('{"files": {"README.md": "5e1f"}}')
    with pytest.raises(LlmqError, match=r"cannot read .*README.md"):
        kept.keep(tmp_path, {"text": "a", "kl_mean": 0.1})
