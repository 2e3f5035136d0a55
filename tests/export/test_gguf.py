"""`llmq export`: codes of GPTQ, AWQ and compressed-tensors checkpoints, ours and the peers', kept in GGUF."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from _ggml import values_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmq
from llmq import registry
from llmq.checkpoint import Source
from llmq.checkpoint.digest import digest, holds
from llmq.checkpoint.packed import PackedCheckpoint
from llmq.export._kept import FACTOR, ROUNDED
from llmq.export._repack import convert
from llmq.export._run import export
from llmq.export._target import EXACT, REQUANTIZED
from llmq.gguf.reader import GgufFile
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.nvfp4 import Nvfp4
from llmq.guard.reading import Entry
from llmq.model.pretrained import blank_model, model_config
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError, Params, QTensor
from llmq.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = [5, 17, 30, 41, 25, 25, 9, 12]


EXPORTED = pytest.mark.parametrize(
    "options",
    [
        {},
        {"sym": False, "format": "awq"},
        {"bits": 8, "group_size": "channel"},
        {"bits": 2, "group_size": 64},
        {"weights": "nvfp4:range=mse"},
        {"weights": "mxfp4"},
    ],
)


@pytest.fixture
def golden(tmp_path):
    """`golden(name)`: a peer's checkpoint with a byte-level tokenizer that fits its 128 rows."""
    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    def folder(name):
        made = shutil.copytree(GOLDEN / name, tmp_path / "golden")
        tokenizer.save_pretrained(made)
        return made

    return folder


def weights(out):
    return {t.name: values_of(t.data, t.tensor_type.name) for t in GgufFile(out).tensors.values()}


def solved(folder, only=""):
    """Return the quantized linears of a checkpoint with `only` in the name; GGUF has the rows of q and k otherwise."""
    source = Source(folder)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    names = [n for n in packed.linears if only in n and not n.endswith(("q_proj", "k_proj"))]
    return {name: packed.qtensor(name) for name in names}


def rounded(folder, tmp_path, options):
    """Return what rounding to nearest makes of a float checkpoint, in groups of 32 unless weights are named."""
    recipe = {"method": "rtn", "dtype": "float32"} | ({} if "weights" in options else {"group_size": 32}) | options
    quantize(prepare(str(folder), Recipe(**recipe), "cpu"), tmp_path / "ours")
    return tmp_path / "ours"


def ggml(name):
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 99).get_name(f"{name}.weight", (".weight",))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gptq_v1_w4g32_sym", "Q4_0"),
        ("gptq_v2_w4g32_sym", "Q4_0"),
        ("gptq_v1_w4_perchannel", "Q4_0"),
        ("gptq_v1_w8g32_sym", "Q8_0"),
        ("gptq_v1_w3g32", "Q4_0"),
        ("gptq_v1_w2g32", "Q4_0"),
        ("ct_pack_w4g32_sym", "Q4_0"),
        ("ct_pack_w8_channel_sym", "Q8_0"),
        ("ct_int_w8a8_dynamic", "Q8_0"),
    ],
)
def test_symmetric_codes_of_the_peers_keep_their_values(golden, tmp_path, name, kind):
    folder, out = golden(name), tmp_path / "out.gguf"
    done = export(str(folder), out)
    assert set(done["outcomes"]) == {EXACT} and kind in done["types"]
    found, linears = weights(out), solved(folder)
    assert len(linears) >= 4
    for linear, q in linears.items():
        assert torch.equal(found[ggml(linear)], q.dequantize()), linear
    assert any("activations" in w for w in done["warnings"]) == ("w8a8" in name)


