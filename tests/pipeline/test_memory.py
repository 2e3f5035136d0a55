"""Memory as it is promised: its terms by formula, how many batches a cap leaves suspended, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _tiny import make_prose

import llmq
from llmq.pipeline.holdings import LIBRARIES
from llmq.pipeline.memory import alive_under, capped, terms
from llmq.pipeline.plan import prepare
from llmq.recipe import Recipe
from llmq.types import LlmqError

H, I = 64, 256  # noqa: E741


@pytest.fixture
def planned(tiny_checkpoint):
    """`planned(method, **options)`: a prepared run of 64 sequences of 256 tokens, four batches."""

    def make(method, **options):
        how = {"group_size": 32, "samples": 64, "seq_len": 256, "calib": "text.txt", "dtype": "float32"} | options
        return prepare(str(tiny_checkpoint(intermediate_size=I)), Recipe(method=method, **how))

    return make


def test_the_terms_of_gptq(planned):
    peak = terms(planned("gptq"))
    (blocks,) = (p for p in peak.phases if p.name == "blocks")
    assert (peak.alive, peak.batches) == (4, 4)
    assert blocks.at == "block 0, mlp.down_proj"
    assert blocks.host["suspended"] == 4 * 4096 * (3 * H + I) * 4
    assert blocks.host["block"] == 4 * (2 * H * H + 2 * H * H // 2 + 3 * H * I + 2 * H)
    assert peak.host.total() == sum(peak.host.host.values()) > LIBRARIES


def test_sums_grow_with_what_a_method_keeps(planned):
    sums = {m: terms(planned(m), 0).host.host.get("sums", 0) for m in ("rtn", "gptq", "qep,gptq,descent")}
    assert sums["rtn"] == 0 < sums["gptq"] < sums["qep,gptq,descent"]


def test_rtn_holds_no_calibration(planned):
    peak = terms(planned("rtn"))
    assert peak.batches == 0
    assert {n for p in peak.phases for n in p.host} <= {
        "libraries", "heap", "a tensor", "block", "codes", "packed", "rows", "decoded block", "decoding",
        "embeddings and head", "logits",
    }  # fmt: skip


def test_a_cap_leaves_as_many_suspended_as_fit(planned):
    plan = planned("qep,gptq,descent")
    takes = [terms(plan, alive).host.total() for alive in range(5)]
    assert takes[0] < takes[1] < takes[2] < takes[3] == takes[4]  # the last batch runs as the others wait
    for cap in (takes[0], takes[1] - 1, takes[1], takes[2], takes[4]):
        assert alive_under(plan, cap) == max(alive for alive in range(5) if takes[alive] <= cap)
    assert alive_under(plan) == 4


def test_a_cap_that_nothing_fits_into_is_refused_with_the_least_that_would(planned):
    plan = planned("qep,gptq,descent")
    least = terms(plan, 0).host
    with pytest.raises(LlmqError, match=re.escape(f"takes {least.total() / 1e9:.2f} GB at least ({least.name}")) as e:
        alive_under(plan, least.total() - 1)
    assert least.largest() in str(e.value) and str(e.value).startswith("--max-memory")


def test_a_cap_below_what_python_takes_says_so(planned):
    with pytest.raises(LlmqError, match=r"--max-memory 0\.001 GB .* libraries alone take 0\.\d+ GB"):
        alive_under(planned("gptq"), 10**6)


def test_without_a_cap_as_many_are_suspended_as_fit_into_what_is_free(planned, monkeypatch):
    plan = planned("qep,gptq,descent")
    takes = [terms(plan, alive).host.total() for alive in range(5)]

    def with_free(free):
        monkeypatch.setattr("llmq.pipeline.memory.free_memory", lambda device: free)
        return capped(plan)

    assert with_free(takes[4]) is plan
    assert with_free(takes[2] - 1).alive == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # which share it
    assert with_free(2 * takes[2] - 1).alive == 1
    short = with_free(takes[0])
    assert short.alive == 0
    (said,) = short.warnings[len(plan.warnings) :]
    assert f"takes {takes[0] / 1e9:.2f} GB of memory" in said


def test_beside_a_gpu_the_host_holds_what_comes_next(planned):
    plan = planned("qep,gptq")
    gpu = terms(dataclasses.replace(plan, device=torch.device("cuda"))).host
    assert gpu.host["next block"] == 2 * 4 * (2 * H * H + 2 * H * H // 2 + 3 * H * I + 2 * H)
    assert gpu.host["next batch"] == 3 * 2 * 4096 * H * 4
    assert gpu.total() > LIBRARIES and not {"next block", "next batch"} & set(terms(plan).host.host)


def test_experts_stay_suspended(tmp_path):
    from _families import FAMILIES

    FAMILIES["mixtral"].save(tmp_path)
    plan = prepare(str(tmp_path), Recipe(method="gptq", group_size=32, samples=256, seq_len=48, calib="text.txt"))
    assert terms(plan, 0).host.host["suspended"] == terms(plan).host.host["suspended"] > 0


def test_a_cap_is_a_size_and_ends_as_batches_that_stay_suspended(planned):
    plan = planned("qep,gptq,descent")
    assert capped(plan) is plan and plan.alive is None
    assert capped(plan, "1TB").alive == 4
    assert capped(plan, f"{terms(plan, 1).host.total() / 2**20 + 0.01:.2f}MiB").alive == 1
    for nonsense in ("6", "6 pounds", "-1GB", "0GB", "1" * 4000 + "GB"):
        with pytest.raises(LlmqError, match="--max-memory takes a size such as 6GiB"):
            capped(plan, nonsense)
    with pytest.raises(LlmqError, match="--device-memory means nothing here"):
        capped(plan, None, "6GiB")


def test_a_child_process_stays_under_its_cap(tiny_checkpoint, tmp_path):
    """Where activations are nearly all that is held: 8 sequences of 2048 tokens, two a batch."""
    src, text = tiny_checkpoint(hidden_size=256, intermediate_size=1024), tmp_path / "text.txt"
    text.write_text(make_prose(20000))
    how = {"method": "gptq", "group_size": 32, "calib": str(text), "samples": 8, "seq_len": 2048, "dtype": "float32"}
    plan = prepare(str(src), Recipe(**how))
    cap = terms(plan, 1).host.total()
    assert terms(plan).host.total() > 1.05 * cap
    options = [word for k, v in how.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    options += ["--max-memory", f"{cap / 1e6 + 1:.0f}MB", "--log-json", str(tmp_path / "log")]
    command = [sys.executable, "-m", "llmq", "quantize", str(src), str(tmp_path / "out"), *options]
    path = f"{Path(llmq.__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    held = [json.loads(line).get("memory", {}).get("most", 0) for line in (tmp_path / "log").read_text().splitlines()]
    assert 0.8 * cap < max(held) <= cap + 10**6
