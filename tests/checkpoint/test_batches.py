"""Hidden states on the disk: what is read is what was written, as often as it is asked for."""

import pytest
import torch

from llmq import aside
from llmq.checkpoint.batches import Batches
from llmq.types import LlmqError


@pytest.fixture(params=[False, True], ids=["at once", "ahead and behind"])
def pays(request, monkeypatch):
    """Read and write as on the CPU, and as where a GPU computes."""
    monkeypatch.setattr(aside, "pays", lambda device: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_read_as_they_were_written_in_files_named_by_their_numbers(tmp_path, dtype, pays):
    tensors = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    turned = tensors[1].transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    batches = Batches(tmp_path / "a/007", "hidden", [1, 4, 6]).filled([tensors[0], turned, tensors[2]])
    assert sorted(f.name for f in (tmp_path / "a/007").iterdir()) == [f"hidden-00000{n}" for n in (1, 4, 6)]
    for _ in range(2):
        assert len(batches) == 3 and all(torch.equal(a, b) for a, b in zip(batches, tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(batches[1:], tensors[1:], strict=True))
    after = batches.moved(2 * b for b in batches)
    assert after.folder == tmp_path / "a/008" and after.numbers == [1, 4, 6] and torch.equal(after[2], 2 * tensors[2])
    assert torch.equal(batches[2], tensors[2]) and not Batches()


def test_a_batch_that_is_gone_is_named(tmp_path, pays):
    batches = Batches(tmp_path / "0", "hidden", range(1)).filled([torch.ones(2)])
    (tmp_path / "0/hidden-000000").unlink()
    with pytest.raises(LlmqError, match="cannot read .*hidden-000000"):
        batches[0]


def test_a_batch_that_cannot_be_written_is_an_error_in_one_line_with_and_without_a_thread(tmp_path, pays):
    (tmp_path / "0").write_text("a file, where the folder should be")
    with pytest.raises(LlmqError, match="cannot write .*0"):
        Batches(tmp_path / "0", "hidden", range(2)).filled([torch.ones(2)] * 2)
    (tmp_path / "1/hidden-000000").mkdir(parents=True)
    with pytest.raises(LlmqError, match="cannot write .*hidden-000000"):
        Batches(tmp_path / "1", "hidden", range(2)).filled([torch.ones(2)] * 2)
