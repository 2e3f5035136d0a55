"""Files that other tools make from a GGUF file of llmq's, whose keys they copy: its checksums are not theirs."""

import gguf
import pytest
from gguf.quants import dequantize, quantize

import llmq
from llmq.checkpoint import Source
from llmq.gguf.reader import GgufFile
from llmq.types import LlmqError
from llmq.verify import verify

Q8_0, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
MATRIX = "model.layers.0.mlp.up_proj.weight"


def written(folder, out, **options):
    llmq.quantize(folder, out, method="rtn", dtype="float32", **options)
    return out


def copied(files, out, file_type=None, kind=None):
    """Write files as one, as other tools do: all keys but those of shards, matrices maybe in another type."""
    readers, writer = [gguf.GGUFReader(f) for f in files], gguf.GGUFWriter(out, "llama")
    for key, f in readers[0].fields.items():
        if key == "general.file_type" and file_type is not None:
            writer.add_file_type(file_type)
        elif not key.startswith(("GGUF.", "split.")) and key != "general.architecture":
            writer.add_key_value(key, f.contents(), f.types[0], sub_type=f.types[-1] if len(f.types) > 1 else None)
    for t in (t for reader in readers for t in reader.tensors):
        if kind is None or t.data.ndim == 1:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        else:
            writer.add_tensor(t.name, quantize(dequantize(t.data, t.tensor_type), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_file_in_other_types_is_held_against_no_record(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    f16 = written(folder, tmp_path / "f16.gguf", type="F16")
    other = copied([f16], tmp_path / "q8.gguf", gguf.LlamaFileType.MOSTLY_Q8_0, Q8_0)  # as llama-quantize does
    assert GgufFile(f16).report() and GgufFile(other).report() == {}
    report = verify(other)
    assert report.passed and any("by another tool" in note for note in report.notes)
    llmq.dequantize(other, tmp_path / "floats", dtype="float32")
    found, wanted = (Source(path).get(MATRIX) for path in (tmp_path / "floats", folder))
    assert 0 < (found - wanted).norm() < 0.01 * wanted.norm()


def test_a_file_that_says_another_type_and_holds_the_same_is_damaged(tiny_checkpoint, tmp_path):
    f16 = written(tiny_checkpoint(), tmp_path / "f16.gguf", type="F16")
    damaged = copied([f16], tmp_path / "damaged.gguf", gguf.LlamaFileType.MOSTLY_Q8_0, F16)
    with pytest.raises(LlmqError, match="is not as written: its checksum differs"):
        llmq.dequantize(damaged, tmp_path / "floats")


def test_shards_that_were_joined_are_held_against_the_record(tiny_checkpoint, tmp_path):
    wide = tiny_checkpoint(hidden_size=256, intermediate_size=1024)
    written(wide, tmp_path / "m.gguf", type="Q8_0", split_max_size="1M")
    shards = sorted(tmp_path.glob("m-*.gguf"))
    joined = copied(shards, tmp_path / "joined.gguf")  # as llama-gguf-split --merge does
    assert len(shards) > 1 and GgufFile(joined).report()
    report = verify(joined)
    assert report.passed and any("split or joined" in note for note in report.notes)
    data = bytearray(joined.read_bytes())
    data[-40] ^= 1  # in the last tensor
    joined.write_bytes(data)
    assert [f for f in verify(joined).failures if "not as it was solved" in f]
