"""A block run with something changed on the way, and the side tests that are not exact."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmq.model.trial import Trial, stored_gain
from llmq.types import Site


class Block(nn.Module):
    """Two linears, the second of which reads the first's output by heads of 4, mixed over tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
        self.gate = 1.0
        self.odd = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden, mix, kept=None):
        x = self.norm(hidden)
        y = mix @ self.inner["up"](x) * self.gate
        kept.update(y=y)
        return (hidden + self.inner["down"](y) + self.odd[0](x) + self.odd[1](x), None)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def trial(request):
    torch.manual_seed(0)
    block, hidden = Block().to(request.param), torch.randn(1, 5, 8, dtype=request.param)
    call = ((torch.randn(5, 5, dtype=request.param),), {"kept": {}})
    sites = [Site(("inner.up", "odd.0", "odd.1")), Site(("inner.down",))]
    with torch.no_grad():
        yield Trial(block, sites, hidden, call)


def test_outputs_and_inputs_are_changed_and_all_that_is_returned_is_seen(trial):
    was, twice = trial.as_it_is, trial.run({"inner.up": lambda out: 2 * out})
    assert torch.equal(twice.inputs[1], 2 * was.inputs[1]) and torch.equal(twice.inputs[0], was.inputs[0])
    changed = [not torch.equal(a, b) for a, b in zip(was.returned, twice.returned, strict=True)]
    assert changed == [True, False, True]  # what comes out, the mix, what is kept
    undone = trial.run({"inner.up": lambda out: 2 * out}, {"inner.down": lambda x: x / 2})
    assert torch.equal(undone.returned[0], was.returned[0])
    assert [tuple(x.shape) for x in was.inputs] == [(5, 8), (5, 16)]
    assert (trial.width("norm"), trial.width("inner.up")) == (8, 16)


def test_side_tests_run_in_float32_beside_the_block(trial):
    assert (trial.exact is trial) == (trial.hidden.dtype == torch.float32)
    assert trial.exact.run().returned[0].dtype == torch.float32
    assert next(trial.block.parameters()).dtype == trial.hidden.dtype
    assert trial.gain("norm") == "w"


def test_a_basis_passes_a_mix_of_tokens_and_no_gate_by_channels(trial):
    heads = torch.arange(16).reshape(4, 4)
    assert trial.passes_basis("inner.up", heads, 1)
    trial.exact.block.gate = torch.linspace(1, 2, 16)
    assert not trial.passes_basis("inner.up", heads, 1)


def test_the_parent_is_the_smallest_module_that_is_called_once(trial):
    assert trial.parent(("inner.up",)) == "inner.up"
    assert trial.parent(("inner.up", "odd.0")) == ""
    assert trial.parent(("odd.0", "odd.1")) == ""  # a list of modules is not called


@pytest.mark.parametrize(("norm", "gain"), [(LlamaRMSNorm, "w"), (GemmaRMSNorm, "1 + w"), (nn.LayerNorm, "w")])
def test_how_a_norm_stores_its_gain(norm, gain):
    torch.manual_seed(0)
    norm = norm(16)
    for p in norm.parameters():
        p.data.normal_()
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert stored_gain(norm, (x,), {}) == gain
