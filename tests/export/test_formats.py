"""`llmq export --to FORMAT`: a checkpoint of one format in another, its codes kept; and back again, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmq
from llmq import cli
from llmq.checkpoint import Source
from llmq.checkpoint.digest import holds
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.export._kept import FACTOR, ROUNDED, SCALED
from llmq.export._run import export
from llmq.export._target import EXACT, REQUANTIZED
from llmq.grids._biased import Biased, as_integers
from llmq.guard.reading import Entry
from llmq.model.pretrained import blank_model, model_config
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError, Params
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def opened(folder):
    source = Source(folder)
    return PackedCheckpoint.open(source, blank_model(source, model_config(source)))


def solved(folder):
    """Return codes, scales and zeros of every linear, scales repeated for every 32 columns, and the decoded weights."""
    found = {}
    for name in (packed := opened(folder)).linears:
        q = packed.qtensor(name)
        params = as_integers(q.params, q.grid.bits) if isinstance(q.grid, Biased) else q.params
        each = [p[:, q.group_K] for p in (params.scale.float(), getattr(params, "zero", params.scale))]
        found[name] = [q.codes, *each, q.dequantize()]
    return found


def floats(folder):
    packed = opened(folder)
    return {n: t for n, t in packed if isinstance(t, torch.Tensor)}


def same(a, b):
    """Say whether codes, scales and zeros of two folders are equal, and whether what is float has the same bytes."""
    one, other = solved(a), solved(b)
    assert one.keys() == other.keys() and len(one) == 14
    parts = [[torch.equal(x, y) for x, y in zip(one[n], other[n], strict=True)] for n in one]
    plain, back = floats(a), floats(b)
    assert plain.keys() == back.keys()
    assert all(plain[n].dtype == back[n].dtype and torch.equal(plain[n], back[n]) for n in plain)
    return [all(each) for each in zip(*parts, strict=True)]


PAIRS = [
    ("gptq_v1_w4g32_sym", "awq", "gptq", EXACT),
    ("gptq_v1_w4g32_sym", "mlx", "gptq_v2", EXACT),
    ("gptq_v1_w4g32_desc_act", "gptq_v2", "gptq", EXACT),
    ("gptq_v1_w4_perchannel", "mlx", "compressed-tensors", EXACT),
    ("gptq_v1_w3g32", "compressed-tensors", "gptq", EXACT),
    ("gptq_v1_w4g32_asym", "awq", "gptq", EXACT),
    ("awq_gptqmodel_w4g32", "compressed-tensors", "awq", EXACT),
    ("ct_int_w8a8_static", "gptq", "compressed-tensors", EXACT),
    ("ct_pack_w4g32_asym", "mlx", "compressed-tensors", ROUNDED),
    ("ct_mixed", "mlx", "compressed-tensors", EXACT),
    ("ct_mxfp4", "mlx", "compressed-tensors", EXACT),
    ("ct_fp8_static", "modelopt", "compressed-tensors", EXACT),
    ("ct_nvfp4", "modelopt", "compressed-tensors", FACTOR),
]


@pytest.mark.parametrize(("name", "there", "back", "outcome"), PAIRS)
def test_there_and_back_codes_scales_and_zeros_are_the_same(tmp_path, name, there, back, outcome):
    done = export(str(GOLDEN / name), tmp_path / "b", there, check=False)
    assert outcome in done["outcomes"] and sum(done["outcomes"].values()) == 14
    assert set(done["outcomes"]) <= {EXACT, outcome}
    if outcome != FACTOR:
        assert same(GOLDEN / name, tmp_path / "b") == [True, True, True, outcome == EXACT]
    export(str(tmp_path / "b"), tmp_path / "a", back, check=False)
    codes, scales, zeros, values = same(GOLDEN / name, tmp_path / "a")
    assert codes and zeros == (outcome != FACTOR) and scales == (outcome != FACTOR)
    for q, again in zip(solved(GOLDEN / name).values(), solved(tmp_path / "a").values(), strict=True):
        assert values or (q[3] - again[3]).abs().max() <= 2**-20 * q[3].abs().max()


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tiny_llama, tokenizer_bos):
    """A checkpoint that llmq made, and the float one that it was made from."""
    folder = tmp_path_factory.mktemp("ours")
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder / "floats")
    tokenizer_bos.save_pretrained(folder / "floats")
    recipe = Recipe(method="rtn", bits=4, group_size=32, range="mse", format="compressed-tensors")
    quantize(prepare(str(folder / "floats"), recipe, "cpu"), folder / "packed")
    return folder


def test_llmqs_own_record_goes_along_where_it_holds(ours, tmp_path):
    export(str(ours / "packed"), tmp_path / "out", "gptq")
    before, now = (json.loads((d / "quantization.json").read_text()) for d in (ours / "packed", tmp_path / "out"))
    assert holds(now) and now["recipe"] == before["recipe"] and now["export"]["from"] == "compressed-tensors"
    errors = [{n: line["weight_error"] for n, line in r["linears"].items()} for r in (before, now)]
    assert errors[0] == errors[1] and now["source"] == before["source"]
    report = verify(tmp_path / "out", ours / "floats")  # errors found again against the float model
    assert report.passed and report.checked["solved weights compared"] == 14, report.failures
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sym"] and (tmp_path / "out" / "quantize_config.json").is_file()
    assert "compressed-tensors" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (ours / "packed" / "tokenizer.json").read_bytes()
    with torch.no_grad():
        ids = torch.tensor([[5, 17, 30]])
        one, two = (llmq.load(d, backend="reference")(ids).logits for d in (ours / "packed", tmp_path / "out"))
    assert torch.equal(one, two)


def test_negative_scales_are_kept(ours, tmp_path):
    """Which half the groups of a searched symmetric grid have."""
    export(str(ours / "packed"), tmp_path / "out", "mlx", check=False)
    assert all((q[1] < 0).any() for q in solved(tmp_path / "out").values())
    assert same(ours / "packed", tmp_path / "out") == [True] * 4


def test_scales_beyond_float16_are_refused_and_others_rounded(tmp_path):
    folder = shutil.copytree(GOLDEN / "ct_pack_w4g32_sym", tmp_path / "m")
    tensors = {n: t.float() if n.endswith("_scale") else t for n, t in load_file(folder / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] *= 1 + 2**-13
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = export(str(folder), tmp_path / "rounded", "gptq")
    assert done["outcomes"] == {EXACT: 13, SCALED: 1}
    one, other = (solved(d)["model.layers.0.mlp.up_proj"] for d in (folder, tmp_path / "rounded"))
    assert torch.equal(one[0], other[0]) and ((one[1] - other[1]).abs() <= 2**-11 * one[1].abs()).all()
    tensors[name][3, 1] = 1e-9
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqError, match=r"^model.layers.0.mlp.up_proj: its codes cannot be kept: 1 of \d+ scales are"):
        export(str(folder), tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("ct_mixed", "awq", r"down_proj: its codes cannot be kept: awq holds 4 bits, not 8; .*--requantize GRID"),
        ("ct_mixed", "gptq", "transformers does not load gptq checkpoints that mix schemes"),
        ("gptq_v1_w4g32_sym", "modelopt", r"q_proj: its codes cannot be kept: modelopt has no name for"),
        ("ct_fp8_block", "mlx", r"mlx holds integers, mxfp4, mxfp8 and nvfp4, not Fp8"),
    ],
)
def test_what_the_layout_says_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch, name, to, said):
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    with pytest.raises(LlmqError, match=said):
        export(str(GOLDEN / name), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_packed_embeddings_go_only_where_they_have_a_place(ours, tmp_path):
    recipe = Recipe(method="rtn", group_size=32, range="minmax", format="compressed-tensors", embeddings="8")
    quantize(prepare(str(ours / "floats"), recipe, "cpu"), tmp_path / "packed")
    with pytest.raises(LlmqError, match=r"embed_tokens: its codes cannot be kept: mlx holds no packed embeddings"):
        export(str(tmp_path / "packed"), tmp_path / "out", "mlx")
    assert set(export(str(tmp_path / "packed"), tmp_path / "out", "compressed-tensors")["outcomes"]) == {EXACT}


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("gptq_v1_w4g32_desc_act", "awq", r"its codes cannot be kept: awq has no g_idx"),
        ("gptq_v1_w4g32_desc_act", "mlx", r"its codes cannot be kept: mlx has no weights in activation order"),
        ("ct_nvfp4", "mlx", r"q_proj: its codes cannot be kept: mlx has no divisor"),
    ],
)
def test_what_values_say_is_refused_before_anything_is_written(tmp_path, name, to, said):
    with pytest.raises(LlmqError, match=said):
        export(str(GOLDEN / name), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_rounded_anew_on_request(tmp_path):
    done = export(str(GOLDEN / "ct_mixed"), tmp_path / "a", "awq", requantize="int:bits=4:group=32")
    assert done["outcomes"] == {EXACT: 12, REQUANTIZED: 2}
    done = export(str(GOLDEN / "gptq_v1_w4g32_desc_act"), tmp_path / "b", "mlx", requantize="int:bits=8:group=64")
    assert REQUANTIZED in done["outcomes"]
    kept, packed = solved(tmp_path / "b"), solved(GOLDEN / "gptq_v1_w4g32_desc_act")
    assert all((kept[n][3] - packed[n][3]).norm() / packed[n][3].norm() < 0.01 for n in packed)


def test_formats_that_hide_it_are_seen_to_be_symmetric(tmp_path):
    export(str(GOLDEN / "gptq_v1_w4g32_sym"), tmp_path / "awq", "awq", check=False)
    export(str(tmp_path / "awq"), tmp_path / "gptq", "gptq", check=False)
    said = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert said["sym"] and said["checkpoint_format"] == "gptq"  # which vLLM reads, and not asymmetric ones
    packed = opened(tmp_path / "gptq")
    assert all(isinstance(packed.qtensor(n).params, Params) for n in packed.linears)


@pytest.mark.parametrize(
    ("name", "requantize", "said"),
    [
        ("gptq_v1_w4g32_desc_act", None, "use --to gptq:desc_act=true; or round it anew: --requantize GRID"),
        ("ct_nvfp4", "fp8", "awq holds integer grids, not Fp8; use --requantize int$"),
        ("ct_nvfp4", "int:group=128", "--requantize int:group= takes 32, 64 there$"),
    ],
)
def test_remedies_name_the_options_of_export_not_those_of_quantize(name, requantize, said, tmp_path):
    with pytest.raises(LlmqError, match=said):
        export(str(GOLDEN / name), tmp_path / "out", "awq", requantize=requantize)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out"], "--to is not given and out has no suffix"),
        (
            ["out", "--to", "onyx"],
            "'onyx' is no target \\(there are: awq, compressed-tensors, ",
        ),
        (["out.GGUF"], "out.GGUF ends in .GGUF; call it out.gguf"),
        (["out.gguf", "--to", "awq"], "--to awq writes a folder; leave .gguf out of its name"),
        (["out.gguf", "--to", "gguf:Q4_0", "--type", "Q8_0"], "--type Q8_0 and --to gguf:Q4_0 disagree"),
        (["out", "--to", "awq", "--embeddings", "Q8_0"], "--embeddings means nothing here: --to awq has no option"),
        (["out", "--to", "float", "--requantize", "Q8_0"], "--requantize means nothing here"),
        (["out", "--to", "gptq", "--requantize", "int:bits=9"], "option bits takes"),
    ],
)
def test_what_the_command_line_means_is_said(arguments, said):
    done = CliRunner().invoke(cli.app, ["export", str(GOLDEN / "awq_w4g32"), *arguments])
    with pytest.raises(LlmqError, match=said):
        raise done.exception
