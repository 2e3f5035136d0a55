"""Squared gradients, block by block, equal those of the whole model; weights of tokens reach the sums they should."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from llmq.algorithms.fisher import Fisher
from llmq.algorithms.gptq import Gptq
from llmq.calibration import token_gradients
from llmq.calibration.collect import collect
from llmq.calibration.dealing import Dealt
from llmq.checkpoint import Source
from llmq.model.ends import embed
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.stats import Drift, Hessian, MeanSquare
from llmq.types import LlmqError

IDS = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def found(folder, batch=2):
    skeleton = Skeleton(Source(folder), torch.float32)
    with torch.no_grad():
        hidden, calls = embed(skeleton, IDS.split(batch), CPU)
        seeds = [token_gradients.seed_of(5, n) for n in range(len(hidden))]
        squares = token_gradients.squared_gradients(skeleton, hidden, calls, CPU, seeds, lambda *_: None)
    assert all(len(s) == len(IDS) // batch for s in squares.values())
    return {n: torch.cat(s) for n, s in squares.items()}


def whole(model, batch=2):
    """The same by one backward of the whole model; the labels of a batch are drawn by its number."""
    out = {}
    for number, ids in enumerate(IDS.split(batch)):
        draw, outputs = torch.Generator().manual_seed((5 << 32) + number), {}
        hooks = [
            m.register_forward_hook(lambda _m, _a, z, n=n, into=outputs: into.__setitem__(n, z))
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        ]
        log_p = model(ids).logits.log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=draw)
        loss = -log_p.flatten(0, 1).gather(1, labels).sum()
        got = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
        for n, g in got.items():
            out.setdefault(n, []).append(g.square().mean(-1).flatten())
        for h in hooks:
            h.remove()
    return {n: torch.cat(s) for n, s in out.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [MistralConfig, Qwen3Config])
def test_equal_those_of_the_whole_model(config, tied, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path)
    want, got = whole(model), found(tmp_path)
    assert set(got) == set(want) and len(got) == 21
    for name, s in got.items():
        assert s.shape == (IDS.numel(),) and s.min() >= 0 and s.max() > 0
        torch.testing.assert_close(s, want[name], rtol=2e-3, atol=1e-7)
    monkeypatch.setattr(token_gradients, "_HELD", 1)  # one batch at a time
    again = found(tmp_path)
    for name, s in got.items():
        torch.testing.assert_close(s, again[name])


def test_fisher_weighs_by_the_relative_gradient():
    squares = [torch.tensor([1.0, 4.0, 9.0, 2.0]), torch.tensor([10.0, 40.0, 90.0, 20.0])]
    torch.testing.assert_close(Fisher(power=1.0).weigh(squares), squares[0] / 4)
    torch.testing.assert_close(Fisher(power=0.0).weigh(squares), torch.ones(4))
    half = Fisher().weigh(squares)
    torch.testing.assert_close(half, squares[0].sqrt() / squares[0].sqrt().mean())
    assert torch.isfinite(Fisher().weigh([torch.zeros(3)])).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Fisher(power=2.0)


def test_sums_of_products_are_weighed_and_no_others():
    X, F, w = torch.randn(8, 5), torch.randn(8, 5), torch.rand(8)
    roots, kinds = w.sqrt()[:, None], (Hessian, Drift, MeanSquare)
    stats = collect(kinds, [X[:4], X[4:]], Dealt.of([4, 4]), iter([F[:4], F[4:]]), iter([roots[:4], roots[4:]]))
    torch.testing.assert_close(stats[Hessian].mean(), (X * w[:, None]).T @ X / 8)
    torch.testing.assert_close(stats[Drift].whole("fit") + stats[Drift].whole("held"), ((F - X) * w[:, None]).T @ X)
    torch.testing.assert_close(stats[MeanSquare].mean(), X.square().mean(0))


def test_a_token_counts_by_its_weight_in_every_sum_of_products(tiny_checkpoint, prose, tmp_path, monkeypatch):
    """Not by its square: an activation is multiplied by the root of the weight, and then by another such activation."""
    text, sums, solve = tmp_path / "calibration.txt", [], Gptq.solve
    text.write_text(prose(400))

    def watched(self, W_NK, grid, stats):
        sums.append(stats[Hessian].mean().clone())
        return solve(self, W_NK, grid, stats)

    monkeypatch.setattr(Gptq, "solve", watched)
    monkeypatch.setattr(Fisher, "weigh", lambda self, squares: torch.full_like(squares[0], 9.0**self.power))
    folder = str(tiny_checkpoint(num_hidden_layers=1))
    for power in (0, 1):
        method = f"fisher:power={power},gptq"
        recipe = Recipe(method=method, group_size=32, samples=4, seq_len=32, calib=str(text), dtype="float32")
        quantize(prepare(folder, recipe, "cpu"), tmp_path / str(power))
    torch.testing.assert_close(sums[len(sums) // 2], 9 * sums[0])  # the first site's, whose inputs are alike in both


def test_the_main_job_weighs_tokens(tiny_checkpoint, prose, tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text(prose(2000))
    folder = tiny_checkpoint()
    files = {}
    for method in ("gptq", "fisher:power=0,gptq", "fisher,gptq", "fisher,qep,gptq,descent"):
        out = tmp_path / method.replace(":", "-").replace(",", "-")
        recipe = Recipe(method=method, group_size=32, samples=8, seq_len=32, calib=str(text), dtype="float32")
        quantize(prepare(str(folder), recipe, "cpu"), out)
        files[method] = (out / "model.safetensors").read_bytes()
        assert json.loads((out / "quantization.json").read_text())["recipe"]["method"] == method
    assert files["fisher:power=0,gptq"] == files["gptq"] != files["fisher,gptq"]
    with pytest.raises(LlmqError, match="is a weighting and cannot follow a weighting"):
        prepare(str(folder), Recipe(method="fisher,fisher,gptq"), "cpu")
