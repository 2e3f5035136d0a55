"""Numbers that went wrong are named: in the line of the linear, to whoever listens, and in the record's summary."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration
from llmq.checkpoint.batches import Batches
from llmq.model.ends import embed
from llmq.pipeline.activations import NOT_FINITE
from llmq.pipeline.block import quantize_block
from llmq.pipeline.plan import prepare
from llmq.pipeline.trouble import KINDS, summed, told
from llmq.progress import Listener
from llmq.recipe import Recipe
from llmq.types import LlmqError

SMALL = {"group_size": 32, "samples": 4, "seq_len": 32, "dtype": "float32", "format": "gptq", "device": "cpu"}
DOWN = "model.layers.1.mlp.down_proj"


class Heard(Listener):
    def __init__(self):
        self.trouble = []

    def hear(self, event):
        if event.kind == "trouble":
            self.trouble.append(event.what)


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose(2000))
    return tmp_path / "t.txt"


def edited(folder, name, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_each_kind_is_told_in_words_and_a_good_line_tells_nothing():
    assert told({"damp": 0.01, "dead_columns": 0, "tokens": 64, "input_clipped": 0.001, "bits": 4}, 64) == {}
    line = {
        "fallback": "rtn: no token", "dampings": [0.01, 0.1], "qep": "none: H", "not_scaled": NOT_FINITE,
        "dead_columns": 3, "tokens": 40,
        "scales": {"lost": 2, "coarse": 1}, "input_clipped": 0.02,
    }  # fmt: skip
    words = told(line, 64)
    assert words.keys() == KINDS.keys() and words["few tokens"] == "40 for 64 columns"
    assert words["damping raised"] == "0.1 after 0.01 left H without a factor"
    assert words["scales"] == "2 too small to be stored, 1 small, stored with few digits"
    lines = {"a": {"trouble": {"few tokens": "1 for 64 columns"}}, "b": {}, "c": {"trouble": words}}
    few = summed(lines)["few tokens"]
    assert few == {"linears": 2, "first": "a", "says": "1 for 64 columns"} and summed({"b": {}}) == {}


def test_a_run_names_what_it_met(tiny_checkpoint, tmp_path, text):
    """Two channels of a norm at 0, a row of tiny weights, a damping too small for a Hessian without a prior."""
    src = edited(tiny_checkpoint(), "model.layers.1.post_attention_layernorm.weight", lambda g: g[3:5].zero_())
    edited(src, f"{DOWN}.weight", lambda W: W[7].mul_(1e-7))
    heard = Heard()
    method = "gptq:damp=1e-9:prior=0"
    record = llmq.quantize(src, tmp_path / "out", calib=text, method=method, progress=heard, warn=str, **SMALL)
    up = record["linears"]["model.layers.1.mlp.up_proj"]["trouble"]
    assert up["dead columns"].startswith("2 of 64")
    line = record["linears"][DOWN]
    assert line["dampings"][0] == 1e-9 and line["dampings"][-1] == pytest.approx(line["damp"]) and line["damp"] > 1e-9
    assert line["scales"] == {"lost": 4} and line["trouble"].keys() == {"damping raised", "scales"}
    assert record["trouble"]["scales"] == {"linears": 1, "first": DOWN, "says": "4 too small to be stored"}
    assert f"{DOWN}: scales: 4 too small to be stored" in heard.trouble
    assert len(heard.trouble) == sum(t["linears"] for t in record["trouble"].values())


def test_a_good_run_has_no_trouble(tiny_checkpoint, tmp_path, text):
    heard = Heard()
    options = SMALL | {"samples": 8}
    record = llmq.quantize(tiny_checkpoint(), tmp_path / "out", calib=text, progress=heard, **options)
    assert "trouble" not in record and heard.trouble == []
    assert not any("trouble" in line or "scales" in line for line in record["linears"].values())


@pytest.mark.parametrize("method", ["gptq", "smoothquant,gptq", "awq,rtn", "migrate,rtn", "qep,gptq,descent"])
def test_activations_that_are_not_finite_are_named_and_the_linears_rounded(method, tiny_checkpoint, tmp_path):
    """One NaN among the tokens: no statistic of it may reach a weight."""
    ids = torch.randint(2, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    plans = [
        prepare(str(tiny_checkpoint()), Recipe(method=m, range="mse", group_size=32, dtype="float32"), "cpu")
        for m in (method, "rtn")
    ]
    hidden, calls = embed(plans[0].skeleton, ids.split(2), plans[0].device)
    hidden[1][0, 3, 7] = torch.nan
    batches = Batches(tmp_path / "00000", "hidden", range(2)).filled(hidden)
    state = Calibration(batches, batches, calls, calls, ids=ids, dealt=Dealt.of([32, 32]))
    with torch.no_grad():
        tensors, report, _ = quantize_block(plans[0], 0, state)
        _, plain, _ = quantize_block(plans[1], 0, Calibration())
    rounded, left = {"rounded to nearest instead": f"rtn: {NOT_FINITE}"}, {"not scaled": NOT_FINITE}
    solver = method.rpartition(",")[2]
    wanted = (rounded if solver != "rtn" else {}) | (left if method.startswith(("smooth", "awq", "migrate")) else {})
    for name, line in report.record.linears.items():
        assert line["trouble"] == wanted
        assert line["sha256"]["codes"] == plain.record.linears[name]["sha256"]["codes"]
    assert not report.record.folds and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_activations_that_are_not_finite_get_no_static_scale(tiny_checkpoint, tmp_path, text):
    src = edited(tiny_checkpoint(), "model.layers.0.post_attention_layernorm.weight", lambda g: g.fill_(1e30))
    static = {"bits": 8, "act_bits": 8, "act": "tensor", "group_size": "channel", "format": "compressed-tensors"}
    with pytest.raises(LlmqError, match=r"layers\.0\.mlp\.down_proj: its input is NaN or infinite"):
        llmq.quantize(src, tmp_path / "out", calib=text, method="rtn", warn=str, **SMALL | static)


def test_what_a_range_leaves_outside_the_static_grid_is_measured(tiny_checkpoint, tmp_path, text):
    static = {"bits": 8, "act_bits": 8, "act": "tensor", "group_size": "channel", "format": "compressed-tensors"}
    shares = {}
    for how in ("minmax", "percentile:p=90"):
        record = llmq.quantize(
            tiny_checkpoint(), tmp_path / how[:4], calib=text, method="rtn", act_range=how, **SMALL | static
        )
        shares[how] = [line.get("input_clipped", 0) for line in record["linears"].values()]
    assert max(shares["minmax"]) == 0
    assert all(0.02 < share < 0.15 for share in shares["percentile:p=90"])
    assert record["trouble"]["input clipped"]["linears"] == len(record["linears"])
    assert torch.tensor(shares["percentile:p=90"]).std() > 0
