"""GGUF files that lie: each is refused by one line, in time and memory that follow its size."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from llmq.gguf import imatrix
from llmq.gguf.reader import GgufFile
from llmq.inspection import inspect
from llmq.types import LlmqError

U8, U16, U32, STRING, ARRAY, U64 = 0, 2, 4, 8, 9, 10
F32, F16, Q4_0 = 0, 1, 2


def text(data):
    return struct.pack("<Q", len(data)) + data


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def tensor(name, shape, kind=F32, at=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at)


def array(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


ARCH = key(b"general.architecture", STRING, text(b"llama"))


@pytest.fixture
def written(tmp_path):
    """`written(keys, tensors, data)`: a GGUF file made byte by byte."""

    def write(keys=(), tensors=(), data=b"", version=3, counts=None, order="<"):
        counts = (len(tensors), len(keys)) if counts is None else counts
        header = b"GGUF" + struct.pack(f"{order}IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
        file = tmp_path / "file.gguf"
        file.write_bytes(header + b"\0" * (-len(header) % 32) + data)
        return file

    return write


LIES = {
    "version 1": ({"version": 1}, "version is 1"),
    "big-endian": ({"order": ">"}, "big-endian"),
    "2^60 keys": ({"counts": (0, 2**60)}, "keys, at most"),
    "2^60 tensors": ({"counts": (2**60, 0)}, "tensors, at most"),
    "more keys than there are": ({"keys": [ARCH], "counts": (0, 9)}, "two entries "),
    "a name of 2^60 bytes": ({"keys": [struct.pack("<Q", 2**60)]}, "bytes in a name"),
    "a string of 2^60 bytes": ({"keys": [key(b"x", STRING, struct.pack("<Q", 2**60))]}, "before its header"),
    "2^60 numbers": ({"keys": [key(b"x", ARRAY, array(U8, 2**60))]}, "before its header"),
    "2^60 strings": ({"keys": [key(b"x", ARRAY, array(STRING, 2**60))]}, "strings, at most"),
    "nested arrays": ({"keys": [key(b"x", ARRAY, array(ARRAY, 1) * 5000 + array(U32, 0))]}, "array of arrays"),
    "a key of no type": ({"keys": [key(b"x", 99, b"")]}, "unknown type 99"),
    "an array of no type": ({"keys": [key(b"x", ARRAY, array(77, 1))]}, "unknown type 77"),
    "a name that is no text": ({"keys": [key(b"\xff\xfe", U32, b"\0" * 4)]}, "not UTF-8"),
    "a key twice": ({"keys": [ARCH, ARCH]}, "two entries general.architecture"),
    "alignment 0": ({"keys": [key(b"general.alignment", U32, b"\0" * 4)]}, "no power of two"),
    "alignment of text": ({"keys": [key(b"general.alignment", STRING, text(b"32"))]}, "no power of two"),
    "a tensor twice": ({"tensors": [tensor(b"a", (4,))] * 2, "data": b"\0" * 64}, "two entries a"),
    "a tensor of no type": ({"tensors": [tensor(b"a", (4,), 200)]}, "unknown type 200"),
    "a type of the past": ({"tensors": [tensor(b"a", (4,), 4)]}, "unknown type 4"),
    "five dimensions": ({"tensors": [tensor(b"a", (1, 1, 1, 1, 1))]}, "dimensions of a tensor"),
    "2^32 dimensions": ({"tensors": [text(b"a") + struct.pack("<I", 2**32 - 1)]}, "dimensions of a tensor"),
    "2^252 weights": ({"tensors": [tensor(b"a", (2**63,) * 4)]}, "ends at byte"),
    "half a block": ({"tensors": [tensor(b"a", (48, 1), Q4_0)], "data": b"\0" * 64}, "do not hold Q4_0"),
    "beyond the end": ({"tensors": [tensor(b"a", (4,), at=64)], "data": b"\0" * 64}, "ends at byte"),
    "an offset of 2^63": ({"tensors": [tensor(b"a", (4,), at=2**63)], "data": b"\0" * 64}, "ends at byte"),
    "an overlap": ({"tensors": [tensor(b"a", (16,)), tensor(b"b", (4,), at=32)], "data": b"\0" * 64}, "overlaps"),
    "not aligned": ({"tensors": [tensor(b"a", (4,), at=4)], "data": b"\0" * 64}, "not aligned"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named(written, name):
    parts, reason = LIES[name]
    with pytest.raises(LlmqError, match=rf"file\.gguf is truncated or damaged \(.*{reason}.*\); download"):
        GgufFile(written(**parts))


def test_every_cut_is_refused(written):
    whole = written(
        [ARCH, key(b"x", ARRAY, array(STRING, 2, text(b"a") + text(b"bc")))], [tensor(b"t", (8,))], b"\0" * 32
    )
    data = whole.read_bytes()
    GgufFile(whole)
    for size in range(len(data)):
        whole.write_bytes(data[:size])
        with pytest.raises(LlmqError, match=r"truncated or damaged|is not a GGUF file"):
            GgufFile(whole)


def test_values_and_tensors_are_those_of_gguf_py(tmp_path):
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("words", ["one", "zwölf", ""])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_bool("yes", True)
    writer.add_int64("small", -(2**40))
    made = {"f16": np.arange(6, dtype=np.float16).reshape(2, 3), "i8": np.arange(3, dtype=np.int8)}
    made["q8"] = np.arange(2 * 68, dtype=np.uint8).reshape(2, 68)
    for name, data in made.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if name == "q8" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reference = GgufFile(path), gguf.GGUFReader(path)
    assert file.value("words") == ["one", "zwölf", ""] and file.value("floats").tolist() == [0.5, -2.0]
    assert file.value("yes") is True and file.value("small") == -(2**40) and file.value("no such key") is None
    assert file.keys() == [k for k in reference.fields if not k.startswith("GGUF.")]
    for t in reference.tensors:
        own = file.tensors[t.name]
        assert (own.data == t.data).all() and own.data.shape == t.data.shape and own.data.dtype == t.data.dtype
        assert (own.n_bytes, own.n_elements, own.data_offset) == (t.n_bytes, t.n_elements, t.data_offset)
        assert list(own.shape) == t.shape.tolist() and own.tensor_type.number == t.tensor_type
    assert file.kinds() == {"F16": 1, "I8": 1, "Q8_0": 1} and file.data_bytes() == 12 + 3 + 136


def test_a_large_array_costs_no_memory(written):
    path = written([ARCH, key(b"x", ARRAY, array(U8, 20_000_000, b"\0" * 20_000_000))])
    tracemalloc.start()
    file = GgufFile(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert len(file.value("x")) == 20_000_000


def test_inspect_shows_what_keys_of_another_kind_hold(written):
    parts = [ARCH, key(b"split.count", U16, b"\3\0"), key(b"general.name", ARRAY, array(U8, 3, b"abc"))]
    parts += [key(b"llama.block_count", STRING, text(b"two"))]
    (table,) = inspect(str(written(parts)))
    cells = [str(c) for column in table.columns for c in column.cells]
    assert "? of 3" in cells and "two, None" in cells


@pytest.mark.parametrize("report", [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"w": 5}'])
def test_inspect_refuses_records_that_are_none(written, report):
    with pytest.raises(LlmqError, match=r"llmq\.report|w is 5"):
        list(inspect(str(written([ARCH, key(b"llmq.report", STRING, text(report))])), linears=True))


def test_a_layout_that_is_no_text_says_nothing(written):
    assert not GgufFile(written([ARCH, key(b"llmq.layout", ARRAY, array(U32, 2, b"\0" * 8))])).remade


SUMS = [key(b"general.type", STRING, text(b"imatrix"))]
ONES = np.ones(8, np.float32).tobytes()


@pytest.mark.parametrize(
    ("tensors", "data", "reason"),
    [
        ([], b"", "holds no sums"),
        ([tensor(b"a.in_sum2", (8,))], ONES, "each of its counts"),
        ([tensor(b"a.in_sum2", (4, 2)), tensor(b"a.counts", (1,), at=32)], ONES * 2, "each of its counts"),
        ([tensor(b"a.in_sum2", (8,)), tensor(b"a.counts", (8,), at=32)], ONES * 2, "each of its counts"),
        ([tensor(b"a.in_sum2", (0,)), tensor(b"a.counts", (0,))], b"", "each of its counts"),
        ([tensor(b"a.in_sum2", (16,), F16), tensor(b"a.counts", (1,), at=32)], ONES * 2, "is F16, not F32"),
        ([tensor(b"a.in_sum2", (8,)), tensor(b"a.counts", (2,), F16, at=32)], ONES * 2, "each of its counts"),
        ([tensor(b"a.in_sum2", (8,)), tensor(b"a.counts", (1,), at=32)], b"\xff" * 64, "negative or infinite"),
        ([tensor(b"a.in_sum2", (8,)), tensor(b"a.counts", (1,), at=32)], ONES + b"\0\0\x80\xbf" * 8, "negative"),
        ([tensor(b"a.in_sum2", (8,)), tensor(b"a.counts", (1,), at=32)], ONES + b"\0" * 32, "holds no sums"),
    ],
)
def test_an_importance_matrix_that_is_none_is_refused(written, tensors, data, reason):
    with pytest.raises(LlmqError, match=rf"file\.gguf.*{reason}"):
        imatrix.read(written(SUMS, tensors, data))


def test_other_importance_files_are_named(written, tmp_path):
    with pytest.raises(LlmqError, match="no importance matrix"):
        imatrix.read(written([ARCH]))
    with pytest.raises(LlmqError, match="no importance matrix"):
        imatrix.read(written([key(b"general.type", ARRAY, array(U8, 2, b"ab"))]))
    old = tmp_path / "imatrix.dat"
    old.write_bytes(b"\1\0\0\0")
    with pytest.raises(LlmqError, match=r"old form; llama-imatrix --in-file"):
        imatrix.read(old)
