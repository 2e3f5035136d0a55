"""Experts taken apart compute what transformers' fused ones compute, for every class that it has."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from llmq.model.experts import Experts, Passing, in_experts, is_fused, routers, unfuse

E, TOP, T, H, INNER = 8, 4, 23, 32, 24
ROOT = Path(transformers.__file__).parent / "models"
DECORATED = [
    (f"transformers.models.{file.parent.name}.{file.stem}", name)
    for file in sorted(ROOT.glob("*/modeling_*.py"))
    for name in re.findall(r"@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", file.read_text())
]


class Config:
    """A config that has whatever a class of experts asks for."""

    _experts_implementation = "eager"
    moe_latent_size = None

    def __getattr__(self, name):
        sizes = {"limit": 7.0, "softcap": 7.0, "alpha": 1.702, "eps": 1e-6, "experts": E, "intermediate": INNER}
        known = [size for part, size in {"act": "silu", **sizes, "hidden": H}.items() if part in name]
        if not known or name.startswith("__"):
            raise AttributeError(name)
        return known[0]


def fused(module, name, **changes):
    """Return a module of fused experts with random weights, and its parameters of all experts."""
    experts = getattr(importlib.import_module(module), name)(Config())
    vars(experts).update(changes)
    for p in experts.parameters():
        p.data.normal_(0, 0.3)
    return experts, {n: p.detach() for n, p in experts.named_parameters(recurse=False)}


def assign_fused(experts, tensors):
    """Give the linears of experts the rows of fused tensors, by the parameters' names."""
    state = {}
    for name, tensor in tensors.items():
        fused = experts.fused[name]
        for own, e, place in fused.names():
            rows = tensor[e].T if fused.transposed else tensor[e]
            parts = len(fused.projections)
            state[own] = rows[place::parts] if fused.interleaved else rows.chunk(parts)[place]
    experts.load_state_dict({n: t.contiguous() for n, t in state.items()}, strict=False, assign=True)


def routed():
    """Hidden states, each token's experts, expert 5 among none of them, and their weights."""
    others = torch.tensor([e for e in range(E) if e != 5])
    index = torch.stack([others[torch.randperm(len(others))[:TOP]] for _ in range(T)])
    return torch.randn(T, H), index, torch.rand(T, TOP)


def test_transformers_has_the_classes_that_the_tests_below_run_through():
    assert len(DECORATED) >= 60


@pytest.mark.parametrize(("module", "name"), DECORATED, ids=[name for _, name in DECORATED])
@torch.no_grad()
def test_experts_equal_the_fused_ones_bit_for_bit(module, name):
    theirs, tensors = fused(module, name)
    x, index, weight = routed()
    want = theirs(x, index, weight)
    theirs.config._experts_implementation = "grouped_mm"
    grouped = theirs(x, index, weight)
    assert is_fused(theirs)
    ours = Experts(theirs)
    assign_fused(ours, tensors)
    got = ours(x, index, weight)
    assert torch.equal(got, want) and got.abs().max() > 0
    assert (got - grouped).abs().max() <= 1e-6 * got.abs().max()


@torch.no_grad()
def test_llama4s_which_take_all_tokens_at_once_are_equal_too():
    theirs, tensors = fused("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")
    hidden = torch.randn(E, T, H) * (torch.rand(E, T, 1) < 0.3)
    hidden[5] = 0
    ours = Experts(theirs)
    want = theirs(hidden.view(-1, H))
    assign_fused(ours, tensors)
    called = []
    for e, expert in enumerate(ours.experts()):
        expert.up_proj.register_forward_pre_hook(lambda _m, args, e=e: called.append((e, len(args[0]))))
    got = ours(hidden.view(-1, H))
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert called == [(e, int(n)) for e, n in enumerate(hidden.any(-1).sum(-1))] and called[5] == (5, 0)
    assert ours.routed(hidden.view(-1, H)).tolist() == [n for _, n in called]
    assert len(ours.entering(hidden.view(-1, H))) == sum(n for _, n in called)


QWEN = ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")


@pytest.fixture
def ours():
    """Experts of Qwen3-MoE, and the inputs of their `up_proj`, call by call."""
    theirs, tensors = fused(*QWEN)
    experts, seen = Experts(theirs), []
    assign_fused(experts, tensors)
    for expert in experts.experts():
        expert.up_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    return experts, seen


