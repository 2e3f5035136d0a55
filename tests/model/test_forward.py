"""A forward block by block is the model's own, wherever hidden states wait meanwhile."""

import pytest
import torch
from _families import FAMILIES

from llmq.checkpoint import Source
from llmq.model.ends import entering, logits, outside_loaded
from llmq.model.experts import in_experts
from llmq.model.forward import Files, Forward
from llmq.model.skeleton import Skeleton

CPU = torch.device("cpu")


@pytest.mark.parametrize("in_files", [False, True])
def test_batches_of_unlike_lengths_leave_as_they_leave_the_model(in_files, tiny_checkpoint, tiny_llama, tmp_path):
    batches = [torch.arange(2, 2 + n)[None] for n in (7, 12, 7)]
    skeleton = Skeleton(Source(tiny_checkpoint()), torch.float32)
    forward = Forward(skeleton, batches, CPU, Files(tmp_path, 3, CPU) if in_files else list)
    for i in range(len(skeleton)):
        forward.step(i)
        assert not in_files or [len(list(f.iterdir())) for f in tmp_path.iterdir()] == [3]  # none of before
    with torch.no_grad(), outside_loaded(skeleton, CPU, head=True):
        for ids, hidden in zip(batches, forward.hidden, strict=True):
            torch.testing.assert_close(logits(skeleton, hidden), tiny_llama()(ids).logits, rtol=0, atol=0)
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_batches_are_embedded_when_they_are_asked_for(tiny_checkpoint):
    """So that those of a large evaluation are never all in memory."""
    asked = []

    def batches():
        for n in (4, 5):
            asked.append(n)
            yield torch.arange(n)[None]

    coming = entering(Skeleton(Source(tiny_checkpoint()), torch.float32), batches(), CPU)
    with torch.no_grad():
        hidden, calls = next(coming)
    assert asked == [4] and hidden.shape == (1, 4, 64) and len(calls) == 2
    coming.close()


def test_a_tied_head_shares_the_memory_of_the_embedding(tiny_checkpoint):
    skeleton = Skeleton(Source(tiny_checkpoint(tie_word_embeddings=True)), torch.float32)
    with outside_loaded(skeleton, CPU, head=True):
        both = [skeleton.model.get_input_embeddings().weight, skeleton.model.get_output_embeddings().weight]
        assert both[0].data_ptr() == both[1].data_ptr() and not both[0].is_meta
    other = Skeleton(Source(tiny_checkpoint(tie_word_embeddings=True)), torch.bfloat16)
    with outside_loaded(other, CPU, head=True):  # the embedding stays as it is stored, the head computes
        assert other.model.get_input_embeddings().weight.dtype == torch.float32
        assert other.model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_experts_are_read_where_a_batch_comes_to_them(tmp_path):
    FAMILIES["mixtral"].save(tmp_path)
    skeleton = Skeleton(Source(tmp_path), torch.float32)
    ids = [torch.arange(24).reshape(2, 12)]
    together = Forward(skeleton, ids, torch.device("cpu"))
    one_by_one = Forward(skeleton, ids, torch.device("cpu"), experts=False)
    there, get = [], skeleton.source.get

    def counting(name):
        there.append(sum(not m.weight.is_meta for m in in_experts(skeleton.blocks[0]).values()))
        return get(name)

    for i in range(len(skeleton)):
        together.step(i)
        skeleton.source.get = counting
        one_by_one.step(i)
        skeleton.source.get = get
        assert torch.equal(together.hidden[0], one_by_one.hidden[0])
    assert there and not any(there)  # none is left when the next is read
