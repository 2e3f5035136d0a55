"""Transforms leave the float function unchanged and lower the loss they claim to lower."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmq.algorithms import migrate
from llmq.algorithms._shares import shared
from llmq.algorithms.awq import Awq
from llmq.algorithms.smoothquant import SmoothQuant
from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.grids.int import Int
from llmq.grids.q4_0 import Q4_0
from llmq.model.folding import Fold, fold
from llmq.model.lanes import Lanes
from llmq.model.producers import find
from llmq.stats import AbsMax, AbsMean, Hessian, MeanSquare, Sample
from llmq.steps import Scaling, SiteView
from llmq.types import Producer, Scheme

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def make_block(kind="llama", kv_heads=2):
    """Return a block of a family, what enters it, with an outlier channel, and the rest of its call."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": kv_heads} | ({} if kind == "falcon" else {"head_dim": 16})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    block, calls = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)[0], []
    hook = block.register_forward_pre_hook(lambda m, a, k: calls.append((a[1:], k)), with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(1, 64, (2, 24)), use_cache=False)
    hook.remove()
    for p in block.parameters():
        p.data = torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 else 0.0)
    x = torch.randn(2, 24, 64)
    x[..., 5] *= 30
    return block, x, calls[0]


def views(block, x, call, grid, activation=None):
    """Collect every statistic at every site, and the calls of the parents, from one batch."""
    modules, recorded = dict(block.named_modules()), {}
    with torch.no_grad():
        sites = find(block, x, call, 16).sites

    def record(name):
        return lambda m, a, k: recorded.setdefault(name, []).append((a, k))

    hooks = [modules[s.parent].register_forward_pre_hook(record(s.parent), with_kwargs=True) for s in sites]
    out = []
    with torch.no_grad(), Lanes(block, sites, [x], [call]) as lanes:
        for site in sites:
            kinds = (AbsMax, AbsMean, MeanSquare, Sample, Hessian)
            stats = collect(kinds, lanes.advance(), Dealt.of([x.shape[:-1].numel()]))
            if site.parent not in site.linears:
                stats.pop(Hessian)
            out.append((site, stats))
    for h in hooks:
        h.remove()
    scheme = grid and Scheme(grid, activation)
    schemes = lambda site: [scheme] * len(site.linears)  # noqa: E731
    return [SiteView(s, modules, st, recorded.get(s.parent, []), schemes(s)) for s, st in out]


def apply(block, view, scaling, stored=torch.float32):
    """Fold what a transform found into the block."""
    by = Fold("step", 0, view.site.linears, view.site.producer, scaling.scale)
    fold({n: p.data for n, p in block.named_parameters()}, by, lambda name: stored)


