"""`llmq quantize ... OUT.gguf` on tiny checkpoints: what is in the file, read by the `gguf` package and llama.cpp."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

from llmq import registry
from llmq.checkpoint import Source
from llmq.gguf import imatrix
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.types import LlmqError

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = {"format": "gguf", "method": "rtn", "samples": 8, "seq_len": 32, "dtype": "float32"}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}  # rows for K-quants
IDS = [5, 17, 300, 41, 250, 250, 9, 120]


@pytest.fixture
def text(tmp_path, prose):
    file = tmp_path / "calibration.txt"
    file.write_text(prose(2000))
    return str(file)


def job(folder, out, overwrite=False, **options):
    return quantize(prepare(str(folder), Recipe(**(BASE | options)), "cpu"), out, overwrite=overwrite)


def opened(path):
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor):
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def unpermuted(weight, heads):
    """Undo ggml's order of q and k rows: pairs (i, i + d/2) of a head lie side by side."""
    N = weight.shape[0]
    return weight.reshape(heads, N // heads // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def test_a_float_file_holds_the_checkpoint(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(dtype=torch.bfloat16), tmp_path / "out.gguf"
    summary = job(folder, out, type="BF16")
    keys, tensors = opened(out)
    source = Source(folder)
    assert summary["files"] == ["out.gguf"] and sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf"]
    assert keys["general.architecture"] == "llama" and keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    expected = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 128, "context_length": 512}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 16, "vocab_size": 320}
    assert {k: keys[f"llama.{k}"] for k in expected} == expected
    assert len(keys["tokenizer.ggml.tokens"]) == 320 and keys["tokenizer.ggml.add_bos_token"]
    assert {n for n in tensors if "norm" in n} == {n for n, t in tensors.items() if t.tensor_type.name == "F32"}
    names = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    names |= {"blk.1.ffn_down": "model.layers.1.mlp.down_proj", "blk.0.attn_v": "model.layers.0.self_attn.v_proj"}
    for ggml, ours in names.items():
        assert torch.equal(values(tensors[f"{ggml}.weight"]), source.get(f"{ours}.weight").float()), ggml
    for leaf, ggml, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        original = source.get(f"model.layers.1.self_attn.{leaf}.weight").float()
        assert torch.equal(unpermuted(values(tensors[f"blk.1.{ggml}.weight"]), heads), original)
        assert not torch.equal(values(tensors[f"blk.1.{ggml}.weight"]), original)


