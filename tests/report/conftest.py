"""Checkpoints to report on: one with all that a run records, a GGUF file, one of a peer."""

import json

import pytest

import llmq
from llmq.checkpoint.place import beside

SMALL = {"group_size": 32, "samples": 4, "seq_len": 32, "dtype": "float32", "device": "cpu"}
FIGURES = {
    "text": "held-out.txt", "convention": "gptq", "perplexity": 12.5, "baseline_perplexity": 12.0, "kl_mean": 0.02,
    "kl_p99": 0.3, "top1": 0.9, "kl_by_position": [[0, 0.03], [64, 0.01]],
    "classes": {"word": {"tokens": 90, "top1": 0.92, "kl_mean": 0.01}, "digit": {"tokens": 9, "top1": 0.7}},
    "categories": {"code.txt": {"tokens": 50, "top1": 0.8, "kl_mean": 0.04, "kl_interval": [0.03, 0.05]}},
}  # fmt: skip


@pytest.fixture(scope="session")
def evaluated():
    """`evaluated(out, **changes)`: put figures beside a checkpoint, as `llmq eval --keep` does; returns it."""

    def put(out, **changes):
        beside(out, "evaluation.json").write_text(json.dumps({"evaluations": [FIGURES | changes]}))
        return out

    return put


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_llama, tokenizer_bos, evaluated):
    """`made.src`, `made.int4` (awq,gptq, with its report), `made.gguf` (Q4_0), all of one tiny model."""

    class Made:
        folder = tmp_path_factory.mktemp("report")
        src, int4, gguf = folder / "src", folder / "int4", folder / "q4.gguf"

    tiny_llama().save_pretrained(Made.src)
    tokenizer_bos.save_pretrained(Made.src)
    (Made.folder / "t.txt").write_text("the first of many words and some other ones " * 300)
    calib = {"calib": Made.folder / "t.txt", "warn": str, **SMALL}
    Made.record = llmq.quantize(Made.src, Made.int4, method="awq,gptq", format="gptq", report=True, **calib)
    llmq.quantize(Made.src, Made.gguf, format="gguf:pre=gpt-2", type="Q4_0", quality="fast", warn=str, device="cpu")
    evaluated(Made.int4)
    return Made
