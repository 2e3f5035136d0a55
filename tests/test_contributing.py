"""The files that CONTRIBUTING.md shows: each, added to llmq and nothing else changed, does what is said of it."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import llmq
from llmq import cli, registry
from llmq.checkpoint import Source
from llmq.pipeline.method import method_of
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.runtime import backends
from llmq.runtime.linear import QuantLinear

ROOT = Path(__file__).parents[1]
SHOWN = dict(re.findall(r"```python\n# (llmq/\S+)\n(.*?)```", (ROOT / "docs/CONTRIBUTING.md").read_text(), re.DOTALL))


@pytest.fixture
def added(tmp_path, monkeypatch):
    """`added(path)`: put the file that CONTRIBUTING.md shows into its folder of llmq, for the length of a test."""

    def add(path):
        folder, name = path.rsplit("/", 1)
        package = importlib.import_module(folder.replace("/", "."))
        own = tmp_path / "added" / folder
        own.mkdir(parents=True)
        (own / name).write_text(SHOWN[path])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(own)])
        monkeypatch.delitem(sys.modules, path.removesuffix(".py").replace("/", "."), raising=False)
        importlib.invalidate_caches()

    yield add
    for path in SHOWN:
        sys.modules.pop(path.removesuffix(".py").replace("/", "."), None)


def run(folder, out, **options):
    quantize(prepare(str(folder), Recipe(group_size=32, dtype="float32", **options), "cpu"), out)
    return json.loads((out / "quantization.json").read_text())["linears"]


def test_every_kind_is_shown_and_documented():
    folders = {path.rsplit("/", 1)[0] for path in SHOWN}
    assert folders == {
        f"llmq/{n}" for n in ("algorithms", "grids", "formats", "families", "runtime/backends", "report/plots")
    }
    for path, text in SHOWN.items():
        tree = ast.parse(text)
        assert ast.get_docstring(tree) and all(ast.get_docstring(n) for n in tree.body if isinstance(n, ast.ClassDef))
        assert not (ROOT / path).exists()


def test_an_algorithm(added, tiny_checkpoint, tmp_path, capsys):
    added("llmq/algorithms/stochastic.py")
    folder = tiny_checkpoint()
    errors = {}
    for method in ("rtn", "stochastic", "stochastic:seed=1"):
        lines = run(folder, tmp_path / method.replace(":", "-"), method=method)
        errors[method] = sum(line["weight_error"] for line in lines.values())
    assert errors["rtn"] < errors["stochastic"] < 3 * errors["rtn"]
    assert errors["stochastic"] != errors["stochastic:seed=1"]
    with pytest.raises(llmq.LlmqError, match="stochastic has no option 'sed'"):
        registry.load("algorithms", "stochastic:sed=1")
    cli.list_()
    assert "Stochastic: round up or down by chance" in " ".join(capsys.readouterr().out.split())


def test_a_grid(added, tiny_checkpoint, tmp_path, prose, capsys):
    folder, source = tiny_checkpoint(), Source(tiny_checkpoint())
    (tmp_path / "calib.txt").write_text(prose(2000))
    calibration = {"samples": 4, "seq_len": 32, "calib": str(tmp_path / "calib.txt")}
    with pytest.raises(llmq.LlmqError, match="'ternary' is none of llmq's grids"):
        method_of(Recipe(weights="ternary"), torch.float32)
    added("llmq/grids/ternary.py")
    for method in ("rtn", "gptq"):
        given = {"weights": "ternary:group=32", "method": method, "format": "compressed-tensors", "dtype": "float32"}
        out = tmp_path / method
        quantize(prepare(str(folder), Recipe(**given, **calibration), "cpu"), out)
        line = json.loads((out / "quantization.json").read_text())["linears"]["model.layers.0.mlp.up_proj"]
        assert line["bits"] == 2 and "2-bit weights" in (out / "README.md").read_text()
        for name, module in llmq.load(out, dtype=torch.float32, backend="reference").named_modules():
            if isinstance(module, QuantLinear):
                W_NK = source.get(f"{name}.weight").float()
                groups, scale_NG1 = W_NK.unflatten(1, (-1, 32)), module.unpack().params.scale.float()[..., None]
                large = groups.abs() > 0.7 * groups.abs().mean(-1, keepdim=True)
                torch.testing.assert_close(
                    scale_NG1, (groups.abs() * large).sum(-1, keepdim=True) / large.sum(-1, keepdim=True)
                )
                levels = module.dequantize().unflatten(1, (-1, 32)) / scale_NG1
                assert set(levels.unique().tolist()) == {-1.0, 0.0, 1.0}
                if method == "rtn":
                    assert torch.equal(levels, (groups / scale_NG1).round().clamp(-1, 1))
    with pytest.raises(llmq.LlmqError, match="a Ternary grid has 2 bits, not 3; leave --target-bpw out"):
        prepare(str(folder), Recipe(weights="ternary:group=32", target_bpw=3.0), "cpu")
    cli.list_()
    assert "Ternary: -s, 0 and s, with s chosen as in" in " ".join(capsys.readouterr().out.split())


def test_a_format(added, tiny_checkpoint, tmp_path):
    added("llmq/formats/plain.py")
    plan = prepare(str(tiny_checkpoint()), Recipe(group_size=32, method="rtn", bits=3, format="plain"), "cpu")
    assert plan.warnings[-1] == "no runtime reads plain checkpoints"
    record = quantize(plan, tmp_path / "out", check=False)
    written = Source(tmp_path / "out")
    assert written.config["quantization_config"]["bits"] == dict.fromkeys(record["linears"], 3)
    for name, spec in plan.linears.items():
        stored = {local: written.get(f"{name}.{local}") for local in ("codes", "scale", "zero")}
        layout = plan.method.format.layout(spec)
        assert {n: (t.shape, t.dtype) for n, t in stored.items()} == {n: (t.shape, t.dtype) for n, t in layout.items()}
        W_NK = plan.source.get(f"{name}.weight").float()
        Q_NK = plan.method.format.unpack(stored, spec).dequantize()
        error = ((Q_NK - W_NK).square().sum() / W_NK.square().sum()).item()
        assert error == pytest.approx(record["linears"][name]["weight_error"], rel=1e-5)


def test_a_family(added, tmp_path, prose, tokenizer_bos):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer_bos), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer_bos.save_pretrained(tmp_path / "m")
    (tmp_path / "calib.txt").write_text(prose(2000))
    options = {"method": "awq,rtn", "samples": 4, "seq_len": 32, "calib": str(tmp_path / "calib.txt")}
    lines = run(tmp_path / "m", tmp_path / "found", **options)
    added("llmq/families/granite.py")
    others = run(tmp_path / "m", tmp_path / "overridden", **options)
    scaled = [{n.rpartition(".")[2] for n, line in made.items() if "awq" in line} for made in (lines, others)]
    assert "o_proj" in scaled[0] and scaled[1] == scaled[0] - {"o_proj"}


def test_a_back_end(added, tiny_checkpoint, tmp_path, monkeypatch):
    run(tiny_checkpoint(), tmp_path / "out", method="rtn")
    ids = torch.arange(2, 12)[None]
    want = llmq.load(tmp_path / "out", dtype=torch.float32, backend="reference")
    added("llmq/runtime/backends/decoded.py")
    monkeypatch.setattr(backends, "backends", backends.backends.__wrapped__)
    got = llmq.load(tmp_path / "out", dtype=torch.float32)
    assert {m.backend for m in got.modules() if isinstance(m, QuantLinear)} == {"decoded"}
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, want(ids).logits, rtol=1e-4, atol=1e-5)
    ours, theirs = got.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_a_plot_is_on_the_page(added, tiny_checkpoint, tmp_path):
    pytest.importorskip("altair")
    from llmq.report import write

    run(tiny_checkpoint(), tmp_path / "out", method="rtn")
    added("llmq/report/plots/by_kind.py")
    html = write([tmp_path / "out"], tmp_path / "r.html")[0].read_text()
    assert "Mean error by kind" in html and '"by_kind": {' in html