@pytest.mark.parametrize("name", ["gptq_v1_w4g32_asym", "gptq_v2_w4g32_asym", "awq_w4g32", "ct_pack_w4g32_asym"])
def test_asymmetric_codes_are_kept_and_the_minimum_is_rounded(golden, tmp_path, name):
    folder, out = golden(name), tmp_path / "out.gguf"
    done = export(str(folder), out)
    assert ROUNDED in done["outcomes"] and "Q4_1" in done["types"] and REQUANTIZED not in done["outcomes"]
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    grid, seen = registry.load("grids", "q4_1"), 0
    for linear, q in solved(folder).items():
        tensor = tensors[ggml(linear)]
        if tensor.tensor_type.name == "Q4_1":
            codes, params = grid.from_bytes(torch.from_numpy(tensor.data.copy()))
            minimum = (q.params.zero.float() * q.params.scale.float()).repeat_interleave(
                params.offset.shape[1] // q.params.scale.shape[1], dim=1
            )
            assert torch.equal(codes, q.codes), linear
            assert ((params.offset + minimum).abs() <= minimum.abs() * 2**-11 + 2**-25).all()
            seen += 1
    assert seen


def test_act_order_groups_are_refused_and_requantized_on_request(golden, tmp_path):
    folder, out = golden("gptq_v1_w4g32_desc_act"), tmp_path / "out.gguf"
    with pytest.raises(LlmqError, match="activation order .*--requantize"):
        export(str(folder), out)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    done = export(str(folder), out, requantize="q8_0", embeddings="Q8_0")
    assert REQUANTIZED in done["outcomes"] and "F16" not in done["types"] and "BF16" not in done["types"]
    found = weights(out)
    for linear, q in solved(folder).items():
        W_NK = q.dequantize()
        assert (found[ggml(linear)] - W_NK).norm() / W_NK.norm() < 0.01


def make(bits, scale, zero, K=64, group=32, codes=None):
    N, G = 4, K // group
    if codes is None:
        codes = torch.randint(0, 2**bits, (N, K), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    params = Params(torch.as_tensor(scale).expand(N, G).contiguous(), torch.full((N, G), zero, dtype=torch.int32))
    return QTensor(codes, params, Int(bits, zero == 2 ** (bits - 1), group))


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (make(4, torch.tensor(0.1), 8), "are not float16 numbers"),
        (make(4, torch.tensor(1e-9), 8), "are not float16 numbers"),
        (make(4, torch.tensor(2.0**17), 8), "are not float16 numbers"),
        (make(4, torch.tensor(0.125), 8, group=16), "groups of 16 columns"),
        (make(4, torch.tensor(0.125), 8, K=48, group=48), "rows of 48 columns"),
        (make(8, torch.tensor(0.125), 0), "8-bit asymmetric"),
    ],
)
def test_why_codes_cannot_be_kept_is_said(q, reason):
    with pytest.raises(LlmqError, match=f"^w: its codes cannot be kept: .*{reason}"):
        convert(q, "w", None)
    again = convert(q, "w", "Q8_0")
    assert again.outcome == REQUANTIZED and again.kind == ("F16" if q.codes.shape[1] == 48 else "Q8_0")


@pytest.mark.parametrize(
    ("grid", "options", "reason"),
    [
        (Fp8(), {}, "no type of ggml is Fp8"),
        (Nvfp4(), {"together": 32}, "rows of 32 columns are no multiple of 64"),
        (Nvfp4(), {"factor": False}, r"llama\.cpp passes over the factor"),
    ],
)
def test_why_codes_of_small_floats_cannot_be_kept_is_said(grid, options, reason):
    q = QTensor.rounded(torch.randn(4, 128), grid)
    with pytest.raises(LlmqError, match=f"^w: its codes cannot be kept: {reason}"):
        convert(q, "w", None, **options)
    assert (convert(q, "w", "Q8_0").outcome == REQUANTIZED) == isinstance(grid, Fp8)


def test_codes_whose_columns_move_by_less_than_a_block_are_not_kept():
    q = make(4, torch.tensor(0.125), 8)
    with pytest.raises(LlmqError, match="^w: its codes cannot be kept: pieces, .* in another order, of 16 columns"):
        convert(q, "w", None, 16)
    assert convert(q, "w", "Q8_0", 16).kind == "F16"
    assert convert(q, "w", None, 32).outcome == EXACT


