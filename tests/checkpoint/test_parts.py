"""A part read alone is what it is in the whole tensor, and no more of the file is read."""

import pytest
import torch
from safetensors.torch import save_file

from llmq.checkpoint.parts import Fused, Place, part_of, rejoined
from llmq.guard.reading import tensor_entries

E, N, K = 3, 4, 6


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_rows_of_an_expert(transposed, interleaved, turned, tmp_path):
    whole = torch.randn(E, 2 * N, K)
    model = whole.mT.contiguous() if transposed else whole
    save_file({"before": torch.ones(5), "gate_up_proj": model.mT.contiguous() if turned else model}, tmp_path / "a")
    fused = Fused(tuple(model.shape), ("gate_proj", "up_proj"), "weight", transposed, interleaved)
    stored = tensor_entries(tmp_path / "a")["gate_up_proj"]
    assert fused.fits(stored.shape) is turned
    assert [n for n, _, _ in fused.names()][:3] == ["0.gate_proj.weight", "0.up_proj.weight", "1.gate_proj.weight"]
    entries = {name: part_of(stored, Place("gate_up_proj", fused, e, place)) for name, e, place in fused.names()}
    for name, e, place in fused.names():
        part = entries[name]
        want = whole[e, place::2] if interleaved else whole[e, place * N : (place + 1) * N]
        got = part.read()
        assert torch.equal(got, want) and got.is_contiguous() and part.shape == part.meta().shape == (N, K)
        assert part.nbytes == got.nbytes and part.dtype == "F32" and part.name == "gate_up_proj"
    again = rejoined(entries, {name: part.read() for name, part in reversed(entries.items())})
    assert again.keys() == {"gate_up_proj"} and torch.equal(again["gate_up_proj"], stored.read())


@pytest.mark.parametrize("interleaved", [False, True])
def test_biases(interleaved, tmp_path):
    whole = torch.randn(E, 2 * N)
    save_file({"gate_up_proj_bias": whole}, tmp_path / "a")
    fused = Fused((E, 2 * N), ("gate_proj", "up_proj"), "bias", interleaved=interleaved)
    stored = tensor_entries(tmp_path / "a")["gate_up_proj_bias"]
    entries = {name: part_of(stored, Place("gate_up_proj_bias", fused, e, place)) for name, e, place in fused.names()}
    for name, e, place in fused.names():
        want = whole[e, place::2] if interleaved else whole[e].chunk(2)[place]
        assert torch.equal(entries[name].read(), want)
    biases = {name: entry.read() for name, entry in entries.items()}
    assert rejoined(entries, biases).keys() == biases.keys()  # their weights are packed, one by one
    weights = {name.replace("bias", "weight"): torch.zeros(N, K) for name in biases}
    again = rejoined(entries, biases | weights)
    assert again.keys() == {"gate_up_proj_bias", *weights} and torch.equal(again["gate_up_proj_bias"], whole)


def test_only_the_expert_is_read(tmp_path):
    save_file({"down_proj": torch.randn(E, N, K)}, tmp_path / "a")
    stored = tensor_entries(tmp_path / "a")["down_proj"]
    part = part_of(stored, Place("down_proj", Fused((E, N, K), ("down_proj",), "weight"), 0, 0))
    want = part.read()
    with (tmp_path / "a").open("r+b") as f:
        f.truncate(stored.start + part.nbytes)  # the file ends behind expert 0
    assert torch.equal(part.read(), want)


def test_a_shape_that_is_neither_way_round():
    fused = Fused((E, N, K), ("down_proj",), "weight")
    assert fused.fits((E, K, N)) is True and fused.fits((E, N, N)) is None and fused.fits(()) is None
