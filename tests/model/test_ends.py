"""What lies before and behind the blocks: what blocks are called with, logits of hidden states."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from llmq.checkpoint import Source
from llmq.model.ends import embed, logits, of_their_own, outside_loaded
from llmq.model.lanes import run
from llmq.model.skeleton import Skeleton

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(4, 6)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}


def gemma4(folder):
    """A wrapper whose blocks are called with an embedding of each token of their own, and share keys and values."""
    text = SMALL | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 1}
    text |= {"layer_types": ["full_attention"] * 2, "global_head_dim": 8}
    ids = {"image_token_id": 63, "audio_token_id": 62, "video_token_id": 61}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=EYES, audio_config=None, **ids)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def gemma2(folder):
    """A model with a window shorter than the sequence, logits that are capped and norms that hold w of 1 + w."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **SMALL, sliding_window=4)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [gemma2, gemma4])
@torch.no_grad()
def test_blocks_one_by_one_give_the_models_own_logits(tmp_path, make):
    model = make(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    hidden, calls = embed(skeleton, IDS.split(2), CPU)
    for i in range(len(skeleton)):
        with skeleton.loaded(i, CPU) as block:
            hidden = [run(block, h, c[i]) for h, c in zip(hidden, calls, strict=True)]
    with outside_loaded(skeleton, CPU, head=True):
        found = torch.cat([logits(skeleton, h) for h in hidden])
    assert torch.allclose(found, model(input_ids=IDS).logits, atol=1e-5)
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_batches_share_what_is_equal_and_keep_what_is_their_own(tmp_path):
    gemma4(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    _, (first, second) = embed(skeleton, IDS.split(2), CPU)
    (own, *_), other = first[0][0], second[0][0][0]
    assert own.shape == other.shape and not torch.equal(own, other)  # per-layer embeddings of the batch's tokens
    tables, same = (call[1]["position_embeddings"] for call in (first[0], second[0]))
    assert tables[0] is same[0] and tables[1] is same[1]
    shared = [call[1]["shared_kv_states"] for call in (*first, *second)]
    assert shared[0] is shared[1] and shared[2] is shared[3] and shared[0] is not shared[2]


def test_another_stream_leaves_its_keys_in_objects_of_its_own(tmp_path):
    gemma4(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    _, (calls,) = embed(skeleton, [IDS], CPU)
    apart = of_their_own(calls)
    theirs, ours = ([call[1]["shared_kv_states"] for call in some] for some in (apart, calls))
    assert theirs[0] is theirs[1] and theirs[0] is not ours[0]
    with skeleton.loaded(0, CPU) as block, torch.no_grad():
        run(block, torch.randn(4, 6, 32), apart[0])
    assert "full_attention" in theirs[1] and not ours[0]
    assert apart[1][0][0] is calls[1][0][0]  # a tensor


def test_what_reads_images_is_not_loaded(tmp_path):
    gemma4(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    assert skeleton.prefix == "model.language_model.layers"
    with outside_loaded(skeleton, CPU, head=True):
        loaded = {n for n, p in skeleton.model.named_parameters() if not p.is_meta}
    assert "model.language_model.embed_tokens.weight" in loaded
    assert not any("vision" in n for n in loaded)