@pytest.mark.parametrize("zero", [2, 1])
@pytest.mark.parametrize("group", [64, 128])
def test_two_bits_in_groups_of_64_columns_are_q2_0(zero, group):
    scale = torch.rand(4, 128 // group).sub(0.5).half().float()  # either sign: a falling grid has a negative one
    q = make(2, scale, zero, K=128, group=group)
    found = convert(q, "w", None)
    assert found.kind == "Q2_0" and found.outcome == EXACT and found.rows.shape == (4, 36)
    assert torch.equal(values_of(found.rows, "Q2_0"), q.dequantize())


def test_two_bits_that_q2_0_does_not_hold_are_q4_0():
    """Groups or pieces of 32 columns, and codes 0 to 3 above their zero."""
    assert convert(make(2, torch.tensor(0.5), 2, group=32), "w", None).kind == "Q4_0"
    assert convert(make(2, torch.tensor(0.5), 2, group=64), "w", None, 32).kind == "Q4_0"
    assert convert(make(2, torch.tensor(0.5), 0, group=64), "w", None).kind == "Q4_0"


def test_scales_in_bfloat16_that_float16_holds_are_kept():
    q = make(4, torch.tensor(0.125, dtype=torch.bfloat16), 8)
    assert convert(q, "w", None).outcome == EXACT


def test_the_divisor_of_a_peers_nvfp4_is_a_factor_as_llama_cpp_multiplies_by_it(golden, tmp_path):
    done = export(str(golden("ct_nvfp4")), tmp_path / "out.gguf")  # and verified: values of the file are as recorded
    assert done["types"]["NVFP4"] == 14 and set(done["outcomes"]) == {FACTOR}
    assert all(0 < line["weight_error"] < 1e-13 for line in record_of(tmp_path / "out.gguf")["linears"].values())


def test_a_type_that_holds_the_codes_takes_the_place_of_the_smallest():
    q = make(4, torch.tensor(0.1).half(), 3)
    assert [convert(q, "w", None, kind=kind).kind for kind in (None, "Q8_0")] == ["Q4_1", "Q8_0"]
    assert convert(q, "w", None, kind="Q8_0").outcome == EXACT  # of 8 bits no minimum is stored
    with pytest.raises(LlmqError, match="^w: its codes cannot be kept: Q4_0 does not hold them, Q4_1, Q5_0, Q8_0 does"):
        convert(q, "w", None, kind="Q4_0")
    assert convert(make(4, torch.tensor(32768.0), 3), "w", None).kind == "Q5_0"  # the minimum is beyond float16


@EXPORTED
def test_our_checkpoint_computes_in_llama_cpp_what_it_computes_here(
    tiny_checkpoint, tmp_path, prose, llama_cpp, options
):
    ours, out = rounded(tiny_checkpoint(), tmp_path, options), tmp_path / "out.gguf"
    done = export(str(ours), out)
    assert REQUANTIZED not in done["outcomes"]
    with torch.no_grad():
        wanted = llmq.load(ours, dtype=torch.float32)(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    found = llama_cpp(out).log_probabilities(IDS, 320)
    assert max(abs(wanted[i].item() - p) for i, p in found.items()) < 0.25


def test_what_is_no_quantized_checkpoint_is_refused_in_a_line(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    with pytest.raises(LlmqError, match="is a float checkpoint"):
        export(str(folder), tmp_path / "out.gguf")
    out = tmp_path / "whole.gguf"
    quantize(prepare(str(folder), Recipe(format="gguf", type="Q8_0", method="rtn"), "cpu"), out)
    with pytest.raises(LlmqError, match="is a GGUF file already"):
        export(str(out), tmp_path / "out.gguf")
    for size in (3, 20, 1000, out.stat().st_size - 1):
        short = tmp_path / "short.gguf"
        short.write_bytes(out.read_bytes()[:size])
        with pytest.raises(LlmqError, match="short.gguf is (truncated|not a GGUF file)"):
            export(str(short), tmp_path / "out.gguf")
    for out, to, said in ((tmp_path / "x", None, "--to is not given"), (tmp_path / "x", "gguf", r"call it .*x\.gguf")):
        with pytest.raises(LlmqError, match=said):
            export(str(folder), out, to)
    assert not (tmp_path / "out.gguf").exists()


def record_of(out):
    return json.loads(GgufFile(out).value("llmq.report"))


def test_the_file_holds_a_record_of_what_became_of_every_linear(tiny_checkpoint, tmp_path):
    folder, ours = tiny_checkpoint(), tmp_path / "ours"
    recipe = Recipe(method="rtn", group_size=32, sym=False, format="awq", dtype="float32")
    made = quantize(prepare(str(folder), recipe, "cpu"), ours)
    export(str(ours), tmp_path / "kept.gguf", embeddings="Q8_0")
    record, q = record_of(tmp_path / "kept.gguf"), solved(ours, "down")["model.layers.1.mlp.down_proj"]
    assert holds(record) and record["exported"]["linears"] == json.loads(json.dumps(made["linears"]))
    assert record["exported"]["recipe"]["method"] == "rtn" and record["source"]["name"] == "ours"
    file = GgufFile(tmp_path / "kept.gguf")
    assert record["tensors"].keys() == file.tensors.keys()
    assert {"model.embed_tokens", "lm_head"} < record["linears"].keys() and len(record["linears"]) == 16
    line, values = record["linears"]["model.layers.1.mlp.down_proj"], weights(tmp_path / "kept.gguf")
    assert line["sha256"]["values"] == digest(values["blk.1.ffn_down.weight"])
    wanted = ((values["blk.1.ffn_down.weight"] - q.dequantize()).square().sum() / q.dequantize().square().sum()).item()
    assert 0 < line["weight_error"] == pytest.approx(wanted, rel=1e-3) and wanted < 1e-6


def edited(folder, tensors=None, **config):
    """Change the tensors and the config of a checkpoint; return its folder."""
    save_file(load_file(folder / "model.safetensors") | (tensors or {}), folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def test_a_head_of_its_own_stays_though_the_config_ties_it(golden, tmp_path):
    folder = edited(golden("gptq_v1_w4g32_sym"), tie_word_embeddings=True)
    export(str(folder), tmp_path / "out.gguf")
    assert torch.equal(weights(tmp_path / "out.gguf")["output.weight"], Source(folder).get("lm_head.weight").float())


def test_scales_of_the_key_value_cache_are_left_out(golden, tmp_path):
    scales = {f"model.layers.{i}.self_attn.{kv}_scale": torch.ones(1) for i in range(2) for kv in "kv"}
    done = export(str(edited(golden("ct_pack_w4g32_sym"), scales)), tmp_path / "out.gguf")
    assert any("key-value cache are left out" in w for w in done["warnings"]) and sum(done["types"].values()) == 21


def test_exact_values_have_no_error(golden, tmp_path):
    export(str(golden("gptq_v1_w4g32_sym")), tmp_path / "out.gguf")
    record = record_of(tmp_path / "out.gguf")
    assert {line["weight_error"] for line in record["linears"].values()} == {0.0} and record["exported"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": "Q9"}, "--embeddings 'Q9'"),
        ({"split_max_size": "x"}, "does not read"),
        ({"pre": "gpt-2"}, r"up_proj\.scales is missing"),
        ({}, "no tokenizer"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_tensor_is_read(golden, tmp_path, monkeypatch, options, message):
    folder = golden("gptq_v1_w4g32_sym")
    if "pre" in options:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.scales"]
        save_file(tensors, folder / "model.safetensors")
    monkeypatch.setattr(Entry, "read", lambda entry: pytest.fail(f"{entry.name} was read"))
    if not options:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(LlmqError, match=message):
        export(str(folder), tmp_path / "out.gguf", **options)


def test_a_float_that_is_not_finite_is_refused_by_name(golden, tmp_path):
    folder = golden("gptq_v1_w4g32_sym")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqError, match=r"tensor model\.norm\.weight holds NaN"):
        export(str(folder), tmp_path / "out.gguf")
    assert convert(make(4, torch.tensor(float("inf")), 8), "w", "F32").outcome == REQUANTIZED


@EXPORTED
def test_an_exported_file_is_verified_against_what_was_solved(tiny_checkpoint, tmp_path, options):
    ours, out = rounded(tiny_checkpoint(), tmp_path, options), tmp_path / "out.gguf"
    export(str(ours), out, embeddings="Q6_K")
    report = verify(out)
    assert report.passed, report.failures
    assert report.checked["solved weights compared"] == 16
