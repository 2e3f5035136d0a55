"""What is told of a run before it starts: by headers alone, exact where it is bytes, dealt by arithmetic."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.checkpoint import Source
from llmq.guard.reading import Entry
from llmq.pipeline.estimate import dealt, estimate
from llmq.pipeline.machines import machine, on_paper
from llmq.pipeline.plan import outline
from llmq.pipeline.rates import NOMINAL, Rates
from llmq.recipe import Recipe
from llmq.types import LlmqError

SMALL = {"group_size": 32, "samples": 4, "seq_len": 32}


def planned(folder, device="cpu", **options):
    return outline(str(folder), Recipe(**SMALL | options), device)


@pytest.mark.parametrize("method", ["rtn", "awq,gptq", "qep,gptq,descent"])
def test_no_weight_is_read(tiny_checkpoint, monkeypatch, method):
    folder = tiny_checkpoint()
    sound = estimate(planned(folder, method=method), NOMINAL).to_json()
    tensors = {n: torch.full_like(t, torch.nan) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(Entry, "read", None)
    monkeypatch.setattr(Entry, "read_slice", None)
    monkeypatch.setattr(Source, "get", None)
    assert estimate(planned(folder, method=method), NOMINAL).to_json() == sound


def test_rows_and_sizes_are_those_of_the_format_by_hand(tiny_checkpoint):
    found = estimate(planned(tiny_checkpoint(dtype=torch.bfloat16), method="gptq"), NOMINAL)
    rows = {r.name: r for r in found.linears}
    assert len(rows) == 14
    for name, N, K in (("self_attn.k_proj", 32, 64), ("mlp.down_proj", 64, 128)):
        row, G = rows[f"model.layers.1.{name}"], K // 32
        assert row.shape == (N, K) and row.grid == "int:group=32:range=[minmax]"
        assert row.bytes == N * K // 2 + G * N // 2 + 2 * G * N + 4 * K  # codes, zeros, scales, g_idx
    assert rows["model.layers.0.self_attn.v_proj"].site == "model.layers.0.self_attn.q_proj"
    floats = 2 * (2 * 320 * 64 + 5 * 64)  # embedding, head, norms
    assert found.floats == {"tensors": 7, "bytes": floats}
    packed = sum(r.bytes for r in found.linears)
    assert found.bytes == packed + floats and found.float_bytes > found.bytes
    assert found.bits_per_weight == pytest.approx(8 * packed / (2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64)))


def test_under_a_budget_sizes_are_its_own(tiny_checkpoint):
    plan = planned(tiny_checkpoint(tie_word_embeddings=True), method="rtn", target_bpw=4.5, lm_head=True)
    found, beside = estimate(plan, NOMINAL), sum(plan.float_bytes.values())
    assert found.bits_per_weight == pytest.approx(4.5, abs=1e-3)
    assert found.bytes == beside + sum(r.bytes for r in found.linears)
    kinds = {r.grid for r in found.linears if r.name != "lm_head"}
    assert kinds == {"within the budget, one of 3,4,5,6,8 bits"}
    head = next(r for r in found.linears if r.name == "lm_head")
    assert head.grid.startswith("int:") and head.bytes == plan.packed_sizes["lm_head"]


def test_the_value_is_json_with_these_keys(tiny_checkpoint):
    said = json.loads(json.dumps(estimate(planned(tiny_checkpoint(), method="gptq"), NOMINAL).to_json()))
    assert said.keys() == {
        "source", "method", "format", "linears", "floats", "bytes", "float_bytes", "bits_per_weight", "memory", "alive",
        "batches", "disk", "amounts", "rates", "how", "devices", "readers", "warnings", "goes_on", "seconds",
        "total_seconds",
    }  # fmt: skip
    assert said["linears"][0].keys() == {"name", "shape", "site", "grid", "bytes"}
    assert said["readers"][1].keys() == {"runtime", "version", "accepts", "reason", "known"}
    host = said["memory"]["host"]
    assert host.keys() == {"bytes", "at", "terms"} and host["bytes"] == sum(host["terms"].values())
    assert said["memory"]["device"]["bytes"] == 0 and said["how"] == "probe" and said["devices"] == 1
    assert said["disk"].keys() == {"output", "parts", "states", "squares", "hessians"}
    assert said["total_seconds"] == pytest.approx(sum(said["seconds"].values()), abs=0.06)


def test_the_line_says_size_memory_disk_and_time(tiny_checkpoint):
    found = estimate(planned(tiny_checkpoint(), method="gptq"), NOMINAL)
    assert found.line() == (
        f"0.5 MB become 0.2 MB, {found.bits_per_weight:.2f} bits a weight; at most "
        f"{found.memory['host']['bytes'] / 1e9:.1f} GB of memory, 0.0 GB of disk meanwhile; about 2 s"
    )


def test_other_rates_are_other_seconds_of_the_same_work(tiny_checkpoint):
    found = estimate(planned(tiny_checkpoint(), method="gptq"), NOMINAL)
    faster = found.at(Rates({kind: 2 * rate for kind, rate in NOMINAL.items()}))
    assert faster.total == pytest.approx(found.total / 2) and faster.bytes == found.bytes
    assert found.seconds["forward"] == found.amounts["forward"] / NOMINAL["forward"]


def test_work_is_dealt_by_parts_of_batches_and_pieces_of_rows():
    work = {
        ("a", "batches"): 64.0, ("a", "first"): 1.0, ("b", 8): 64.0, ("c", 6): 6.0, ("d", "each"): 5.0,
        ("link", "sums"): 8.0, ("link", "sent"): 16.0, ("way", "owner"): 8.0,
    }  # fmt: skip
    assert dealt(work, 1, 64) == {"a": 65, "b": 64, "c": 6, "d": 5, "link": 0, "way": 0}
    assert dealt(work, 4, 64) == {
        "a": 17,
        "b": 16,
        "c": 2,
        "d": 5,
        "link": 2 * 2 * 6 + 12,
        "way": 2 * 6,
    }  # two rounds of sums
    assert dealt(work, 8, 64) == {"a": 9, "b": 8, "c": 1, "d": 5, "link": 2 * 7 + 14, "way": 7}
    assert dealt(work, 64, 64) == {
        "a": 9,
        "b": 8,
        "c": 1,
        "d": 5,
        "link": 2 * 7.875 + 15.75,
        "way": 7.875,
    }  # 8 work in the blocks
    assert dealt(work, 8, 20)["a"] == 64 * 3 / 20 + 1  # parts of three and of two batches


def test_other_machines_are_arithmetic_and_say_so(tiny_checkpoint):
    plan = planned(tiny_checkpoint(dtype=torch.bfloat16), torch.device("cuda"), method="qep,gptq,descent", samples=1024)
    h100 = ("h100", machine("h100"))
    one, eight = (estimate(plan, on_paper(h100[1], plan), like=h100, devices=n) for n in (1, 8))
    assert one.how == eight.how == "arithmetic: h100" and "link" not in one.seconds and "link" in eight.seconds
    assert eight.seconds["forward"] < one.seconds["forward"] and eight.seconds["factor"] == one.seconds["factor"]
    assert eight.batches < one.batches and 0 < eight.memory["device"]["bytes"] < one.memory["device"]["bytes"]
    tight = ("h100", h100[1]._replace(memory=one.memory["device"]["bytes"] / 1e9 * 0.9))
    fewer = estimate(plan, on_paper(h100[1], plan), like=tight)
    assert fewer.alive < one.alive and fewer.seconds["forward"] > one.seconds["forward"]
    assert fewer.memory["device"]["bytes"] <= tight[1].memory * 1e9
    with pytest.raises(LlmqError, match=r"--device-memory 0\.00 GB is too little: the run takes .* at least"):
        estimate(plan, on_paper(h100[1], plan), like=("h100", h100[1]._replace(memory=1e-4)))
    with pytest.raises(LlmqError, match="--devices is at least 1, not 0"):
        estimate(plan, NOMINAL, devices=0)


def test_what_stays_suspended_is_the_plan_s(tiny_checkpoint):
    plan = planned(tiny_checkpoint(), method="gptq", samples=1024)
    none, every = (estimate(dataclasses.replace(plan, alive=n), NOMINAL) for n in (0, None))
    assert (none.alive, every.alive) == (0, every.batches) and none.seconds["forward"] > 2 * every.seconds["forward"]
