"""What is known of a checkpoint: its record, or what its files say; its figures; its weights as codes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmq.errors import LlmqError
from llmq.report.figures import figures
from llmq.report.read import Line, labels, read
from llmq.report.reasons import reasons
from llmq.verify.ggml import open_gguf
from llmq.verify.report import Report

GOLDEN = Path(__file__).parents[1] / "golden"
WORST = "model.layers.1.self_attn.k_proj"


def test_places_of_linears():
    line = Line.of(
        "model.layers.12.mlp.experts.7.up_proj", {"output_error": float("nan"), "weight_error": 1, "bits": 4}
    )
    assert (line.block, line.leaf) == (12, "mlp.experts.*.up_proj")
    assert line.error("output") is None and line.error("weight") == 1.0 and line.bits == 4
    assert (Line.of("lm_head", {}).block, Line.of("lm_head", {}).leaf) == (None, "lm_head")
    assert Line.of("model.language_model.layers.3.self_attn.q_proj", {}).block == 3


def test_checkpoints_are_called_by_what_tells_them_apart():
    assert labels(["out/q4/", "out/q8"]) == ["q4", "q8"]
    assert labels(["a/int4", "b/int4"]) == ["a/int4", "b/int4"]
    assert labels(["int4", "int4"]) == ["int4 (1)", "int4 (2)"]


def test_all_that_a_run_recorded_is_there(made):
    told = read(made.int4, "int4", against=made.src)
    assert len(told.lines) == 14 and told.kind == "output" and told.method == "gptq" and told.steps == "awq,gptq"
    assert told.mean("weight") > told.mean("output") > 0
    assert [told.worst(3)[0].error("output")] == [max(x.error("output") for x in told.lines)]
    assert {e.kind for e in told.channels} == {"mean", "rms"} and told.timings.stages["solve"] > 0
    assert told.figures["kl_mean"] == 0.02 and told.figures["classes"]["word"]["tokens"] == 90
    assert told.chosen().name == told.worst(1)[0].name


def test_codes_scales_and_floats_of_a_linear(made):
    told = read(made.int4, "int4", linear=WORST, against=made.src)
    packed, W = told.chosen(), told.weights.floats(WORST)
    assert packed.name == WORST and packed.grid == "INT, 4 bits, groups of 32" and packed.levels() == list(range(16))
    error = (packed.values() - W).square().sum() / W.square().sum()
    assert error == pytest.approx(made.record["linears"][WORST]["weight_error"], rel=1e-4)  # folds are made again
    at = packed.positions(packed.values())  # what was decoded lies on the grid, from end to end
    steps = at * 15
    assert torch.allclose(steps, steps.round(), atol=2e-3) and at.min() == 0 and at.max() == 1


def test_a_gguf_file_is_read_the_same(made):
    told = read(made.gguf, "q4", linear=WORST, against=made.src)
    packed, report = told.chosen(), Report()
    decoded = open_gguf(made.gguf, report)[0].read(f"{WORST}.weight", report)
    assert torch.equal(packed.values(), decoded) and packed.grid == "Q4_0, 4 bits, groups of 32"
    assert packed.levels() == list(range(-8, 8))
    W = told.weights.floats(WORST)
    assert (packed.values() - W).square().sum() < 0.02 * W.square().sum()  # rows are those of the source
    assert told.size == sum(t.n_bytes for t in told.weights._files[0].tensors.values())


@pytest.mark.parametrize("name", ["awq_w4g32", "ct_nvfp4", "ct_fp8_dynamic", "ct_mxfp4", "gptq_v1_w4g32_desc_act"])
def test_a_peers_checkpoint_tells_of_its_codes(name):
    told = read(GOLDEN / name, name)
    assert told.record == {} and told.lines == [] and told.channels == [] and told.steps == ""
    packed = told.chosen()
    low, high = packed.ends()
    levels = np.array(packed.levels())
    assert (low <= 0).all() and (high >= 0).all() and np.nanmax(levels) > 0
    at = packed.positions(packed.values())
    assert float(at.min()) >= -1e-6 and float(at.max()) <= 1 + 1e-6


def test_what_is_not_there_is_named(made, tmp_path):
    with pytest.raises(
        LlmqError, match="no packed linear 'model.layers.1.up_proj'; did you mean model.layers.1.mlp.up_proj"
    ):
        read(made.int4, "int4", linear="model.layers.1.up_proj")
    with pytest.raises(LlmqError, match="float checkpoint"):
        read(GOLDEN / "float", "float").chosen()
    with pytest.raises(LlmqError):
        read(tmp_path / "nothing", "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"activations": [{"block": 0}]},
        {"linears": {"a": 3}},
        {"size": {"bits_per_weight": "4"}},
        {"recipe": 1},
        {"size": {"bits_per_weight": float("nan")}},
    ],
)
def test_a_record_that_is_not_as_written_is_one_line(made, tmp_path, change):
    out = tmp_path / "out"
    shutil.copytree(made.int4, out)
    record = json.loads((out / "quantization.json").read_text()) | change
    (out / "quantization.json").write_text(json.dumps(record))
    told = read(out, "out")
    with pytest.raises(LlmqError, match="record of"):
        assert told.lines and told.channels and told.sized("bits_per_weight") and told.steps


def test_figures_that_are_no_numbers_count_as_not_there():
    found = figures({
        "perplexity": "low", "kl_mean": float("nan"), "top1": True, "kl_p99": 0.5, "kl_by_position": [[0, 1], [1], "x"],
        "classes": {"word": 3, "digit": {"top1": None}, "name": {"top1": 0.5, "kl_mean": "?"}}, "categories": [],
    })  # fmt: skip
    assert found == {
        "kl_p99": 0.5, "kl_by_position": [[0, 1]], "classes": {"name": {"top1": 0.5}}, "categories": {}
    }  # fmt: skip


def test_reasons_of_the_worst(made, tmp_path):
    told = read(made.int4, "int4")
    line = told.worst(1)[0]
    assert reasons(told, line) == [
        f"nothing stands out; {reasons(told, line)[0].split()[3]} times the median of all {line.leaf}"
    ]
    odd = Line(
        line.name, line.block, line.leaf, {**line.said, "bits": 2, "trouble": {"few tokens": "40 for 64 columns"}}
    )
    assert reasons(told, odd) == ["few tokens: 40 for 64 columns", "2 bits, where most have 4"]
    entry = next(e for e in told.channels if line.name in e.linears and e.kind == "rms")
    outlier = type(entry)(**{**vars(entry), "before": (1, 1, 1, 1, 2, 95), "channel": 38})
    told.__dict__["channels"] = [outlier]
    assert reasons(told, line) == ["input channel 38 stands 95 times above the median one"]
