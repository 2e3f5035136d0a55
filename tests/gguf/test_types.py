"""Types that llama.cpp computes with by itself: its logits are those of the weights that we decode."""

import pytest
import torch
from _ggml import values_of

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


@pytest.mark.parametrize("kind", ["Q2_0"])
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


def test_embedding_and_head_of_2_bits_have_more(tiny_checkpoint, tmp_path):
    """As llama-quantize gives them."""
    written(tiny_checkpoint(**WIDE), tmp_path / "a.gguf", "Q2_0")
    types = {n: t.tensor_type.name for n, t in GgufFile(tmp_path / "a.gguf").tensors.items()}
    assert [types[f"{n}.weight"] for n in ("token_embd", "output")] == ["Q4_K", "Q6_K"]
    written(tiny_checkpoint(tie_word_embeddings=True), tmp_path / "b.gguf", "Q2_0", override=("token_embd:type=Q2_0",))
    file = GgufFile(tmp_path / "b.gguf")
    assert file.tensors["token_embd.weight"].tensor_type.name == "Q2_0"
    assert values_of(file.tensors["token_embd.weight"].data, "Q2_0").unique().numel() > 4
