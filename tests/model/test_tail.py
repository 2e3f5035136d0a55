"""What runs between the last block and the head is found, whatever its name, and refused where it is no norm alone."""

import pytest
import torch
from _families import FAMILIES
from transformers import OPTConfig, OPTForCausalLM

import llmq
from llmq.checkpoint import Source
from llmq.errors import LlmqError
from llmq.model.pretrained import blank_model
from llmq.model.skeleton import Skeleton
from llmq.model.tail import behind
from llmq.verify import verify

NORMS = {
    "gpt_neox": "gpt_neox.final_layer_norm",
    "falcon": "transformer.ln_f",
    "lfm2": "model.embedding_norm",
    "gemma4": "model.language_model.norm",
}


@pytest.mark.parametrize("kind", NORMS)
def test_the_final_norm_is_what_runs_behind_the_blocks(kind, tmp_path):
    FAMILIES[kind].save(tmp_path / "m")
    skeleton = Skeleton(Source(tmp_path / "m"), torch.float32)
    assert skeleton.final_norm == NORMS[kind]
    assert skeleton.full_name(len(skeleton), "norm.weight") == f"{NORMS[kind]}.weight"
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_a_head_behind_a_norm_of_another_name_is_quantized_on_what_it_reads(tmp_path, prose):
    FAMILIES["gpt_neox"].save(tmp_path / "m")
    (tmp_path / "calib.txt").write_text(prose(1500))
    how = {
        "group_size": 32,
        "format": "compressed-tensors",
        "calib": tmp_path / "calib.txt",
        "samples": 8,
        "seq_len": 32,
    }
    record = llmq.quantize(tmp_path / "m", tmp_path / "out", method="gptq", lm_head=True, warn=str, **how)
    line = record["linears"]["lm_head"]
    rtn = llmq.quantize(tmp_path / "m", tmp_path / "rtn", method="rtn", lm_head=True, warn=str, **how | {"calib": None})
    assert line["output_error"] < line["weight_error"] > rtn["linears"]["lm_head"]["weight_error"]
    assert verify(tmp_path / "out", tmp_path / "m").passed


def test_more_than_a_norm_is_refused_by_name(tmp_path, tokenizer_bos):
    sizes = {"vocab_size": 328, "hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)).save_pretrained(tmp_path / "m")
    tokenizer_bos.save_pretrained(tmp_path / "m")
    with pytest.raises(LlmqError, match=r"runs model\.decoder\.final_layer_norm, model\.decoder\.project_out, not one"):
        llmq.quantize(tmp_path / "m", tmp_path / "out", method="rtn", lm_head=True, group_size=32)


def test_nothing_runs_behind_the_blocks_where_no_head_is_reached(tmp_path):
    FAMILIES["llama"].save(tmp_path / "m")
    source = Source(tmp_path / "m")
    model = blank_model(source, FAMILIES["llama"].config(), buffers=True)
    model.get_output_embeddings = lambda: torch.nn.Linear(1, 1)
    assert behind(model, "model.layers") == []
