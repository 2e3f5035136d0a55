"""What a run records of the channels that its steps looked at: before and after a fold, and as they were solved."""

import pytest
import torch

import llmq
from llmq.pipeline.channels import QUANTILES, quantiles, scaled
from llmq.stats import AbsMax, Stats

SMALL = {"group_size": 32, "samples": 4, "seq_len": 32, "dtype": "float32", "device": "cpu", "format": "gptq"}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def recorded(tiny_checkpoint, tmp_path, prose):
    """`recorded(**options)`: the entries of a run, by what they tell."""
    (tmp_path / "t.txt").write_text(prose(2000))

    def run(**options):
        out = tmp_path / options["method"].replace(":", "-")
        made = llmq.quantize(tiny_checkpoint(), out, calib=tmp_path / "t.txt", warn=str, **SMALL | options)
        return made.get("activations", [])

    return run


def test_quantiles_are_values_of_channels():
    x = torch.arange(101).flip(0)
    assert quantiles(x) == [0, 25, 50, 75, 99, 100] and len(QUANTILES) == 6
    assert quantiles(torch.tensor([1.23456])) == [1.235] * 6


def test_what_a_fold_leaves_is_what_was_there_over_its_scale(recorded):
    entries = recorded(method="smoothquant,rtn")
    assert len(entries) == 8 and {e["block"] for e in entries} == {0, 1}
    entry = next(e for e in entries if UP in e["linears"])
    assert entry["step"] == "smoothquant" and entry["linears"] == [UP.replace("up", "gate"), UP]
    assert entry["max"] == sorted(entry["max"]) and 0 <= entry["channel"] < 64
    spread = [e[-1] / e[2] for e in (entry["max"], entry["after"])]
    assert spread[1] < spread[0]  # the largest stands less above the median: what it is for


def test_awq_tells_of_means_and_gptq_of_mean_squares(recorded):
    kinds = [[k for k in ("max", "mean", "rms") if k in e] for e in recorded(method="awq,gptq")]
    assert sorted(kinds) == [["mean"]] * 8 + [["rms"]] * 8
    assert recorded(method="rtn") == []


def test_norms_alone_are_smoothed_as_in_the_paper(recorded):
    """Sites whose producer is a linear have no statistics then, and are left alone."""
    entries = recorded(method="smoothquant:linears=false,rtn")
    assert [e["linears"][0].split(".")[-1] for e in entries] == ["q_proj", "gate_proj"] * 2


def test_the_largest_channel_is_the_one():
    stat = AbsMax(2)
    stat.update(torch.tensor([[1.0, -9.0, 2.0], [3.0, 0.0, 0.5]]))
    (entry,) = scaled(0, ["a"], "mine", Stats({AbsMax: stat}), None)
    assert entry == {"block": 0, "linears": ["a"], "step": "mine", "max": [2, 2, 3, 9, 9, 9], "channel": 1}
