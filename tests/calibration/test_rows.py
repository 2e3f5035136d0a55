"""Rows and chats become documents as transformers would render them; what is left out is counted; hostile files end."""

from __future__ import annotations

import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmq.calibration import rows, text, tokens
from llmq.calibration.rows import Tally, documents, row_text
from llmq.guard import confined
from llmq.types import LlmqError

TOOLS_TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}{{ m.weight }}\n{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CHAT = [
    {"role": "user", "content": "Weather in Paris?", "weight": 2},
    {"role": "assistant", "reasoning_content": "I must ask.", "tool_calls": [CALL]},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "get_weather", "content": "18 C"},
]


@pytest.fixture
def tokenizer(tokenizer_bos, monkeypatch):
    monkeypatch.setattr(tokenizer_bos, "chat_template", TOOLS_TEMPLATE)
    return tokenizer_bos


def read(path, tokenizer, tally=None):
    return "".join(documents(path, tokenizer, tally or Tally()))


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [], "", None])
def test_a_chat_goes_whole_through_the_tokenizers_own_template(tmp_path, tokenizer, tools):
    given = TOOLS if tools else None
    want = tokenizer.apply_chat_template(CHAT, tools=given, tokenize=False)
    assert want.count("CALL") == 3 and "<think>I must ask.</think>" in want and ("TOOLS" in want) == bool(tools)
    row = {"messages": CHAT, "tools": tools}
    assert read(jsonl(tmp_path / "a.jsonl", row), tokenizer) == want
    if not isinstance(tools, list) or tools:  # a table has no type for an empty list's elements
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet", tokenizer) == want, "nulls that fill a table's columns are not said"
    ids = tokenizer(want, add_special_tokens=False)["input_ids"]
    got = tokens(str(tmp_path / "a.jsonl"), tokenizer, len(ids) // 23, 24, 0)[:, 1:].flatten().tolist()
    assert got == ids[: len(got)] and len(got) > 100


def test_sharegpt_turns_are_renamed_and_keep_what_else_they_say(tmp_path, tokenizer):
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi", "weight": 3},
        {"from": "gpt", "tool_calls": [CALL]},
    ]
    same = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "weight": 3},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    want = tokenizer.apply_chat_template(same, tokenize=False)
    assert read(jsonl(tmp_path / "a.jsonl", {"conversations": turns}), tokenizer) == want


def test_the_template_is_chosen_by_name_as_transformers_does(tmp_path, tokenizer_bos, monkeypatch):
    named = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | length }}{{ messages[0].content }}"}
    monkeypatch.setattr(tokenizer_bos, "chat_template", named)
    chat = [{"role": "user", "content": "x"}]
    file = jsonl(tmp_path / "a.jsonl", {"messages": chat}, {"messages": chat, "tools": TOOLS})
    assert read(file, tokenizer_bos) == "DxT1x"


def test_what_is_left_out_is_counted_and_told(tmp_path, tokenizer):
    file = jsonl(
        tmp_path / "a.jsonl",
        *({"text": "one of the words. " * 20, "id": i, "url": "x"} for i in range(5)),
        {"text": " \n", "id": 9},
        {"text": ""},
        {"messages": []},
        {"prompt": "unread", "id": 10},
        {"messages": "no list"},
        {"text": "said " * 20, "messages": [{"role": "user", "content": "unread"}], "url": None},
    )
    said = []
    tokens(str(file), tokenizer, 1, 16, 0, warn=said.append)
    assert said == [
        f"calibration text {file}: left out of 11 rows: 3 empty, 2 without text or chat",
        f"calibration text {file}: not read of its 11 rows: id (7), url (5), messages (2), prompt (1)",
    ]
    said.clear()
    plain = jsonl(tmp_path / "b.jsonl", {"text": "one of the words. " * 20})
    tokens(str(plain), tokenizer, 1, 16, 0, warn=said.append)
    assert said == []
    with pytest.raises(LlmqError, match=r"line 1 has no text, messages or conversations \(it has: prompt\)"):
        tokens(str(jsonl(tmp_path / "c.jsonl", *[{"prompt": "a"}] * 9)), tokenizer, 1, 16, 0)


