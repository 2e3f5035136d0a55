"""Files that other tools make from a GGUF file of llmq's, whose keys they copy: its checksums are not theirs."""

import gguf
import pytest
from _rewriting import rewrite_gguf

import llmq
from llmq.checkpoint import Source
from llmq.gguf.reader import GgufFile
from llmq.types import LlmqError
from llmq.verify import verify

Q8_0 = gguf.GGMLQuantizationType.Q8_0
SAYS_Q8_0 = {"general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0)}
MATRIX = "model.layers.0.mlp.up_proj.weight"


def written(folder, out, **options):
    llmq.quantize(folder, out, method="rtn", dtype="float32", **options)
    return out


def test_a_file_in_other_types_is_held_against_no_record(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    f16 = written(folder, tmp_path / "f16.gguf", type="F16")
    other = rewrite_gguf([f16], tmp_path / "q8.gguf", SAYS_Q8_0, without=(), kind=Q8_0)  # as llama-quantize does
    assert GgufFile(f16).report() and GgufFile(other).report() == {}
    report = verify(other)
    assert report.passed and any("by another tool" in note for note in report.notes)
    llmq.dequantize(other, tmp_path / "floats", dtype="float32")
    found, wanted = (Source(path).get(MATRIX) for path in (tmp_path / "floats", folder))
    assert 0 < (found - wanted).norm() < 0.01 * wanted.norm()


def test_a_file_that_says_another_type_and_holds_the_same_is_damaged(tiny_checkpoint, tmp_path):
    f16 = written(tiny_checkpoint(), tmp_path / "f16.gguf", type="F16")
    damaged = rewrite_gguf([f16], tmp_path / "damaged.gguf", SAYS_Q8_0, without=())
    with pytest.raises(LlmqError, match="is not as written: its checksum differs"):
        llmq.dequantize(damaged, tmp_path / "floats")


def test_shards_that_were_joined_are_held_against_the_record(tiny_checkpoint, tmp_path):
    wide = tiny_checkpoint(hidden_size=256, intermediate_size=1024)
    written(wide, tmp_path / "m.gguf", type="Q8_0", split_max_size="1M")
    shards = sorted(tmp_path.glob("m-*.gguf"))
    joined = rewrite_gguf(shards, tmp_path / "joined.gguf", {}, without=())  # as llama-gguf-split --merge does
    assert len(shards) > 1 and GgufFile(joined).report()
    report = verify(joined)
    assert report.passed and any("split or joined" in note for note in report.notes)
    data = bytearray(joined.read_bytes())
    data[-40] ^= 1  # in the last tensor
    joined.write_bytes(data)
    assert [f for f in verify(joined).failures if "not as it was solved" in f]
