"""SignRound: less error of the block's output on sequences it never trained on, or exactly where it began."""

from collections import UserDict

import pytest
import torch
from torch import nn

from llmq.algorithms import signround
from llmq.algorithms.rtn import Rtn
from llmq.algorithms.signround import SignRound
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import rescaled
from llmq.stats import Stats
from llmq.steps import BlockView
from llmq.types import LlmqError


class Block(nn.Module):
    """Two linears around a nonlinearity, a residual, and arguments per sequence, as a decoder block has."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, shift, *, gain=None, handed_on=None):
        handed_on["keys"] = (x[:, :1],)  # which a later block reads
        return (x + self.down(torch.relu(self.up(x + shift[0]))) * gain + handed_on["values"][0],)


def view(sequences=16, bits=2, sym=True, seed=0, batch=4, grid=None):
    block = Block()
    g = torch.Generator().manual_seed(3)
    inputs = [torch.randn(batch, 24, 32, generator=g) for _ in range(sequences // batch)]
    calls = [
        ((((torch.zeros(1, 24, 32),),), {"gain": torch.ones(batch, 1, 1), "handed_on": UserDict(values=(x[:, :1],))}))
        for x in inputs
    ]
    with torch.no_grad():
        outputs = [block(x, *args, **kwargs)[0] for x, (args, kwargs) in zip(inputs, calls, strict=True)]
        targets = {n: getattr(block, n).weight.detach().clone() for n in ("up", "down")}
        solved = {n: Rtn().solve(W_NK, grid or Int(bits, sym, 16), Stats()) for n, W_NK in targets.items()}
        for n, s in solved.items():
            getattr(block, n).weight.data = s.q.dequantize()
    return BlockView(block, solved, targets, inputs, outputs, calls, seed)


def error(v, solved, batches):
    """Return the squared output error relative to the energy, over whole batches."""
    weights = {f"{n}.weight": s.q.dequantize() for n, s in solved.items()}
    total = 0.0
    with torch.no_grad():
        for i in batches:
            args, kwargs = v.calls[i]
            out = torch.func.functional_call(v.block, weights, (v.inputs[i], *args), kwargs)[0]
            total += ((out - v.outputs[i]).square().sum(-1) / v.outputs[i].square().sum(-1)).mean().item()
    return total


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_lowers_the_error_of_the_output(bits, sym):
    v = view(bits=bits, sym=sym)
    with torch.no_grad():  # as quantize() runs it
        tuned = SignRound(steps=40).tune(v)
    assert error(v, tuned, range(4)) < 0.85 * error(v, v.solved, range(4))
    assert all(0 < s.report["signround"] < 1 for s in tuned.values())
    for n, s in tuned.items():
        before = v.solved[n].q
        assert s.q.codes.dtype == torch.uint8 and int(s.q.codes.max()) < 2**bits
        assert s.q.params.scale.dtype == before.params.scale.dtype
        assert torch.equal(s.q.params.zero, before.params.zero)


@pytest.mark.parametrize("grid", [Nvfp4(), Mxfp4(), Fp8(16), Fp8()], ids=str)
def test_lowers_the_error_of_small_floats_and_stores_what_files_hold(grid):
    v = view(grid=grid)
    with torch.no_grad():
        tuned = SignRound(steps=40).tune(v)
    assert error(v, tuned, range(4)) < 0.9 * error(v, v.solved, range(4))
    for n, s in tuned.items():
        before, after = v.solved[n].q, s.q
        assert torch.equal(rescaled(after.params, after.params.scale.float()).scale, after.params.scale)
        assert not grid.value.decode(after.codes).isnan().any()
        moved = (grid.value.decode(after.codes) != grid.value.decode(before.codes)).float().mean()
        assert moved < 0.5 and (moved > 0.01 or grid.bits == 8)  # of 8 bits the scales move first


def test_zeros_of_either_sign_are_one_value_to_tune():
    v = view(grid=Nvfp4())
    trial = signround._Trial(v.targets["up"], v.solved["up"].q)
    assert (v.solved["up"].q.codes == 8).any() and trial.values.high == 14
    assert torch.equal(trial.quantized().dequantize(), v.solved["up"].q.dequantize())
    assert (trial.place_NK - trial.ranks()).abs().max() <= 0.41


def test_never_trains_on_the_sequences_that_it_judges_by():
    v, seen = view(), {True: set(), False: set()}
    place = {tuple(x.flatten()[:4].tolist()): i for i, x in enumerate(torch.cat(v.inputs))}
    v.block.register_forward_pre_hook(
        lambda _, args: seen[torch.is_grad_enabled()].add(place[tuple(args[0].flatten()[:4].tolist())])
    )
    with torch.no_grad():
        SignRound(steps=20).tune(v)
    assert seen == {True: set(range(14)), False: {14, 15}}


def test_starts_from_the_solved_point():
    v = view(bits=3)
    for n, s in v.solved.items():
        trial = signround._Trial(v.targets[n], s.q)
        assert torch.equal(trial.quantized().codes, s.q.codes)
        assert torch.equal(trial.weight.detach(), s.q.dequantize())


def test_keeps_the_start_where_nothing_better_is_met():
    v = view(bits=4)
    tuned = SignRound(steps=4, lr=20.0, scale_lr=0.4).tune(v)
    for n, s in tuned.items():
        assert torch.equal(s.q.codes, v.solved[n].q.codes) and s.report["signround"] == 1.0


def test_same_seed_same_codes_and_another_seed_other_codes():
    first, again, other = (SignRound(steps=10).tune(view(seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[n].q.codes, again[n].q.codes) for n in first)
    assert any(not torch.equal(first[n].q.codes, other[n].q.codes) for n in first)


def test_the_batch_a_sequence_came_in_does_not_matter():
    four, one = (SignRound(steps=5).tune(view(batch=b)) for b in (4, 1))
    assert all(torch.equal(four[n].q.codes, one[n].q.codes) for n in four)


def test_falling_grids_are_tuned_too():
    v = view(bits=2)
    falling = {}
    for n, W_NK in v.targets.items():
        s = v.solved[n].q
        params = s.grid.params(
            torch.full_like(s.params.scale, 0.3).float(), torch.full_like(s.params.scale, -0.3).float()
        )
        codes = s.grid.nearest(W_NK, params.columns(W_NK.shape[1])).to(torch.uint8)
        falling[n] = type(v.solved[n])(type(s)(codes, params, s.grid))
    start = BlockView(v.block, falling, v.targets, v.inputs, v.outputs, v.calls, 0)
    assert error(v, SignRound(steps=40).tune(start), range(4)) < 0.85 * error(v, falling, range(4))


def test_one_sequence_is_too_few():
    with pytest.raises(LlmqError, match="at least 2"):
        SignRound().tune(view(sequences=1, batch=1))