def test_other_columns_of_a_table_are_told_and_not_read(tmp_path, tokenizer):
    table = pa.table({"text": ["one of the words. " * 20] * 3, "id": [1, 2, 3], "blob": [b"\xff"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    said = []
    tokens(str(tmp_path / "a.parquet"), tokenizer, 1, 16, 0, warn=said.append)
    assert said == [f"calibration text {tmp_path / 'a.parquet'}: not read of its 3 rows: id (3), blob (3)"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 1 seconds"),
        ("{{ 'a' * 10**10 }}", "refuses it: MemoryError"),
        ("{{ '%9999999999d' % 1 }}", "refuses it: MemoryError|of memory"),
        ("{{ 1/0 }}", "refuses it: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it: maximum recursion depth"),
        ("{{ messages.nothing.at.all }}", "refuses it: 'list object' has no attribute 'nothing'"),
        ("{{ messages[0]['content'] + 1 }}", "refuses it: TypeError"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{% for", "refuses it: "),
        ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
    ],
)
def test_a_hostile_template_is_one_line_naming_the_row(tmp_path, tokenizer_bos, monkeypatch, template, message):
    monkeypatch.setattr(confined, "SECONDS", 1)
    monkeypatch.setattr(tokenizer_bos, "chat_template", template)
    file = jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(LlmqError, match=f"line 1: the chat template {message}") as e:
        tokens(str(file), tokenizer_bos, 1, 8, 0)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "\\ud800 hello"}', "line 2 is not valid JSON"),
        (b'{"a":' * 20000 + b"1" + b"}" * 20000, "line 2 is nested too deep"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 2 is not valid JSON"),
        (b'{"messages": [[{"role": "user", "content": "a"}]]}', "line 2: a turn of a chat needs"),
        (b'{"messages": [{"role": 5, "content": "a"}]}', "line 2: a turn of a chat needs"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "line 2: tools is a list"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "["}', "line 2: tools is not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": [5]}', "line 2: the chat template refuses it"),
        (b"\xff\xfe", "not UTF-8"),
        (b"null", "line 2 is not a JSON object"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_hostile_line_is_one_line_with_its_number(tmp_path, tokenizer, content, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n' + content + b"\n")
    with pytest.raises(LlmqError, match=message) as e:
        tokens(str(tmp_path / "a.jsonl"), tokenizer, 1, 8, 0)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_devices_and_pipes_are_refused(tmp_path, tokenizer):
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("zero.txt", "pipe.jsonl"):
        with pytest.raises(LlmqError, match=f"{name} is no regular file"):
            tokens(str(tmp_path / name), tokenizer, 1, 8, 0)
    with pytest.raises(LlmqError, match=r"holds no \.txt"):
        tokens(str(tmp_path), tokenizer, 1, 8, 0)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_long_line_is_tokenized_in_pieces_to_the_same_tokens(tmp_path, tokenizer_plain, monkeypatch, prose, kind):
    line = prose(4000).replace("\n", " ")
    want = tokenizer_plain(line + "\n\n" * (kind == "jsonl"), add_special_tokens=False)["input_ids"]
    for module in (rows, text):
        monkeypatch.setattr(module, "PIECE", 1000)
    longest = []
    monkeypatch.setattr(text, "encode", lambda t, s: longest.append(len(s)) or t(s, add_special_tokens=False).input_ids)
    file = tmp_path / f"a.{kind}"
    file.write_text(line if kind == "txt" else json.dumps({"text": line}) + "\n")
    got = tokens(str(file), tokenizer_plain, len(want) // 16, 16, 0)
    assert got.flatten().tolist() == want[: len(want) // 16 * 16]
    assert max(longest) < 2500 and len(longest) > 10
    file.write_text("x" * 10_000 if kind == "txt" else json.dumps({"text": "x" * 10_000}))
    assert "".join(documents(file, tokenizer_plain, Tally())).rstrip("\n") == "x" * 10_000


def damaged(data, draw):
    """Return bytes with a few of them changed, cut or moved."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        kind = draw.randrange(4)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80"))
        elif kind == 2:
            data[at : at + 8] = draw.randbytes(8)
        else:
            del data[at : at + draw.randint(1, 16)]
    return bytes(data)


def tables(tmp_path):
    """Return the bytes of one table of chats and texts in each container."""
    chat = pa.array([CHAT, CHAT[:1], None])
    table = pa.table({"text": ["one of the words", None, "another"], "messages": chat, "n": [1, 2, 3]})
    table = table.append_column("tools", pa.array([json.dumps(TOOLS), None, ""]).dictionary_encode())
    for compression in ("none", "zstd"):
        pq.write_table(table, tmp_path / f"{compression}.parquet", compression=compression)
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)
        for new, name in ((pa.ipc.new_file, "file"), (pa.ipc.new_stream, "stream")):
            with new(str(tmp_path / f"{name}-{compression}.arrow"), table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=2)
    return sorted(tmp_path.glob("*.*"))


def test_damaged_tables_are_read_or_refused(tmp_path, tokenizer):
    """Each in a child of its own, as a run reads them: a crash there is one line, and none is expected."""
    draw = random.Random(0)
    crashes = []
    for file in tables(tmp_path):
        data = file.read_bytes()
        for _ in range(12):
            bad = tmp_path / f"bad{file.suffix}"
            bad.write_bytes(damaged(data, draw))
            try:
                tokens(str(bad), tokenizer, 1, 8, 0, warn=lambda _: None)
            except LlmqError as e:
                assert "\n" not in str(e)
                crashes += [str(e)] if "breaks off" in str(e) else []
    assert not [c for c in crashes if "SIGSEGV" in c], crashes


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_compressed_bomb_is_refused(tmp_path, tokenizer, suffix, monkeypatch):
    """Ten rows of ten million blanks lie in a few kilobytes."""
    monkeypatch.setattr(confined, "BYTES", 2**26)
    table = pa.table({"text": pa.array([" " * 10**7] * 10)})
    file = tmp_path / f"bomb.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file, compression="zstd", use_dictionary=False)
    else:
        with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    assert file.stat().st_size < 10**6
    with pytest.raises(LlmqError, match=f"bomb.{suffix}.*(?i:malloc|memory)"):
        tokens(str(file), tokenizer, 1, 8, 0)


def test_a_row_says_what_it_has_where_it_has_no_text(tokenizer):
    tally = Tally()
    assert row_text({"a": 1, "text": 5}, tokenizer, "row 3", tally) == ""
    with pytest.raises(LlmqError, match=r"row 3 has no text, messages or conversations \(it has: a, text\)"):
        tally.check()
