"""Types that llama.cpp computes with by itself: its logits are those of the weights that we decode."""

import pytest
import torch
from _ggml import values_of

from llmq.gguf import mixture
from llmq.gguf.reader import GgufFile
from llmq.pipeline.plan import prepare
from llmq.pipeline.run import quantize
from llmq.recipe import Recipe
from llmq.verify import verify
from llmq.verify.ggml import open_gguf
from llmq.verify.report import Report

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
IDS = [5, 17, 300, 41, 250, 250, 9, 120]


def written(folder, out, kind, **options):
    recipe = Recipe(format="gguf", method="rtn", dtype="float32", type=kind, **options)
    return quantize(prepare(str(folder), recipe, "cpu"), out)


def decoded(out):
    """Return the model of a file, its weights decoded."""
    found, _ = open_gguf(out, report := Report())
    model = found.skeleton.filled(torch.device("cpu"))
    assert report.passed, report.failures
    return model


def difference(model, running, vocabulary=320):
    """Return the largest difference of a log-probability between a model and llama.cpp."""
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    return max(abs(wanted[i].item() - p) for i, p in running.log_probabilities(IDS, vocabulary).items())


@pytest.mark.parametrize("kind", ["Q2_0", "MXFP4", "NVFP4"])
def test_llama_cpp_computes_with_the_weights_that_we_decode(kind, tiny_checkpoint, tiny_llama, tmp_path, llama_cpp):
    """Within what its 8-bit activations cost; the float model, whose weights are others, is far off."""
    folder, out = tiny_checkpoint(**WIDE), tmp_path / "out.gguf"
    written(folder, out, kind)
    types = {n: t.tensor_type.name for n, t in GgufFile(out).tensors.items()}
    assert {types[f"blk.1.{leaf}.weight"] for leaf in ("attn_q", "attn_output", "ffn_up", "ffn_down")} == {kind}
    assert verify(out, folder).passed
    running = llama_cpp(out)
    near, far = difference(decoded(out), running), difference(tiny_llama(**WIDE), running)
    assert near < 0.2 and far > 10 * near


@pytest.mark.parametrize("kind", ["Q2_0", "MXFP4", "NVFP4"])
def test_solvers_lower_the_error_of_each(kind, tiny_checkpoint, tmp_path, prose):
    """Error feedback and descent, as for any other type; what they leave in the file is what was solved."""
    (tmp_path / "text.txt").write_text(prose(2000))
    folder, errors = tiny_checkpoint(**WIDE, num_hidden_layers=1), []
    for method in ("gptq", "gptq,descent"):
        given = {"type": kind, "method": method, "calib": str(tmp_path / "text.txt"), "samples": 8, "seq_len": 64}
        recipe = Recipe(format="gguf", dtype="float32", **given)
        record = quantize(prepare(str(folder), recipe, "cpu"), tmp_path / f"{method}.gguf")
        errors.append(record["linears"]["model.layers.0.mlp.down_proj"]["output_error"])
        assert verify(tmp_path / f"{method}.gguf", folder).passed
    assert errors[1] < errors[0]


def test_linears_with_biases_that_take_no_factor_are_no_nvfp4(tiny_checkpoint, tmp_path, llama_cpp):
    """llama.cpp ends itself over a factor beside the bias of an MLP; that of attention it adds behind the factor."""
    folder = tiny_checkpoint(**WIDE, attention_bias=True, mlp_bias=True)
    written(folder, tmp_path / "out.gguf", "NVFP4")
    types = {n: t.tensor_type.name for n, t in GgufFile(tmp_path / "out.gguf").tensors.items()}
    assert [types[f"blk.0.{leaf}.weight"] for leaf in ("attn_output", "ffn_up")] == ["NVFP4", "IQ4_NL"]
    assert difference(decoded(tmp_path / "out.gguf"), llama_cpp(tmp_path / "out.gguf")) < 0.2


def test_what_is_not_meant_to_have_inputs_of_4_bits_says_so(tiny_checkpoint, tmp_path):
    """NVIDIA's newest GPUs round the inputs of such weights to 4 bits too, where nothing is said."""
    for kind, leaves in (("NVFP4", 7), ("MXFP4", 7), ("Q4_0", 0)):
        written(tiny_checkpoint(**WIDE), tmp_path / "out.gguf", kind, skip=("attn_v",) if kind == "MXFP4" else ())
        file = GgufFile(tmp_path / "out.gguf")
        small = [n for n, t in file.tensors.items() if t.tensor_type.name == kind and leaves]
        assert (file.value("general.tensor_extra.name") or []) == small
        assert len(small) == 2 * leaves - 2 * (kind == "MXFP4")
        assert not leaves or not file.value("general.tensor_extra.prec_a4").any()
        (tmp_path / "out.gguf").unlink()


def test_the_experts_of_mxfp4_moe_alone_are_mxfp4(tmp_path):
    """As llama-quantize gives them."""
    shapes = {"token_embd.weight": (64, 256), "output.weight": (64, 256), "blk.0.attn_v.weight": (64, 256)}
    shapes |= {"blk.0.ffn_up_exps.weight": (8, 256, 64), "blk.0.ffn_up_shexp.weight": (64, 256)}
    model = mixture.Model(1, 1, False, False, False, 8)
    types = mixture.assign(shapes, "MXFP4_MOE", model)
    assert types.pop("blk.0.ffn_up_exps.weight") == "MXFP4" and set(types.values()) == {"Q8_0"}
    assert mixture.file_type("MXFP4_MOE") == mixture.file_type("MXFP4") == 38


def test_embedding_and_head_of_2_bits_have_more(tiny_checkpoint, tmp_path):
    """As llama-quantize gives them."""
    written(tiny_checkpoint(**WIDE), tmp_path / "a.gguf", "Q2_0")
    types = {n: t.tensor_type.name for n, t in GgufFile(tmp_path / "a.gguf").tensors.items()}
    assert [types[f"{n}.weight"] for n in ("token_embd", "output")] == ["Q4_K", "Q6_K"]
    written(tiny_checkpoint(tie_word_embeddings=True), tmp_path / "b.gguf", "Q2_0", override=("token_embd:type=Q2_0",))
    file = GgufFile(tmp_path / "b.gguf")
    assert file.tensors["token_embd.weight"].tensor_type.name == "Q2_0"
    assert values_of(file.tensors["token_embd.weight"].data, "Q2_0").unique().numel() > 4