@pytest.mark.parametrize(
    ("config", "arch"), [(Qwen2Config, "qwen2"), (Qwen3Config, "qwen3")], ids=lambda v: getattr(v, "model_type", v)
)
def test_qwen_keeps_its_row_order_its_biases_and_its_head_norms(config, arch, tmp_path, tokenizer_plain):
    torch.manual_seed(0)
    sizes = {"vocab_size": 328, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = AutoModelForCausalLM.from_config(config(**sizes, tie_word_embeddings=True))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(p)
    folder, out = tmp_path / "model", tmp_path / "out.gguf"
    model.save_pretrained(folder)
    tokenizer_plain.save_pretrained(folder)
    job(folder, out, type="F32")
    keys, tensors = opened(out)
    assert keys["general.architecture"] == arch and "output.weight" not in tensors
    own = "attn_q.bias" if arch == "qwen2" else "attn_q_norm.weight"
    leaf = "q_proj.bias" if arch == "qwen2" else "q_norm.weight"
    state = model.state_dict()
    assert torch.equal(values(tensors[f"blk.0.{own}"]), state[f"model.layers.0.self_attn.{leaf}"])
    assert torch.equal(values(tensors["blk.0.attn_q.weight"]), state["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K", "IQ4_XS"])
def test_every_tensor_decodes_to_what_its_grid_made_of_it(tiny_checkpoint, tmp_path, kind):
    folder, out = tiny_checkpoint(**WIDE, num_hidden_layers=1), tmp_path / "out.gguf"
    summary = job(folder, out, type=kind)
    _, tensors = opened(out)
    source = Source(folder)
    assert len(summary["linears"]) == 9  # the embedding and the head too
    for ggml, ours in (("blk.0.ffn_down", "model.layers.0.mlp.down_proj"), ("output", "lm_head")):
        tensor, W_NK = tensors[f"{ggml}.weight"], source.get(f"{ours}.weight")
        grid = registry.load("grids", tensor.tensor_type.name.lower())
        params = grid.fit(W_NK)
        expected = grid.decode(grid.nearest(W_NK, params.columns(W_NK.shape[1])), params.columns(W_NK.shape[1]))
        assert torch.equal(values(tensor), expected), ggml
        error = summary["linears"][ours]["weight_error"]
        assert error == pytest.approx(((expected - W_NK).square().sum() / W_NK.square().sum()).item(), rel=1e-3)


def test_calibration_lowers_the_error_that_it_weighs(tiny_checkpoint, tmp_path, text):
    folder = tiny_checkpoint(**WIDE, num_hidden_layers=1)
    errors = {}
    for method in ("rtn", "rtn:importance=true"):
        out = tmp_path / f"{len(errors)}.gguf"
        job(folder, out, type="Q3_K_S", method=method, calib=text, imatrix_out=str(tmp_path / f"{method}.imatrix"))
        errors[method] = output_error(folder, out, imatrix.read(tmp_path / f"{method}.imatrix"))
    assert errors["rtn:importance=true"] < errors["rtn"]


def test_floats_have_an_importance_too(tiny_checkpoint, tmp_path, text):
    file = tmp_path / "imatrix.gguf"
    job(tiny_checkpoint(**WIDE, num_hidden_layers=1), tmp_path / "a.gguf", type="F16", method="rtn", calib=text,
        imatrix_out=str(file))  # fmt: skip
    assert len(imatrix.read(file)) == 7


def output_error(folder, out, means):
    """Return the weighted error of a file's first down projection, by the calibration's mean squares."""
    _, tensors = opened(out)
    W_NK = Source(folder).get("model.layers.0.mlp.down_proj.weight")
    name = "blk.0.ffn_down.weight"
    return ((values(tensors[name]) - W_NK).square() * means[name]).sum().item()


def test_an_importance_matrix_written_and_read_gives_the_file_that_calibration_gave(tiny_checkpoint, tmp_path, text):
    folder, file = tiny_checkpoint(**WIDE), tmp_path / "i.gguf"
    job(folder, tmp_path / "a.gguf", type="Q4_K_M", method="rtn:importance=true", calib=text, imatrix_out=str(file))
    keys, tensors = opened(file)
    assert keys["general.type"] == "imatrix" and keys["imatrix.chunk_size"] == 32 and keys["imatrix.chunk_count"] == 8
    assert len(tensors) == 2 * 14 and tensors["blk.1.ffn_down.weight.in_sum2"].shape.tolist() == [512, 1]
    assert values(tensors["blk.0.attn_q.weight.counts"]).item() == 8 * 32
    job(folder, tmp_path / "b.gguf", type="Q4_K_M", imatrix=str(file))
    a, b = (opened(tmp_path / f"{n}.gguf")[1] for n in "ab")
    first = [
        n for n in a if n.startswith("blk.0.attn_q") or n.startswith("token")
    ]  # later inputs are the quantized ones
    assert all((a[n].data == b[n].data).all() for n in first)
    with pytest.raises(LlmqError, match="--method rtn"):
        job(folder, tmp_path / "c.gguf", method="gptq", imatrix=str(file))
    again = tmp_path / "again.gguf"  # beside floats alone
    job(folder, tmp_path / "f16.gguf", type="F16", calib=text, imatrix_out=str(again))
    floats = imatrix.read(again)
    assert floats.keys() == imatrix.read(file).keys()
    assert torch.equal(floats["blk.0.attn_q.weight"], imatrix.read(file)["blk.0.attn_q.weight"])
    other = tiny_checkpoint(intermediate_size=96)
    with pytest.raises(LlmqError, match="made from another model"):
        job(other, tmp_path / "c.gguf", type="Q8_0", imatrix=str(file))


def test_a_file_of_llama_imatrix_is_read():
    means = imatrix.read(GOLDEN / "imatrix.gguf")
    assert len(means) == 14 and [len(means[f"blk.1.{n}.weight"]) for n in ("attn_q", "ffn_down")] == [64, 96]
    assert torch.equal(means["blk.0.attn_q.weight"], means["blk.0.attn_v.weight"])  # one activation
    assert means["blk.0.attn_q.weight"].mean().item() == pytest.approx(1, rel=1e-3)  # behind an RMSNorm of gain 1


def test_overrides_and_skips_name_tensors_as_ggml_does(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(**WIDE), tmp_path / "out.gguf"
    job(folder, out, type="Q4_0", override=("ffn_down:type=Q8_0", r"blk\.1\.ffn_down:type=Q6_K"), skip=("attn_v",))
    types = {n: t.tensor_type.name for n, t in opened(out)[1].items()}
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.1.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_v.weight"] == "F16" and types["blk.0.attn_q.weight"] == "Q4_0"


def test_floats_alone_are_not_calibrated(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    plan = prepare(str(folder), Recipe(format="gguf", type="F16", calib="no-such-text.txt"), "cpu")
    assert not plan.calibrates() and "--calib: a run that rounds no linear reads no" in plan.warnings[-1]
    quantize(plan, out)
    weight = Source(folder).get("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(values(opened(out)[1]["blk.1.ffn_up.weight"]), weight.half().float())
    assert prepare(str(folder), Recipe(format="gguf", type="F16", override=("attn_v:type=Q8_0",)), "cpu").calibrates()


def test_a_split_file_is_read_as_one(tiny_checkpoint, tmp_path, llama_cpp):
    folder, out = tiny_checkpoint(**WIDE), tmp_path / "out.gguf"
    summary = job(folder, out, type="F32", split_max_size="1M")
    n = len(summary["files"])
    assert n > 2 and summary["files"][0] == f"out-00001-of-{n:05d}.gguf"
    assert sorted(p.name for p in tmp_path.iterdir()) == summary["files"]
    keys, _ = opened(tmp_path / summary["files"][0])
    assert keys["split.count"] == n
    one = tmp_path / "one.gguf"
    job(folder, one, type="F32")
    assert llama_cpp(tmp_path / summary["files"][0]).generate(IDS, 4) == llama_cpp(one).generate(IDS, 4)
    job(folder, out, type="F32", overwrite=True)
    assert not list(tmp_path.glob("out-*")) and out.is_file()


def test_llama_cpp_computes_the_logits_of_transformers(tiny_checkpoint, tmp_path, llama_cpp):
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    for options in ({}, {"rope_parameters": scaling, "tie_word_embeddings": True}, {"attention_bias": True}):
        folder, out = tiny_checkpoint(**options), tmp_path / "out.gguf"
        job(folder, out, type="F16", overwrite=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
        found = llama_cpp(out).log_probabilities(IDS, 320)
        assert len(found) == 320
        assert max(abs(wanted[i].item() - p) for i, p in found.items()) < 0.02, options


def test_a_head_of_its_own_is_written_whatever_the_config_says_and_a_copy_of_the_embedding_is_not(
    tiny_checkpoint, tmp_path, llama_cpp
):
    folder = tiny_checkpoint(num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    job(folder, tmp_path / "own.gguf", type="F16")
    assert torch.equal(
        values(opened(tmp_path / "own.gguf")[1]["output.weight"]), Source(folder).get("lm_head.weight").half().float()
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    found = llama_cpp(tmp_path / "own.gguf").log_probabilities(IDS, 320)
    assert max(abs(wanted[i].item() - p) for i, p in found.items()) < 0.02
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    job(folder, tmp_path / "copy.gguf", type="Q8_0")
    assert "output.weight" not in opened(tmp_path / "copy.gguf")[1]


@pytest.mark.parametrize("method", ["awq,rtn", "smoothquant,rtn", "rotate,rtn"])
def test_steps_that_move_the_weights_leave_the_function(tiny_checkpoint, tmp_path, text, llama_cpp, method):
    folder, out = tiny_checkpoint(num_hidden_layers=1, tie_word_embeddings=True), tmp_path / "out.gguf"
    job(folder, out, type="Q8_0", method=method, calib=text)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    found = llama_cpp(out).log_probabilities(IDS, 320)
    assert max(abs(wanted[i].item() - p) for i, p in found.items()) < 0.25


def test_what_rows_do_not_hold_is_said_before_the_work_and_recorded(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(hidden_size=96, intermediate_size=256, num_attention_heads=6, num_hidden_layers=1)
    planned = prepare(str(folder), Recipe(**(BASE | {"type": "Q4_K_M", "override": ("attn_q:type=Q8_0",)})), "cpu")
    said = next(w for w in planned.warnings if "columns" in w)
    assert "rows of 96 columns are no multiple of a block" in said and "larger than Q4_K_M says" in said
    assert "5 tensors are Q5_0 in place of Q4_K, 2 are Q8_0 in place of Q6_K" in said  # q was asked for
    assert said in quantize(planned, tmp_path / "out.gguf")["warnings"]
    wide = prepare(str(tiny_checkpoint(**WIDE)), Recipe(**(BASE | {"type": "Q4_K_M"})), "cpu")
    assert not any("columns" in w for w in wide.warnings)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_L", "Q4_K_S", "Q5_K_M", "Q6_K",
                                  "IQ4_NL", "IQ4_XS", "BF16"])  # fmt: skip
def test_llama_cpp_runs_every_type(tiny_checkpoint, tmp_path, llama_cpp, kind):
    folder, out = tiny_checkpoint(**WIDE, num_hidden_layers=1), tmp_path / "out.gguf"
    job(folder, out, type=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = opened(out)[1]
    with torch.no_grad():
        for name, p in model.named_parameters():
            ggml = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1).get_name(name, (".weight",))
            decoded = values(tensors[ggml])
            heads = {"attn_q": 8, "attn_k": 2}.get(ggml.split(".")[-2])
            p.copy_(unpermuted(decoded, heads) if heads else decoded)
        wanted = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    running = llama_cpp(out)
    found = running.log_probabilities(IDS, 320)
    worst = max(abs(wanted[i].item() - p) for i, p in found.items())
    assert worst < 0.25, worst  # llama.cpp rounds the activations to 8 bits
    assert len(running.generate(IDS, 5)) == 5
    assert running.tokenize("The united world, 1923.\n") == tokenizer("The united world, 1923.\n").input_ids


def test_memory_holds_no_more_than_a_block_while_writing(tiny_checkpoint, tmp_path, monkeypatch):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    largest = []
    original = gguf.GGUFWriter.write_tensor_data

    def watched(self, tensor, *args):
        largest.append(tensor.nbytes)
        assert all(ti.tensor is None for part in self.tensors for ti in part.values())
        return original(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", watched)
    job(folder, out, type="F16")
    assert len(largest) == len(opened(out)[1]) and max(largest) == 320 * 64 * 2


def test_the_recipe_and_the_report_are_in_the_file(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    job(folder, out, type="Q8_0")
    keys, _ = opened(out)
    assert "type: Q8_0" in keys["llmq.recipe"]
    report = json.loads(keys["llmq.report"])["linears"]
    assert report["model.layers.0.mlp.up_proj"]["bits"] == 8 and "lm_head" in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "Q4_K_X"}, "no GGUF type 'Q4_K_X'"),
        ({"type": "Q8_0", "override": ("ffn_down:type=Q4_K",)}, "rows of 128 columns cannot be Q4_K"),
        ({"type": "Q8_0", "override": ("nothing:type=Q4_0",)}, "--override 'nothing:type=Q4_0' matches no matrix"),
        ({"type": "Q8_0", "skip": ("nothing",)}, "--skip 'nothing' matches no matrix"),
        ({"format": "gptq", "group_size": 32}, "ends in .gguf, by which .* but --format gptq writes a folder"),
        ({"type": "Q8_0", "override": ("ffn_down:bits=8",)}, "REGEX:type=TYPE"),
        ({"type": "Q8_0", "split_max_size": "4 gigabytes"}, "does not read"),
        ({"type": "Q8_0", "group_size": 32}, "choose by --type alone"),
        ({"type": "Q8_0", "imatrix_out": "no/such/folder/i.gguf"}, "no folder that exists"),
        ({"type": "Q8_0", "imatrix": "no-such.gguf"}, "is not a file"),
        ({"type": "Q8_0", "method": "gptq,signround"}, "integers and small floats only"),
        ({"format": "gptq", "type": "Q8_0"}, "is for GGUF"),
    ],
)
def test_what_cannot_go_together_is_refused_before_any_work(tiny_checkpoint, tmp_path, options, message):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    with pytest.raises(LlmqError, match=message):
        job(folder, out, **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_a_missing_tokenizer_and_an_unknown_model_are_refused(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    (tmp_path / "folder").mkdir()
    with pytest.raises(LlmqError, match="is a folder"):
        job(folder, tmp_path / "folder")
    with pytest.raises(LlmqError, match=r"does not end in \.gguf"):
        job(folder, tmp_path / "model.bin")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(LlmqError, match="tokenizer"):
        job(folder, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_leaves_no_file_and_says_where_the_blocks_are(tiny_checkpoint, tmp_path, monkeypatch):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"

    def full(self, tensor, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(LlmqError, match=f"No space left.*make room.*stays in {out}.llmq-partial"):
        job(folder, out, type="F16")
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.llmq-partial"]
