"""A grid of somebody else's, with parameters of its own kind, and a format that holds it, both by dotted names."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llmq import registry
from llmq.checkpoint import Source
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError, QTensor

GRID = '''"""Powers of two: 0 and plus or minus the largest magnitude of a group, times 1, 1/2 and 1/4."""
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmq.granularity import PerGroup
from llmq.types import Grid, Parameters

LEVELS = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])


@dataclass(frozen=True)
class PowerOfTwo(Grid):
    """group: columns that share a scale."""

    group: int = 64
    bits: ClassVar[int] = 3

    @property
    def granularity(self):
        return PerGroup(self.group)

    def fit(self, W_NK, H_KK=None):
        groups = W_NK.unflatten(1, (self.granularity.groups(W_NK.shape[1]), -1))
        return Parameters(groups.abs().amax(-1))

    def nearest(self, w, params):
        return ((w / params.scale).unsqueeze(-1) - LEVELS).abs().argmin(-1).float()

    def decode(self, codes, params):
        return LEVELS[codes.long()] * params.scale
'''
FORMAT = '''"""Plain: a byte a code."""
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmq.formats._folder import Folder
from llmq.types import LlmqError, Parameters, QTensor


@dataclass
class Plain(Folder):
    """No options."""

    quant_method: ClassVar[str] = "plain"
    derived: ClassVar[frozenset] = frozenset()

    def scale_dtype(self, model_dtype):
        return torch.float32

    def check(self, linears, skipped=()):
        return []

    def pack(self, q, spec):
        return {"codes": q.codes, "scale": q.params.scale}

    def layout(self, spec):
        G = spec.scheme.weight.granularity.groups(spec.K)
        codes = torch.empty(spec.N, spec.K, dtype=torch.uint8, device="meta")
        return {"codes": codes, "scale": torch.empty(spec.N, G, device="meta")}

    def config(self, linears, skipped):
        return {"quant_method": "plain"}

    def unpack(self, tensors, spec):
        return QTensor(tensors["codes"], Parameters(tensors["scale"]), spec.scheme.weight)

    @classmethod
    def read(cls, config):
        raise LlmqError("plain checkpoints are not loaded")
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    (tmp_path / "toys").mkdir()
    for name, text in (("grid", GRID), ("form", FORMAT), ("__init__", "")):
        (tmp_path / f"toys/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_grid_that_no_standard_format_holds_is_quantized_and_packed(toys, tiny_checkpoint, tmp_path, prose):
    folder = tiny_checkpoint()
    (tmp_path / "calib.txt").write_text(prose(2000))
    given = {"weights": "toys.grid:group=32", "samples": 4, "seq_len": 32, "calib": str(tmp_path / "calib.txt")}
    levels = torch.tensor([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    for method in ("rtn", "gptq,descent"):
        recipe = Recipe(method=method, format="toys.form", dtype="float32", **given)
        quantize(prepare(str(folder), recipe, "cpu"), tmp_path / method, check=False)
        lines = json.loads((tmp_path / method / "quantization.json").read_text())["linears"]
        packed = load_file(tmp_path / method / "model.safetensors")
        for name, line in lines.items():
            W_NK = Source(folder).get(f"{name}.weight").float()
            scale = packed[f"{name}.scale"].repeat_interleave(32, dim=1)
            Q_NK = levels[packed[f"{name}.codes"].long()] * scale
            assert torch.equal(scale, W_NK.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, dim=1))
            error = ((Q_NK - W_NK).square().sum() / W_NK.square().sum()).item()
            assert line["weight_error"] == pytest.approx(error, rel=1e-4)
            if method == "rtn":
                assert (Q_NK - W_NK).abs().max() <= (scale / 4).max() and error < 0.05
    assert Recipe.load(tmp_path / "rtn/recipe.yaml", {}, allow_code=True).weights == "toys.grid:group=32"


@pytest.mark.parametrize("said", ["toys.grid:group=32", "int:bits=3:range=toys.range", "int:range=[toys.range:x=1]"])
def test_a_recipe_of_another_names_no_code_unasked(said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"weights: '{said}'\n")
    assert Recipe.load(tmp_path / "recipe.yaml", {}, allow_code=True).weights == said
    with pytest.raises(LlmqError, match=r"weights names code outside llmq \(toys"):
        Recipe.load(tmp_path / "recipe.yaml", {})


@pytest.mark.parametrize(("form", "said"), [
    ("gptq", "gptq holds integer grids, not PowerOfTwo; use --weights int"),
    ("awq", "awq holds integer grids, not PowerOfTwo"),
    ("compressed-tensors", "compressed-tensors holds integer grids, not PowerOfTwo; use --weights int"),
])  # fmt: skip
def test_the_standard_formats_refuse_it_by_name(toys, tiny_checkpoint, form, said):
    with pytest.raises(LlmqError, match=said):
        prepare(str(tiny_checkpoint()), Recipe(weights="toys.grid:group=32", method="rtn", format=form), "cpu")


def test_parameters_of_its_own_kind_are_stacked_spread_and_split(toys):
    grid, W_NK = registry.load("grids", "toys.grid:group=8", code=True), torch.randn(6, 16)
    q = QTensor.rounded(W_NK, grid)
    assert q.params.scale.shape == (6, 2) and grid.lattice(q.params) is None and grid.args() is None
    assert torch.equal(q.dequantize(), grid.decode(q.codes, q.params.columns(16)))
    first, second = q.params.split([4, 2])
    assert torch.equal(first.cat([first, second]).scale, q.params.scale)
    keep = torch.arange(6) < 3
    mixed = q.params.where(keep, q.params.map(lambda p: -p))
    assert torch.equal(mixed.scale.sign(), torch.where(keep, 1.0, -1.0)[:, None].expand(6, 2))
    with pytest.raises(TypeError, match="this grid lies by Params, not by Parameters"):
        registry.load("grids", "int").decode(q.codes, q.params)
