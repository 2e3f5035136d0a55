"""The probe: every kind at a positive rate, within its time; and what a machine that is not there is said to do."""

import math
import time

import pytest
import torch

from llmq.pipeline.machines import MACHINES, machine, on_paper
from llmq.pipeline.plan import outline
from llmq.pipeline.rates import NOMINAL, Rates, probe
from llmq.recipe import Recipe
from llmq.types import LlmqError

W8A8 = {"bits": 8, "act_bits": 8, "act": "tensor"}
SELF = {"group_size": 32, "calib": "self"}


@pytest.mark.parametrize(
    "options",
    [{"method": "gptq", "group_size": 32}, {"format": "gguf"}, {"format": "gguf", "type": "F16"}, W8A8, SELF],
    ids=["gptq", "Q4_K_M", "F16", "W8A8", "self"],
)
def test_every_kind_is_probed_within_the_time_and_leaves_nothing(tiny_checkpoint, tmp_path, options):
    plan = outline(str(tiny_checkpoint()), Recipe(**options), "cpu")
    probe(plan, tmp_path, 0.01)  # loops are compiled or loaded once
    start = time.monotonic()
    rates = probe(plan, tmp_path, 0.5)
    assert time.monotonic() - start < 10  # on a machine that does much else
    assert rates.keys() == NOMINAL.keys() and all(0 < r < math.inf for r in rates.values())
    assert not list(tmp_path.iterdir())


def test_a_probe_measures_with_the_clock_that_it_is_given(tiny_checkpoint, tmp_path):
    plan = outline(str(tiny_checkpoint()), Recipe(method="gptq", group_size=32), "cpu")
    ticks = iter(range(10**6))
    rates = probe(plan, tmp_path, 120, lambda: float(next(ticks)))  # 5 a kind, in which are 5 goes
    assert rates["packing"] == 256 * 128 * 5 / 6 and rates["factor"] == pytest.approx(128**3 / 3 * 5 / 6)
    assert rates["text"] == NOMINAL["text"]


def test_what_there_is_no_time_for_is_as_far_from_nominal_as_the_rest(tiny_checkpoint, tmp_path):
    plan = outline(str(tiny_checkpoint()), Recipe(method="gptq", group_size=32), "cpu")
    ticks = iter(range(10**6))
    rates = probe(plan, tmp_path, -1, lambda: float(next(ticks)))  # the first kind alone, a go in two ticks
    ratio = rates["forward"] / NOMINAL["forward"]
    assert rates["forward"] == 512 * 128**2 and rates["text"] == NOMINAL["text"]
    assert rates["fits"] / NOMINAL["fits"] == pytest.approx(ratio) == rates["write"] / NOMINAL["write"]


def test_seconds_are_amounts_over_rates():
    assert Rates(a=2.0, b=4.0).seconds({"a": 3, "b": 0}) == {"a": 1.5}


def test_a_machine_on_paper_is_as_fast_as_its_data_sheet_says(tiny_checkpoint):
    plans = {d: outline(str(tiny_checkpoint(dtype=d)), Recipe(group_size=32), torch.device("cuda")) for d in
             (torch.bfloat16, torch.float32)}  # fmt: skip
    half, full = (on_paper(machine("H100"), p) for p in plans.values())
    assert half.keys() == full.keys() == NOMINAL.keys()
    assert half["forward"] == pytest.approx(0.4 * 989e12) and full["forward"] == pytest.approx(0.6 * 67e12)
    assert half["products"] == full["products"] and half["passes"] == pytest.approx(0.7 * 3350e9 / 8)
    assert half["writing"] == pytest.approx(0.7 * 3350e9 * 32)  # 32 rows, 2 flops for each weight of 2 bytes
    assert all(on_paper(m, plans[torch.bfloat16])["forward"] > 1e13 for m in MACHINES.values())
    with pytest.raises(LlmqError, match="--device-like 'h10': no such machine is known .there are: a100, h100"):
        machine("h10")