@torch.no_grad()
def test_every_expert_is_called_once_in_order_on_the_tokens_routed_to_it(ours):
    experts, seen = ours
    x, index, weight = routed()
    experts(x, index, weight)
    counts = experts.routed(x, index, weight)
    assert [len(s) for s in seen] == counts.tolist() and counts[5] == 0 and len(seen) == E
    assert all(any(torch.equal(row, t) for t in x[(index == 3).any(1)]) for row in seen[3])


@torch.no_grad()
def test_experts_called_on_every_token_compute_the_same(ours):
    experts, seen = ours
    x, index, weight = routed()
    want = experts(x, index, weight)
    seen.clear()
    experts.every = True
    got = experts(x, index, weight)
    assert all(s is x for s in seen) and len(seen) == E
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_experts_that_follow_see_the_tokens_of_the_others_first(ours):
    follower, seen = ours
    leader, tensors = fused(*QWEN)
    leader = Experts(leader)
    assign_fused(leader, tensors)
    mine, (x, index, weight) = routed(), routed()
    want = follower(*mine)
    seen.clear()
    follower.follow(leader)
    leader(x, index, weight)
    got = follower(*mine)
    for e, called in enumerate(seen):
        index_kT = index.T
        of_leader = torch.where(index_kT == e)[1]
        assert torch.equal(called[: len(of_leader)], mine[0][of_leader])
        tokens = {*of_leader.tolist(), *(mine[1] == e).any(1).nonzero()[:, 0].tolist()}
        assert len(called) == len(tokens)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_unfuse_replaces_what_it_knows_and_nothing_else():
    theirs, _ = fused(*QWEN)
    odd, _ = fused(*QWEN)
    odd.third = nn.Parameter(torch.zeros(E, 2, 2))
    model = nn.ModuleDict({"known": theirs, "odd": odd, "linear": nn.Linear(2, 2)})
    assert unfuse(model) == {"known": theirs}
    assert isinstance(model["known"], Experts) and model["odd"] is odd
    names = {n for n, _ in model["known"].named_parameters()}
    assert len(names) == 3 * E and {"7.gate_proj.weight", "7.up_proj.weight", "7.down_proj.weight"} <= names
    assert model["known"].get_parameter("7.gate_proj.weight").shape == (INNER, H)


def test_what_chooses_experts_is_told_from_what_computes():
    experts = Experts(fused(*QWEN)[0])
    block = nn.ModuleDict({"mlp": nn.Module(), "attention": nn.Module()})
    block["mlp"].experts = experts
    block["mlp"].gate = nn.Linear(H, E)
    block["mlp"].shared_expert_gate = nn.Linear(H, 1)
    block["mlp"].shared_expert = nn.ModuleDict({"gate_proj": nn.Linear(H, E), "up_proj": nn.Linear(H, E)})
    block["mlp"].router = nn.ModuleDict({"proj": nn.Linear(H, E), "wide": nn.Linear(H, H)})
    block["attention"].gate = nn.Linear(H, E)
    assert routers(block) == {"mlp.gate", "mlp.shared_expert_gate", "mlp.router.proj"}


@torch.no_grad()
def test_weights_that_are_not_there_come_and_go_with_the_forward(ours):
    experts, _ = ours
    block = nn.ModuleDict({"experts": experts})
    mine = routed()
    want = experts(*mine)
    state = {n: t.clone() for n, t in block.state_dict().items()}
    for linear in in_experts(block).values():
        linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"))
    there = []

    def get(name):
        there.append(sum(not linear.weight.is_meta for linear in in_experts(block).values()))
        return state[name]

    with Passing(block, get) as passing:
        assert torch.equal(experts(*mine), want)
        assert there == [0] * (3 * E) and all(p.is_meta for p in block.parameters())
        passing.stay, copied = True, copy.deepcopy(block)["experts"]
        passing.put("experts.3.up_proj", torch.zeros(INNER, H))
        assert not torch.equal(experts(*mine), want) and torch.equal(copied(*mine), want)
        passing.only(["experts.7.up_proj"])
        for model in (experts, copied):
            assert {n for n, p in model.named_parameters() if not p.is_meta} == {"7.up_proj.weight"}
    assert all(p.is_meta for p in block.parameters())
