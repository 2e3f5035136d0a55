"""What a run computes, counted by hand on a tiny model, and what a capped or transformed run computes more."""

import dataclasses

import pytest
from _families import FAMILIES

from llmq.pipeline.holdings import Holdings
from llmq.pipeline.operations import AGAIN, operations, sites
from llmq.pipeline.plan import outline
from llmq.recipe import Recipe
from llmq.steps import Operations

# Llama of 2 blocks, hidden 64, intermediate 128, 4 heads of 16, 2 of keys and values: [N, K] of its sites
SITES = [(64 + 32 + 32, 64, 3), (64, 64, 1), (128 + 128, 64, 2), (64, 128, 1)]
TOKENS, LENGTH = 8 * 32, 32


def counted(folder, method, alive=None, **options):
    options = {"group_size": 32, "samples": 8, "seq_len": LENGTH, **options}
    plan = outline(str(folder), Recipe(method=method, **options), "cpu")
    holdings = Holdings(plan)
    return plan, operations(plan, holdings, holdings.batches if alive is None else alive)


def test_gptq_is_counted_site_by_site(tiny_checkpoint):
    plan, work = counted(tiny_checkpoint(), "gptq")
    linears = sum(N * K for N, K, _ in SITES)
    assert work["forward", "batches"] == 2 * TOKENS * (2 * linears + 2 * LENGTH * 64)
    assert work["statistics", "batches"] == pytest.approx(2 * TOKENS * 1.1 * sum(K * K for _, K, _ in SITES))
    assert work["factor", "each"] == pytest.approx(2 * sum(K**3 / 3 for _, K, _ in SITES))
    assert work["columns", "rows"] == 2 * sum(N * K * K for N, K, _ in SITES)
    assert work["products", "rows"] == 2 * sum(4 * N * K * K for N, K, _ in SITES)  # of the errors in the record
    assert work["fits", "rows"] == work["packing", "rows"] == work["decoding", "first"] == 2 * linears
    assert work["linears", "rows"] == 14 == len(plan.linears)
    assert work["write", "first"] == 2 * plan.bytes() and work["text", "first"] == 8 * TOKENS
    assert work["link", "ring"] == 2 * 8 * sum(K * K for _, K, _ in SITES)
    assert not work["forward", "experts"] and not work["looks", "rows"]


def test_rounding_alone_runs_nothing_and_reads_twice(tiny_checkpoint):
    plan, work = counted(tiny_checkpoint(), "rtn", samples=None, seq_len=None)
    assert not work["forward", "batches"] and not work["statistics", "batches"] and not work["text", "first"]
    assert work["read", "each"] == 2 * plan.source.bytes() and work["starts", "each"] == 1


def test_batches_that_stay_nowhere_run_again_and_a_second_stream_runs_too(tiny_checkpoint):
    folder = tiny_checkpoint()
    once, again = (counted(folder, "gptq", alive)[1]["forward", "batches"] for alive in (None, 0))
    assert again == pytest.approx(AGAIN * once)
    assert counted(folder, "qep,gptq")[1]["forward", "batches"] == 2 * once
    awq = counted(folder, "awq,gptq")[1]["forward", "batches"]  # which runs parents on all of these few tokens
    assert awq == pytest.approx((2 + 20) * once)
    tuned = counted(folder, "gptq,signround:steps=10")[1]["forward", "batches"]
    assert tuned == pytest.approx((2 + 1 + 3 * 10 * 4 / 8 + 2 / 8) * once)  # the float block too


def test_gradients_of_tokens_and_a_budget_of_bits_cost_forwards(tiny_checkpoint):
    folder = tiny_checkpoint()
    plain = counted(folder, "gptq")[1]
    linears, head = 2 * sum(N * K for N, K, _ in SITES), 320 * 64
    token = 2 * linears + 2 * 2 * LENGTH * 64 + 2 * head
    weighed = counted(folder, "fisher,gptq")[1]
    assert weighed["forward", "batches"] - plain["forward", "batches"] == 4 * TOKENS * token
    budget = counted(folder, "gptq", target_bpw=5.0, format="compressed-tensors")[1]
    assert budget["fits", "batches"] == 5 * linears and budget["products", "batches"] == 2 * TOKENS * 5 * linears


def test_an_expert_gets_its_share_of_the_tokens(tmp_path):
    FAMILIES["qwen3_moe"].save(tmp_path)
    plan, work = counted(tmp_path, "gptq")
    config = plan.skeleton.config
    experts = [s for n, s in plan.linears.items() if ".experts." in n]
    share = config.num_experts_per_tok / config.num_experts
    assert 0 < share < 1 and work["linears", "experts"] == len(experts)
    assert work["forward", "experts"] == pytest.approx(2 * TOKENS * share * sum(s.N * s.K for s in experts))
    assert work["link", "swap"] and work["factor", "experts"]


def test_the_site_of_a_linear_is_the_first_that_reads_its_input(tiny_checkpoint):
    plan, _ = counted(tiny_checkpoint(), "gptq")
    found = sites(plan, [f.at for f in Holdings(plan).traced[1]])
    block = "model.layers.1."
    inside = {n.removeprefix(block): s.removeprefix(block) for n, s in found.items() if n.startswith(block)}
    assert inside == {
        "self_attn.q_proj": "self_attn.q_proj", "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj", "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.gate_proj", "mlp.down_proj": "mlp.down_proj",
    }  # fmt: skip


def test_a_step_that_does_not_say_counts_nothing(tiny_checkpoint):
    plan, work = counted(tiny_checkpoint(), "gptq")

    class Silent(type(plan.method.solver)):
        def operations(self, N, K):
            return Operations()

    silent = dataclasses.replace(plan, method=dataclasses.replace(plan.method, solver=Silent()))
    less = operations(silent, Holdings(silent), 1)
    assert not less["columns", "rows"] and less["forward", "batches"] == work["forward", "batches"]
