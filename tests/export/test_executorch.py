"""What XNNPACK does not compute with is refused before any work, and a program that computes something else.

scripts/interop_executorch.py runs what is written.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from llmq.export import executorch
from llmq.export._run import export
from llmq.export._target import open_packed
from llmq.grids.int import Int
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme

GOLDEN = Path(__file__).parents[1] / "golden"


def test_without_the_packages_the_way_to_them_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"pip install 'llmq-quant\[executorch\]'"):
        export(str(GOLDEN / "ct_pack_w4g32_sym"), tmp_path / "out", to="executorch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [("ct_pack_w4g32_asym", "symmetric integers of 4 bits"), ("ct_pack_w3g32", "symmetric integers of 4 bits"),
     ("ct_fp8_static", "symmetric integers of 4 bits"), ("gptq_v1_w4_perchannel", "groups of a multiple of 32"),
     ("ct_int_w8a8_static", "symmetric integers of 4 bits")],
)  # fmt: skip
def test_other_grids_are_refused_with_what_to_do(name, said):
    with pytest.raises(LlmqError, match=f"model.layers.0.* XNNPACK computes with {said}.*--for executorch"):
        executorch.ExecuTorch().check(open_packed(str(GOLDEN / name)))


def test_inputs_by_scales_of_the_checkpoint_are_refused():
    four, eight = Int(4, True, 32), Int(8, True, "tensor")
    assert executorch.obstacle(LinearSpec("x", 8, 64, Scheme(four))) is None
    assert "inputs that it rounds itself" in str(executorch.obstacle(LinearSpec("x", 8, 64, Scheme(four, eight))))


def test_scales_that_bfloat16_does_not_hold_are_refused_and_others_kept():
    q = QTensor.rounded(torch.randn(8, 64), Int(4, True, 32, "minmax"))
    with pytest.raises(LlmqError, match="x: XNNPACK rounds scales to bfloat16, and 1. are none"):
        executorch.levels("x", q)
    exact = replace(q, params=replace(q.params, scale=q.params.scale.bfloat16()))
    codes, scale = executorch.levels("x", exact)
    assert torch.equal(codes.float() * scale.repeat_interleave(32, 1), exact.dequantize())
    with pytest.raises(LlmqError, match="activation order"):
        executorch.levels("x", replace(exact, g_idx=torch.randperm(64) // 32))


def test_negative_scales_are_refused_by_name(monkeypatch):
    opened = open_packed(str(GOLDEN / "ct_pack_w4g32_sym"))
    name = next(iter(opened.packed.linears))
    falling = opened.packed.qtensor(name)
    falling = replace(falling, params=replace(falling.params, scale=-falling.params.scale))
    monkeypatch.setattr(opened.packed, "qtensor", lambda _: falling)
    with pytest.raises(LlmqError, match=f"{name}: .* scales are negative, which XNNPACK does not hold.*shift=false"):
        executorch.ExecuTorch().refuse_falling(opened)


@pytest.mark.parametrize("what", ["codes", "scales"])
def test_a_program_with_another_code_or_scale_in_one_place_is_refused(what):
    codes, scale = torch.randint(-8, 8, (8, 64), dtype=torch.int8), torch.rand(8, 2).bfloat16().float()
    u, bits = codes.numpy().astype("uint8") + 8 & 15, scale.bfloat16().view(torch.int16).numpy()
    program = b"before" + bits.tobytes() + b"between" + (u[:, 0::2] + 16 * u[:, 1::2]).tobytes() + b"behind"
    executorch.require_held(program, "x", codes, scale)
    other = codes if what == "codes" else scale
    other[5, 1] += 1 if other[5, 1] < 7 else -1
    with pytest.raises(LlmqError, match=f"x: its {what} are not in ExecuTorch's program"):
        executorch.require_held(program, "x", codes, scale)


def _eight(model):
    """Let the linears of the blocks round their inputs to 8 bits a token, as XNNPACK does."""

    def hook(linear, args):
        (x,) = args
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale

    for linear in model.model.layers.modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(hook)
    return model


def _run(model, shift=0, forget=False):
    """Return torch's model as a program with a cache. shift: of the positions behind the first."""
    cache = DynamicCache()

    @torch.no_grad()
    def program(ids, at):
        nonlocal cache
        if forget or at[0] == 0:
            cache = DynamicCache()
        return model(ids, position_ids=(at + shift * (at > 0))[None], past_key_values=cache).logits

    return program


def _scaled(module, by):
    module.weight.data.mul_(by)


_FAULTS = {
    "a rope of other frequencies": lambda m: m.model.rotary_emb.inv_freq.mul_(0.9),
    "a scale that is two hundredths up": lambda m: _scaled(m.model.layers[4].mlp.down_proj, 1.02),
    "a norm's weight": lambda m: _scaled(m.model.layers[3].input_layernorm, 1.02),
    "no mask": lambda m: [setattr(b.self_attn, "is_causal", False) for b in m.model.layers],
    "another softmax": lambda m: [setattr(b.self_attn, "scaling", 0.9 * b.self_attn.scaling) for b in m.model.layers],
}


def _require_close(wanted, program):
    ids, logits, moved = (torch.tensor(wanted[name]) for name in ("ids", "logits", "moved"))
    executorch.require_close(executorch.answers(program, ids), logits, moved)


@pytest.fixture
def eight(tiny_llama):
    return lambda: _eight(tiny_llama(num_hidden_layers=8, attn_implementation="sdpa"))


def test_a_program_that_computes_something_else_is_refused(eight):
    wanted = executorch.recorded(eight())
    _require_close(wanted, _run(eight()))
    wrong = [_run(eight(), shift=1), _run(eight(), forget=True)]
    for fault in _FAULTS.values():
        fault(model := eight())
        wrong.append(_run(model))
    for program in wrong:
        with pytest.raises(LlmqError, match="other logits than the model has: .* times the power"):
            _require_close(wanted, program)


def test_inputs_that_round_elsewhere_are_not_refused_however_many(eight, monkeypatch):
    """Sums that differ by far more than float32's stand for a model of many more blocks: no token is without ties."""
    monkeypatch.setattr(executorch, "_JITTER", 1e-4)
    wanted = executorch.recorded(eight())
    signal = torch.tensor(wanted["logits"]).square().sum(-1)
    assert bool((torch.tensor(wanted["moved"]) > 1e-5 * signal).float().mean() > 0.9)
    for seed in range(10, 14):
        with executorch._jittered(model := eight(), seed):
            _require_close(wanted, _run(model))
    _FAULTS["no mask"](model := eight())
    with pytest.raises(LlmqError, match="other logits"):
        _require_close(wanted, _run(model))