def run(block, x, call):
    with torch.no_grad():
        out = block(x, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


FAMILIES = ["gemma3_text", "phi3", "glm4", "cohere", "olmo2", "falcon", "starcoder2"]


@pytest.mark.parametrize(
    ("kind", "kv_heads"), [(k, n) for k in ("llama", "qwen2") for n in (1, 2, 4)] + [(k, 2) for k in FAMILIES]
)
@pytest.mark.parametrize(
    "step",
    [Awq(), SmoothQuant(linears=False), SmoothQuant(alpha=0.5), migrate.Migrate()],
    ids=["awq", "norms", "smoothquant", "migrate"],
)
def test_the_float_function_is_unchanged(kind, kv_heads, step):
    nothing = kind == "olmo2" and step == SmoothQuant(linears=False)  # whose norms stand behind the linears
    block, x, call = make_block(kind, kv_heads)
    before = run(block, x, call)
    weights = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        found = [(v, step.search(v)) for v in views(block, x, call, Int(4, True, 32)) if step.needs(v.site)]
        assert any(scaling for _, scaling in found) != nothing
        assert all(torch.equal(weights[k], v) for k, v in block.state_dict().items())  # a search changes nothing
        for view, scaling in found:
            if scaling:
                apply(block, view, scaling)
    assert any(not torch.equal(weights[k], v) for k, v in block.state_dict().items()) != nothing
    torch.testing.assert_close(run(block, x, call), before, rtol=2e-4, atol=2e-4 * before.abs().max().item())


@pytest.mark.parametrize("grid", [Int(3, True, 32), Q4_0()], ids=["int", "ggml"])
def test_awq_reports_a_lower_loss_than_no_scaling(grid):
    block, x, call = make_block()
    with torch.no_grad():
        found = [f for v in views(block, x, call, grid) if (f := Awq().search(v))]
    reports = [f.report["awq"] for f in found]
    assert reports and all(r["loss_over_unscaled"] < 1 and 0 < r["ratio"] < 1 for r in reports)
    assert min(r["loss_over_unscaled"] for r in reports) < 0.9  # the site that reads the outlier channel


def test_awq_leaves_a_site_of_float_linears_alone():
    block, x, call = make_block()
    with torch.no_grad():
        assert all(Awq().search(v) is None for v in views(block, x, call, None))


def test_smoothquant_scales_by_its_formula():
    block, x, call = make_block()
    view = views(block, x, call, Int(8))[0]
    w_max = torch.stack([view.modules[n].weight.abs().amax(0) for n in view.site.linears]).amax(0)
    want = view.stats[AbsMax].max ** 0.8 / w_max**0.2
    gain = view.modules["input_layernorm"].weight.clone()
    with torch.no_grad():
        scaling = SmoothQuant(0.8).search(view)
        apply(block, view, scaling)
    torch.testing.assert_close(scaling.scale, want)
    torch.testing.assert_close(view.modules["input_layernorm"].weight, gain / want)


DYNAMIC, STATIC = Int(8, True, "channel"), Int(8, True, "tensor")


def product_errors(view, scale_K):
    """The squared error of the site's products, a token on average, when everything is rounded to nearest."""
    X_TK = view.stats[Sample].rows
    x, error = X_TK / scale_K, 0.0
    for name, scheme in zip(view.site.linears, view.schemes, strict=True):
        W_NK = view.modules[name].weight.detach()
        params = scheme.weight.fit(W_NK * scale_K).columns(W_NK.shape[1])
        W = scheme.weight.decode(scheme.weight.nearest(W_NK * scale_K, params), params)
        if scheme.activation:
            step = (x.abs().amax(1, keepdim=True) if not scheme.static else x.abs().amax()) / 127
            x = (x / step).round() * step
        error += (x @ W.T - X_TK @ W_NK.T).square().sum(1).mean().item()
    return error


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("activation", [DYNAMIC, STATIC, None], ids=["token", "tensor", "weights"])
def test_migrate_expects_the_error_that_rounding_makes(activation, per_tensor):
    block, x, call = make_block()
    for p in block.parameters():
        p.data *= torch.linspace(0.5, 2, len(p)).view(-1, *[1] * (p.dim() - 1))  # rows of unequal size
    grid = Int(8, group="tensor" if per_tensor else "channel" if activation else 32)
    for view in views(block, x, call, grid, activation):
        scale_K = torch.rand(view.modules[view.site.linears[0]].weight.shape[1]) + 0.5
        scale_K *= (view.stats[AbsMax].max / scale_K).max()  # as static scales want it
        expected = migrate._ExpectedError(view, feedback=1.0)(scale_K)[0] / 12
        rel = 0.3 if activation is STATIC else 0.15  # many values are smaller than a static step, and err by less
        assert expected == pytest.approx(product_errors(view, scale_K), rel=rel)


@pytest.mark.parametrize("activation", [DYNAMIC, STATIC, None], ids=["token", "tensor", "weights"])
def test_the_error_that_migrate_lowers_is_convex_in_the_logarithms(activation):
    block, x, call = make_block()
    for view in views(block, x, call, Int(4, group=32), activation):
        error = migrate._ExpectedError(view, feedback=0.5)
        a, b = torch.randn(2, view.modules[view.site.linears[0]].weight.shape[1])
        (at_a, slope_K), (at_b, _), (between, _) = (error(p.exp()) for p in (a, b, (a + b) / 2))
        assert between < math.sqrt(at_a * at_b)
        nearby, _ = error((a + 1e-3 * b).exp())
        assert nearby - at_a == pytest.approx(1e-3 * (b @ slope_K).item(), rel=0.05)


@pytest.mark.parametrize("activation", [DYNAMIC, STATIC], ids=["token", "tensor"])
def test_only_ratios_of_activations_move_migrate(activation):
    block, x, call = make_block()
    view, scales = views(block, x, call, Int(8, group="channel"), activation)[-1], []
    for factor in (1, 100):
        for stat, name, power in ((AbsMax, "max", 1), (Sample, "rows", 1), (MeanSquare, "sum", 2)):
            view.stats[stat].totals[name] = view.stats[stat].totals[name] * factor**power
        with torch.no_grad():
            scales.append(migrate.Migrate().search(view).scale)
    torch.testing.assert_close(*scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize("activation", [DYNAMIC, STATIC], ids=["token", "tensor"])
def test_migrate_lowers_the_error_of_rounded_products_below_smoothquants(activation):
    block, x, call = make_block()
    errors = []
    for step in (migrate.Migrate(feedback=1.0), SmoothQuant()):
        sites = views(block, x, call, Int(8, group="channel"), activation)
        with torch.no_grad():
            found = [step.search(view) for view in sites]
        errors.append([product_errors(view, f.scale) for view, f in zip(sites, found, strict=True)])
        if isinstance(step, migrate.Migrate):
            assert all(f.report["migrate"]["expected_error_over_start"] < 1 for f in found)
    ours, theirs = errors
    assert all(a < b for a, b in zip(ours, theirs, strict=True))


def test_a_stored_dtype_rounds_the_gain_and_the_columns_take_the_exact_ratio():
    block, x, call = make_block()
    before = run(block, x, call)
    view = views(block, x, call, Int(4))[0]
    with torch.no_grad():
        apply(block, view, Scaling(torch.rand(64) + 0.5, {}), torch.bfloat16)
    gain = view.modules["input_layernorm"].weight
    assert torch.equal(gain, gain.bfloat16().float())
    torch.testing.assert_close(run(block, x, call), before, rtol=2e-4, atol=2e-4 * before.abs().max().item())


@pytest.mark.parametrize(("largest", "wanted"), [(False, [2.5, 5, 5, 2.5, 4]), (True, [3, 6, 6, 3, 4])])
def test_channels_that_one_row_feeds_share_a_scale(largest, wanted):
    values = torch.tensor([2.0, 4, 6, 3, 4])
    assert shared(values, Producer("a"), largest=largest) is values
    assert shared(values, Producer("a", (5, 1, 1, 5, 7)), largest=largest).tolist() == wanted
