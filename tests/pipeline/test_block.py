"""A block is a function of the plan and the state that enters it; what it has read it lets go."""

import gc
import weakref

import pytest
import torch

from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration
from llmq.checkpoint.batches import Batches
from llmq.model.ends import embed
from llmq.model.lanes import Lanes
from llmq.pipeline.block import quantize_block
from llmq.pipeline.plan import Plan, prepare
from llmq.recipe import Recipe
from llmq.types import Site

CPU = torch.device("cpu")
IDS = torch.randint(2, 200, (8, 16), generator=torch.Generator().manual_seed(0))


def entered(plan, folder, batch=2, *, paired=True):
    """The calibration as it enters block 0, and beside it the float model's, with its files in a folder."""
    hidden, calls = embed(plan.skeleton, IDS.split(batch), CPU)
    states = Batches(folder / "00", "hidden", range(len(hidden))).filled(hidden)
    floats = Batches(folder / "00", "floats", range(len(hidden))).filled(hidden) if paired else Batches()
    dealt = Dealt.of([h[..., 0].numel() for h in hidden])
    return Calibration(states, floats, calls, calls if paired else (), ids=IDS, dealt=dealt)


def planned(folder, **options):
    return prepare(str(folder), Recipe(group_size=32, dtype="float32", **options), "cpu")


@pytest.mark.parametrize("method", ["gptq", "awq,qep,gptq,descent", "rtn,signround:steps=4"])
def test_the_same_state_gives_the_same_block(tiny_checkpoint, tmp_path, method):
    """So that a run can stop between any two blocks, and go on from what it kept."""
    plan = planned(tiny_checkpoint(), method=method, lm_head=True)
    with torch.no_grad():
        state = entered(plan, tmp_path)
        for i in range(len(plan.skeleton) + 1):
            tensors, report, after = quantize_block(plan, i, state)
            moved = [*after.hidden]
            again, report_again, after_again = quantize_block(plan, i, state)
            assert tensors.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in tensors.items())
            assert report.record.linears == report_again.record.linears != {}
            assert all(torch.equal(a, b) for a, b in zip(moved, after_again.hidden, strict=True))
            assert len(moved) == len(IDS) // 2 * (i < len(plan.skeleton))
            state = after
    assert [n for n in tensors if n.startswith("lm_head.")] and not any("norm" in n for n in tensors)


def test_no_batch_of_hidden_states_is_held_once_it_is_moved_on(tiny_checkpoint, tmp_path, monkeypatch):
    plan, finish, read, seen = planned(tiny_checkpoint(), method="gptq"), Lanes.finish, Batches._read, []
    old, new = [], []

    def watched(self):
        for out in finish(self):
            new.append(weakref.ref(out))
            gc.collect()
            seen.append([sum(ref() is not None for ref in refs) for refs in (old, new)])
            yield out
            del out

    def reading(self, number):
        batch = read(self, number)
        old.append(weakref.ref(batch))
        return batch

    with torch.no_grad():
        state = entered(plan, tmp_path, batch=1, paired=False)
        monkeypatch.setattr(Lanes, "finish", watched)
        monkeypatch.setattr(Batches, "_read", reading)
        quantize_block(plan, 0, state)
    left = range(len(IDS) - 1, -1, -1)
    assert len(old) == len(IDS) and seen == [[n, 1] for n in left]


def test_lanes_can_read_the_same_batches_again():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    hidden = [torch.ones(1, 2, 4)]
    with torch.no_grad():
        for _ in range(2):
            with Lanes(Block(), (Site(("a",)),), hidden, [((), {})]) as lanes:
                assert [x.shape for x in lanes.advance()] == [(2, 4)] and len(list(lanes.finish())) == 1


@pytest.mark.parametrize(("method", "most"), [("gptq", 1), ("rtn,signround:steps=2", 7)])
def test_no_codes_outlive_their_site_but_for_a_tuner(tiny_checkpoint, tmp_path, monkeypatch, method, most):
    plan, pack, alive, seen = planned(tiny_checkpoint(), method=method), Plan.packed, [], []

    def watched(self, name, q):
        alive.append(weakref.ref(q.codes))
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        return pack(self, name, q)

    monkeypatch.setattr(Plan, "packed", watched)
    with torch.no_grad():
        quantize_block(plan, 0, entered(plan, tmp_path))
    assert len(seen) == 7 and max(seen) == most
