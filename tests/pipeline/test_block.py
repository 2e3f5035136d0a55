"""A block is a function of the plan and the state that enters it; what it has read it lets go."""

import copy
import gc
import weakref

import pytest
import torch

from llmq.calibration.state import Calibration
from llmq.model.ends import embed
from llmq.model.lanes import Batches, Lanes
from llmq.pipeline.block import quantize_block
from llmq.pipeline.plan import prepare
from llmq.recipe import Recipe
from llmq.types import Site

CPU = torch.device("cpu")
IDS = torch.randint(2, 200, (8, 16), generator=torch.Generator().manual_seed(0))


def entered(plan, batch=2, *, paired=True):
    """The calibration as it enters block 0, and beside it the float model's."""
    hidden, calls = embed(plan.skeleton, IDS.split(batch), CPU)
    return Calibration(Batches(hidden), Batches(hidden if paired else ()), calls, calls if paired else (), ids=IDS)


def planned(folder, **options):
    return prepare(str(folder), Recipe(group_size=32, dtype="float32", **options), "cpu")


@pytest.mark.parametrize("method", ["gptq", "awq,qep,gptq,descent", "rtn,signround:steps=4"])
def test_the_same_state_gives_the_same_block(tiny_checkpoint, method):
    """So that a run can stop between any two blocks, and go on from what it kept."""
    plan = planned(tiny_checkpoint(), method=method, lm_head=True)
    with torch.no_grad():
        state = entered(plan)
        for i in range(len(plan.skeleton) + 1):
            kept = copy.deepcopy(state)
            tensors, report, after = quantize_block(plan, i, state)
            again, report_again, after_again = quantize_block(plan, i, kept)
            assert tensors.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in tensors.items())
            assert report.record.linears == report_again.record.linears != {}
            assert [torch.equal(a, b) for a, b in zip(after.hidden, after_again.hidden, strict=True)] == (
                [True] * len(after.hidden)
            )
            state = after
    assert [n for n in tensors if n.startswith("lm_head.")] and not any("norm" in n for n in tensors)


def test_a_state_is_used_once(tiny_checkpoint):
    plan = planned(tiny_checkpoint(), method="gptq")
    with torch.no_grad():
        state = entered(plan)
        quantize_block(plan, 0, state)
        with pytest.raises(ValueError, match="a state is used once"):
            quantize_block(plan, 0, state)


def test_old_and_new_hidden_states_are_never_held_together(tiny_checkpoint, monkeypatch):
    plan, finish, most = planned(tiny_checkpoint(), method="gptq"), Lanes.finish, []
    with torch.no_grad():
        state = entered(plan, batch=1, paired=False)
        old = [weakref.ref(h) for h in state.hidden]

        def watched(self):
            new = []
            for out in finish(self):
                new.append(out)
                gc.collect()
                most.append(len(new) + sum(ref() is not None for ref in old))
                yield out

        monkeypatch.setattr(Lanes, "finish", watched)
        quantize_block(plan, 0, state)
    assert len(most) == len(IDS) and max(most) <= len(IDS) + 1


def test_batches_are_forgotten_as_they_are_taken():
    batches = Batches(torch.zeros(1) for _ in range(3))
    refs = [weakref.ref(b) for b in batches]
    taken = batches.taken()
    for i in range(3):
        next(taken)
        assert [ref() is None for ref in refs] == [n <= i for n in range(3)]
    with pytest.raises(ValueError, match="taken"):
        len(batches)


def test_lanes_that_are_not_the_last_leave_the_batches_there():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    hidden = Batches([torch.ones(1, 2, 4)])
    with torch.no_grad():
        for _ in range(2):
            with Lanes(Block(), (Site(("a",)),), hidden, [((), {})]) as lanes:
                assert [x.shape for x in lanes.advance()] == [(2, 4)] and len(list(lanes.finish())) == 1
    assert len(hidden) == 1
