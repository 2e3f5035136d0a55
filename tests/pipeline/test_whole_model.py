"""Finishers lower the KL to the float model, keep every code, and never make it worse."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from llmq.algorithms.distill import Distill
from llmq.loading import load
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.steps import ModelView
from llmq.types import LlmqError


@pytest.fixture
def text(tmp_path, prose):
    file = tmp_path / "calibration.txt"
    file.write_text(prose(4000))
    return str(file)


def made(folder, out, text, method, **options):
    base = {"bits": 2, "group_size": 32, "samples": 16, "seq_len": 64, "calib": text, "dtype": "float32"}
    return quantize(prepare(str(folder), Recipe(**(base | options), method=method), "cpu"), out)


@pytest.mark.parametrize(
    ("fmt", "method", "options", "lr", "tied"),
    [
        ("gptq", "gptq", {}, 0.01, True),
        ("gptq", "gptq:desc_act=true", {}, 0.01, False),
        ("compressed-tensors", "gptq", {"bits": 3}, 0.003, False),
        ("awq", "rtn", {"bits": 4, "sym": False}, 0.002, False),
    ],
)
def test_distill_lowers_the_divergence_and_keeps_the_codes(
    tiny_checkpoint, tmp_path, text, prose, tokenizer_bos, fmt, method, options, lr, tied
):
    folder = tiny_checkpoint(dtype=torch.bfloat16, tie_word_embeddings=tied)
    plain, tuned = tmp_path / "plain", tmp_path / "tuned"
    made(folder, plain, text, method, format=fmt, **options)
    summary = made(folder, tuned, text, f"{method},distill:epochs=3:lr={lr}:norm_lr={lr}", format=fmt, **options)
    (line,) = summary["finished"].values()
    assert line["held_kl"] < 0.97 * line["held_kl_before"]
    assert json.loads((tuned / "quantization.json").read_text())["finished"] == summary["finished"]

    before, after = (load_file(f / "model.safetensors") for f in (plain, tuned))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("scale" in n or "norm" in n for n in moved)
    assert any("scale" in n for n in moved) and any("norm" in n for n in moved)

    ids = torch.tensor([tokenizer_bos(prose(300, seed=9))["input_ids"][:400]])  # unseen
    with torch.no_grad():
        p, *q = (load(f, dtype=torch.float32)(ids).logits.log_softmax(-1) for f in (folder, plain, tuned))
    kl = [(p.exp() * (p - log_q)).sum(-1).mean() for log_q in q]
    assert kl[1] < kl[0]


def test_steps_that_are_too_large_leave_the_start(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint()
    made(folder, tmp_path / "plain", text, "rtn")
    summary = made(folder, tmp_path / "tuned", text, "rtn,distill:epochs=1:lr=50:norm_lr=50")
    (line,) = summary["finished"].values()
    assert line["held_kl"] == line["held_kl_before"]
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "tuned"))
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_best_epoch_is_kept():
    """A loss whose held-out part rises after the first epochs."""
    scale, norm = (torch.zeros(1, requires_grad=True) for _ in range(2))

    def loss(row):
        aim = 0.3 if row >= 14 else 5.0
        return (scale - aim).square().sum() + 0 * norm.sum()

    line = Distill(epochs=6, batch=14, lr=0.3).finish(ModelView([scale], [norm], loss, 16, 0))
    assert line["held_kl"] < line["held_kl_before"]
    assert (scale - 0.3).square().item() == pytest.approx(line["held_kl"])


def test_it_goes_on_from_any_epoch_to_the_same_values():
    def loss(row):
        return (scale * (row + 1) - 0.3).square().sum() + (norm - row).square().sum() + 0 * unused.sum()

    def tuned(kept=None):
        for p in (scale, norm, unused):
            p.data.zero_()
            p.grad = None
        view = ModelView([scale, unused], [norm], loss, 16, 0, lambda *state: states.append(copy.deepcopy(state)), kept)
        line = Distill(epochs=4, batch=3, lr=0.1).finish(view)
        return line, [p.tolist() for p in (scale, norm, unused)]

    states = []
    scale, norm, unused = (torch.zeros(2, requires_grad=True) for _ in range(3))
    want, every = tuned(), list(states)
    assert len(every) == 4
    for tensors, facts in every:
        states.clear()
        assert tuned((tensors, json.loads(json.dumps(facts)))) == want
        assert len(states) == 4 - len(facts["judged"]) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn,distill", "bits": 8, "act_bits": 8}, "float activations only"),
        ({"method": "rtn,distill", "format": "gguf"}, "integers and small floats only"),
        ({"method": "distill,rtn"}, "is a solver and cannot follow a finisher"),
    ],
)
def test_what_it_cannot_do(tiny_checkpoint, options, message):
    with pytest.raises(LlmqError, match=message):
        prepare(str(tiny_checkpoint()), Recipe(**options), "cpu")


def test_one_sequence_is_not_enough(tiny_checkpoint, tmp_path, text):
    with pytest.raises(LlmqError, match="at least 2 --samples"):
        made(tiny_checkpoint(), tmp_path / "out", text, "rtn,distill", samples=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="at least 1"):
        Distill(epochs=0)


def test_a_model_beyond_memory_is_refused_before_any_work(tiny_checkpoint, tmp_path, text, monkeypatch):
    folder = tiny_checkpoint()
    weights = sum(p.numel() for p in load(folder).parameters())
    need = 6 * weights + 16 * 64 * 64 * 4
    monkeypatch.setattr("llmq.pipeline.whole_model.free_memory", lambda device: 0.9 * need)
    with pytest.raises(LlmqError, match=r"distill needs the whole model in memory.*--samples"):
        made(folder, tmp_path / "out", text, "rtn,distill")
    assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr("llmq.pipeline.whole_model.free_memory", lambda device: 1.1 * need)
    made(folder, tmp_path / "out", text, "rtn,distill:epochs=1")
