"""What blocks hand on beside the hidden states is part of the state between two of them."""

from collections import UserDict

import torch

from llmq.calibration import handed
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import Calibration, Probe
from llmq.checkpoint.batches import Batches


def state(folder, *, filled):
    """A state of two batches, whose blocks share a dictionary each; filled: as blocks left it."""
    draw = torch.Generator().manual_seed(0)

    def calls():
        shared = UserDict()
        if filled:
            keys, values = (torch.randn(2, 5, 3, 4, generator=draw).transpose(1, 2) for _ in range(2))
            shared.update({"full attention": (keys, values), "sliding_attention": (values[:1].bfloat16(),)})
        return [((), {"shared": shared, "mask": torch.ones(2)}), ((shared,), {})]

    hidden = Batches(folder, "hidden", range(2)).filled([torch.zeros(2, 5, 8)] * 2)
    probe = Probe(torch.zeros(1, 3, 8), calls())
    return Calibration(hidden, calls=[calls(), calls()], float_calls=[calls()], probe=probe, dealt=Dealt.of([10, 10]))


def shared_of(state):
    every = [*state.calls, *state.float_calls, state.probe.calls]
    assert all(calls[0][1]["shared"] is calls[1][0][0] for calls in every)
    return [calls[0][1]["shared"] for calls in every]


def test_what_was_handed_on_is_put_back_as_it_lay_in_memory(tmp_path):
    then, now = state(tmp_path / "00001", filled=True), state(tmp_path / "00001", filled=False)
    handed.keep(then)
    handed.put_back(now)
    for a, b in zip(shared_of(then), shared_of(now), strict=True):
        assert a.keys() == b.keys() and [len(v) for v in a.values()] == [len(b[k]) for k in a]
        for key, values in a.items():
            for x, y in zip(values, b[key], strict=True):
                assert torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride()
    assert len(Batches.found(tmp_path / "00001", "hidden", torch.device("cpu"))) == 2


def test_where_nothing_is_handed_on_nothing_is_written(tmp_path):
    handed.keep(state(tmp_path / "00001", filled=False))
    assert sorted(p.name for p in (tmp_path / "00001").iterdir()) == ["hidden-000000", "hidden-000001"]
    handed.keep(Calibration())
