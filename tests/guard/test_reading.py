import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from llmq.errors import LlmqError, one_line, printable
from llmq.guard.reading import field, is_file, json_object, number, parse_json, tensor_entries, yaml_object


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{'a': 1}", '{"a": ' * 300 + "1" + "}" * 300, '{"a": ' * 100_000, b"\xff{}",
     '{"a": "\\ud800"}', '{"a": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_json_that_is_no_object_is_one_line_that_names_the_file(tmp_path, text):
    file = put(tmp_path / "config.json", text)
    with pytest.raises(LlmqError, match=r"config\.json") as e:
        json_object(file)
    assert "\n" not in str(e.value)


def test_json_keeps_what_it_says(tmp_path):
    value = {"a": [1, {"b": None}], "smile": "\U0001f600", "escaped": "\u00e9"}
    assert json_object(put(tmp_path / "x.json", json.dumps(value))) == value
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"


@pytest.mark.parametrize(
    "text",
    ["- 1", "a: &x [1]\nb: *x", "a: " + "{a: " * 3000 + "1" + "}" * 3000, "a: [", "1: 2", "\x00", "a: !!python/x 1",
     "a: 0x" + "f" * 10**5, "a: 1" + ":1" * 10**5, "a: 1" + ":1" * 10**5 + ".5", "0x" + "f" * 10**5, "a: !!bool x",
     "a: !!int ''", "a: !!timestamp x", "a: 1\na: 2", "<<: 5", "a: [" + "1," * 30_000 + "]"],
    ids=lambda t: t[:20],
)  # fmt: skip
def test_yaml_that_is_no_plain_object_is_one_line(tmp_path, text):
    with pytest.raises(LlmqError, match=r"r\.yaml") as e:
        yaml_object(put(tmp_path / "r.yaml", text))
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_yaml_keeps_what_it_says(tmp_path):
    assert yaml_object(put(tmp_path / "r.yaml", "bits: 4\nskip: [a, b]\n")) == {"bits": 4, "skip": ["a", "b"]}
    assert yaml_object(put(tmp_path / "e.yaml", "")) == {}


def test_a_field_has_its_type():
    assert field({"n": 4}, "n", int, "x") == 4 and field({}, "n", int, "x", 7) == 7
    assert field({"n": 4}, "n", float, "x") == 4
    for bad in ({"n": True}, {"n": "4"}, {}):
        with pytest.raises(LlmqError, match="x: n "):
            field(bad, "n", int, "x")


def test_tensors_come_back_as_they_were_stored(tmp_path):
    stored = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16), "b": torch.arange(7), "c": torch.ones(2, 2).half(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(stored, tmp_path / "m.safetensors")
    entries = tensor_entries(tmp_path / "m.safetensors")
    assert entries.keys() == stored.keys()
    for name, tensor in stored.items():
        got = entries[name].read()
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert torch.equal(
            got.view(torch.uint8) if got.dim() else got, tensor.view(torch.uint8) if tensor.dim() else tensor
        )


def lying(tmp_path, header, data=b"\0" * 16):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return put(tmp_path / "m.safetensors", struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [[], {"a": 5}, {"a": entry(dtype="F3")}, {"a": entry(dtype=["F32"])}, {"a": entry(shape=[-4])}, {"a": {}},
     {"a": entry(shape=[5])}, {"a": entry(offsets=[0, 8], shape=[2])}, {"a": entry(offsets=[4, 20])},
     {"a": entry(), "b": entry(offsets=[8, 24])}, {"a": entry(shape=[2**40, 2**40])}, {"a": entry(shape=["4"])},
     {"a": entry(offsets=[16, 0])}, {"__metadata__": {"format": 1}, "a": entry()}, {"__metadata__": 5, "a": entry()},
     {"a": entry(shape=[True, 4])}, b"{", b"\xff\xff"],
)  # fmt: skip
def test_a_header_that_lies_is_one_line_that_names_the_file(tmp_path, header):
    with pytest.raises(LlmqError, match=r"m\.safetensors"):
        tensor_entries(lying(tmp_path, header))


@pytest.mark.parametrize("data", [b"", b"\1", b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 0)])
def test_a_file_without_a_header_is_refused(tmp_path, data):
    with pytest.raises(LlmqError, match="truncated or not safetensors"):
        tensor_entries(put(tmp_path / "m.safetensors", data))


def test_a_dtype_that_torch_does_not_have_is_named_when_it_is_asked_for(tmp_path):
    header = {"w": entry(dtype="F6_E2M3", offsets=(0, 3))}
    found = tensor_entries(lying(tmp_path, header, b"abc"))["w"]
    for ask in (found.read, found.meta):
        with pytest.raises(LlmqError, match=r"m\.safetensors: tensor w is F6_E2M3, which torch does not have"):
            ask()


def test_text_of_files_cannot_act():
    assert printable("a\x1b[2J\r\nb\x07") == "a\\x1b[2J b\\x07"
    assert str(LlmqError("tensor x\x1b]0;pwned\x07\nerror: all is well")).isprintable()
    assert printable("x" * 50, 10) == "xxxxxxx..." and one_line(KeyError()) == "KeyError"
    assert printable("\ud800 \u202e \u00e9") == "\\ud800 \\u202e \u00e9"


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(LlmqError, match="not a plain file"):
            json_object(tmp_path / name)
    assert not is_file(tmp_path / ("x" * 5000)) and not is_file(tmp_path / "pipe.json")


def test_numbers_of_files_are_such_that_figures_can_be_made_of_them():
    assert number(3) == 3.0 and number(-0.5) == -0.5 and number(5e-324) == 0
    for value in (None, True, "3", [3], float("nan"), float("inf"), -float("inf"), 10**400, 1e300):
        assert number(value) is None


def test_half_of_a_surrogate_pair_is_no_text_in_any_encoding():
    half = '{"a": "\\ud800"}'
    for text in (half, half.encode(), half.encode("utf-16"), half.encode().replace(b"\\ud800", b"\xed\xa0\x80")):
        with pytest.raises(LlmqError, match="x is not valid JSON"):
            parse_json(text, "x")
