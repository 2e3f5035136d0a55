"""What a run computes, counted by hand on a tiny model, and what a capped or transformed run computes more."""

import dataclasses

import pytest
from _families import FAMILIES

from llmq.calibration.writing import TRIED_STEPS
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
    assert work["columns", 1] == 2 * sum(N * K * K for N, K, _ in SITES)
    assert work["products", 1] == 2 * sum(2.5 * N * K * K for N, K, _ in SITES)  # of the errors in the record
    assert work["fits", 1] == work["packing", "first"] == work["decoding", "first"] == 2 * linears
    assert work["linears", "each"] == 14 == len(plan.linears)
    assert work["write", "first"] == 2 * plan.bytes() and work["text", "first"] == 8 * TOKENS
    assert work["link", "sums"] == 2 * 4 * 9 / 16 * sum(K * K for _, K, _ in SITES)
    assert work["link", "sent"] == 2 * linears
    assert not work["looks", 1]


def test_a_model_that_writes_its_own_text_passes_its_weights_for_every_token(tiny_checkpoint):
    folder = tiny_checkpoint()
    given, written = (counted(folder, "gptq", calib=calib)[1] for calib in ("wikitext2", "self"))
    linears, head = 2 * sum(N * K for N, K, _ in SITES), 320 * 64
    tokens, steps = TOKENS + 8 * TRIED_STEPS, LENGTH + TRIED_STEPS  # all 8 sequences side by side
    assert written["writing", "first"] == tokens * (2 * linears + 2 * 2 * LENGTH * 64 + 2 * head)
    assert written["passes", "first"] - given["passes", "first"] == tokens * (2 * LENGTH * 2 * 64 + 10 * 320)
    assert written["linears", "first"] == pytest.approx(0.06 * steps * 14)
    assert not given["writing", "first"] and not written["text", "first"] and written["starts", "each"] == 1
    assert written["read", "first"] > given["read", "first"]


def test_rounding_alone_runs_nothing_and_reads_twice(tiny_checkpoint):
    plan, work = counted(tiny_checkpoint(), "rtn", samples=None, seq_len=None)
    assert not work["forward", "batches"] and not work["statistics", "batches"] and not work["text", "first"]
    assert work["read", "each"] == plan.source.bytes() and work["starts", "each"] == 1


def test_batches_that_stay_nowhere_run_again_and_a_second_stream_runs_too(tiny_checkpoint):
    folder = tiny_checkpoint()
    once, again = (counted(folder, "gptq", alive)[1]["forward", "batches"] for alive in (None, 0))
    assert again == pytest.approx(AGAIN * once)
    assert counted(folder, "qep,gptq")[1]["forward", "batches"] == 2 * once
    awq = counted(folder, "awq,gptq")[1]  # which runs parents on all of these few tokens, an exponent each
    assert awq["forward", "batches"] == 2 * once and awq["forward", 20] == 20 * once
    tuned = counted(folder, "gptq,signround:steps=10")[1]
    assert tuned["forward", "batches"] == (2 + 1) * once  # the float block too
    assert tuned["forward", "each"] == pytest.approx((3 * 10 * 4 / 8 + 2 / 8) * once)  # all tune the same


def test_gradients_of_tokens_and_a_budget_of_bits_cost_forwards(tiny_checkpoint):
    folder = tiny_checkpoint()
    plain = counted(folder, "gptq")[1]
    linears, head = 2 * sum(N * K for N, K, _ in SITES), 320 * 64
    token = 2 * linears + 2 * 2 * LENGTH * 64 + 2 * head
    weighed = counted(folder, "fisher,gptq")[1]
    assert weighed["forward", "batches"] - plain["forward", "batches"] == 4 * TOKENS * token
    budget = counted(folder, "gptq", target_bpw=5.0, format="compressed-tensors")[1]
    assert budget["fits", "first"] == 5 * linears and budget["products", "first"] == 2 * TOKENS * 5 * linears


def test_an_expert_gets_its_share_of_the_tokens(tmp_path):
    FAMILIES["qwen3_moe"].save(tmp_path)
    plan, work = counted(tmp_path, "gptq")
    config = plan.skeleton.config
    share = config.num_experts_per_tok / config.num_experts
    first = [(n, s.K) for n, s in plan.linears.items() if not n.endswith(("k_proj", "v_proj", "up_proj"))]  # of a site
    seen = sum(K**2 * (share if ".experts." in n else 1) for n, K in first)
    assert 0 < share < 1 and any(".experts." in n for n, _ in first)
    assert work["statistics", "batches"] == pytest.approx(1.1 * TOKENS * seen)
    assert work["factor", "each"] == pytest.approx(sum(K**3 / 3 for n, K in first if ".experts." not in n))
    own = [K for n, K in first if ".experts." in n]  # of an expert, where it is solved: four are dealt together
    assert work["factor", 4] == pytest.approx(sum(K**3 / 3 for K in own))
    assert work["link", "owner"] == 4 * 9 / 16 * sum(K * K for K in own)


def test_rows_are_dealt_in_the_pieces_that_they_are_solved_in(tiny_checkpoint):
    folder = tiny_checkpoint(hidden_size=64, intermediate_size=1024)
    work = counted(folder, "gptq")[1]
    assert work["columns", 4] == 2 * 2048 * 64**2 and work["columns", 1] > 0  # gate and up: 2048 rows, 512 a piece


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
    assert not less["columns", 1] and less["forward", "batches"] == work["forward", "batches"]
