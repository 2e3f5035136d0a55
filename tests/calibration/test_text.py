from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmq.calibration import HubText, bos_id, hub_rows, rows, text, tokens
from llmq.types import LlmqError


@pytest.fixture
def text_file(tmp_path, prose):
    path = tmp_path / "text.txt"
    path.write_text(prose(400), encoding="utf-8")
    return path


def write_chat(path, key="messages", turn=lambda role, text: {"role": role, "content": text}):
    rows = [{"id": i, key: [turn("user", f"say {i} of the world"), turn("assistant", "it is one.")]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def test_bos_is_what_the_tokenizer_itself_prepends(tokenizer_bos, tokenizer_plain):
    assert tokenizer_plain.bos_token_id == tokenizer_bos.bos_token_id == 0
    assert bos_id(tokenizer_bos) == 0
    assert bos_id(tokenizer_plain) is None


@pytest.mark.parametrize("bos", [True, False])
def test_all_windows_rebuild_the_stream(request, text_file, bos):
    """Asked for every window, the text comes back in order, cut at the end, with one BOS a sequence or none."""
    tokenizer = request.getfixturevalue("tokenizer_bos" if bos else "tokenizer_plain")
    stream = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    length = 31 if bos else 32
    count = len(stream) // length
    got = tokens(str(text_file), tokenizer, count, 32, seed=5)
    assert (got.shape, got.dtype) == ((count, 32), torch.int64)
    if bos:
        assert (got[:, 0] == 0).all()
    assert (got == 0).sum() == (count if bos else 0)
    assert got[:, -length:].flatten().tolist() == stream[: count * length]


def test_seed_draws_distinct_windows_in_text_order(text_file, tokenizer_bos):
    every = tokens(str(text_file), tokenizer_bos, 20, 32, seed=0)
    all_windows = {tuple(w): i for i, w in enumerate(tokens(str(text_file), tokenizer_bos, 36, 32, seed=0).tolist())}
    chosen = [all_windows[tuple(w)] for w in every.tolist()]
    assert chosen == sorted(set(chosen))
    assert torch.equal(every, tokens(str(text_file), tokenizer_bos, 20, 32, seed=0))
    assert not torch.equal(every, tokens(str(text_file), tokenizer_bos, 20, 32, seed=1))


def test_the_same_text_in_every_container(tmp_path, text_file, tokenizer_bos):
    text = text_file.read_text().rstrip("\n")
    paragraphs = text.split("\n")
    (tmp_path / "joined.txt").write_text("\n\n".join(paragraphs) + "\n\n")
    want = tokens(str(tmp_path / "joined.txt"), tokenizer_bos, 20, 32, seed=0)
    table = pa.table({"n": list(range(len(paragraphs))), "text": paragraphs})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in ["", *paragraphs, " "]))
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    for name in ("a.jsonl", "a.parquet", "file.arrow", "stream.arrow"):
        assert torch.equal(tokens(str(tmp_path / name), tokenizer_bos, 20, 32, seed=0), want), name


def test_a_folder_is_its_files_in_order_of_path(tmp_path, prose, tokenizer_plain):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.txt").write_text("the second part. " * 40)
    (folder / "a.jsonl").write_text(json.dumps({"text": "first of all. " * 40}) + "\n")
    (folder / "README.md").write_text("not calibration text " * 99)
    stream = tokenizer_plain("first of all. " * 40 + "\n\n" + "\n\n" + "the second part. " * 40)["input_ids"]
    count = len(stream) // 16
    got = tokens(str(folder), tokenizer_plain, count, 16, seed=0)
    assert got.flatten().tolist() == stream[: count * 16]


@pytest.mark.parametrize("bos", [True, False])
def test_chats_go_through_the_template(request, tmp_path, bos):
    """The template writes `<s>` before every chat: it survives only where it is not the tokenizer's own prefix."""
    tokenizer = request.getfixturevalue("tokenizer_bos" if bos else "tokenizer_plain")
    path = write_chat(tmp_path / "chat.jsonl")
    chats = "".join(f"<s><user>say {i} of the world</user>\n<assistant>it is one.</assistant>\n" for i in range(40))
    stream = [i for i in tokenizer(chats, add_special_tokens=False)["input_ids"] if not (bos and i == 0)]
    count = len(stream) // (31 if bos else 32)
    got = tokens(str(path), tokenizer, count, 32, seed=0)
    assert got[:, int(bos) :].flatten().tolist() == stream[: count * (32 - bos)]
    assert (got == 0).sum() == count if bos else (got == 0).sum() >= 39
    share = write_chat(
        tmp_path / "share.jsonl", "conversations",
        lambda role, text: {"from": {"user": "human", "assistant": "gpt"}[role], "value": text},
    )  # fmt: skip
    assert torch.equal(tokens(str(share), tokenizer, count, 32, seed=0), got)


def test_reading_stops_when_there_is_plenty(tmp_path, monkeypatch, tokenizer_bos):
    """The broken last line of a long file is never reached."""
    lines = [json.dumps({"text": f"line {i} of the text"}) for i in range(3000)]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join([*lines, "{broken"]))
    monkeypatch.setattr(rows, "PIECE", 1000)
    monkeypatch.setattr(text, "PIECE", 1000)
    got = tokens(str(path), tokenizer_bos, 8, 32, seed=0)
    per_line = len(tokenizer_bos("line 100 of the text\n\n")["input_ids"]) - 1
    last = max(int(n) for n in re.findall(r"line (\d+) of the text\n", tokenizer_bos.decode(got[:, 1:].flatten())))
    assert last * per_line < 1.5 * text.READ_FACTOR * 8 * 31
    with pytest.raises(LlmqError, match="line 3001 is not valid JSON"):
        tokens(str(path), tokenizer_bos, 200, 128, seed=0)


def test_too_little_text_says_how_much(text_file, tokenizer_bos, tokenizer_plain, tmp_path):
    n = len(tokenizer_plain(text_file.read_text())["input_ids"])
    with pytest.raises(LlmqError) as e:
        tokens(str(text_file), tokenizer_bos, 99, 64, seed=0)
    for part in (str(99 * 63), f"--samples {n // 63} or fewer", "--seq-len", "more text"):
        assert part in str(e.value)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(LlmqError, match=r"holds 0 tokens, 1 samples of 7 need 7: give more text, or a shorter"):
        tokens(str(tmp_path / "empty.txt"), tokenizer_bos, 1, 8, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.md", b"text", "must be one of .txt, .jsonl"),
        ("x.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n[1]\n', "line 2 is not a JSON object"),
        ("x.jsonl", b'{"prompt": "a", "id": 1}\n', r"line 1 has no text, .* \(it has: prompt, id\)"),
        ("x.jsonl", b'{"messages": [{"content": "hello"}]}\n', "line 1: a turn of a chat needs"),
        ("x.jsonl", b'{"messages": ["hello"]}\n', "line 1: a turn of a chat needs"),
        ("x.parquet", b"PAR1 but not really", "not a readable parquet"),
        ("x.arrow", b"ARROW1 but not really", "not a readable arrow"),
        ("x.arrow", b"nothing at all like it", "not a readable arrow"),
    ],
)  # fmt: skip
def test_bad_files_are_named_in_one_line(tmp_path, tokenizer_bos, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LlmqError, match=match) as e:
        tokens(str(tmp_path / name), tokenizer_bos, 1, 8, seed=0)
    assert str(tmp_path / name) in str(e.value)
    assert "\n" not in str(e.value)


def test_bad_sources(tmp_path, tokenizer_bos, tokenizer_plain, text_file):
    for source in (tmp_path / "none.txt", "none", "data/none.jsonl"):
        with pytest.raises(LlmqError, match=r"no calibration text at .*none"):
            tokens(str(source), tokenizer_bos, 1, 8, seed=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(LlmqError, match=r"folder holds no \.txt"):
        tokens(str(tmp_path / "folder"), tokenizer_bos, 1, 8, seed=0)
    with pytest.raises(LlmqError, match="not 0 and 8"):
        tokens(str(text_file), tokenizer_bos, 0, 8, seed=0)
    with pytest.raises(LlmqError, match="needs a model that writes it"):
        tokens("self", tokenizer_bos, 1, 8, seed=0)


def test_a_chat_without_a_template_and_one_it_refuses(tmp_path, tokenizer_bos, monkeypatch):
    path = str(write_chat(tmp_path / "chat.jsonl"))
    monkeypatch.setattr(tokenizer_bos, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(LlmqError, match="line 1: the chat template refuses it: roles must alternate"):
        tokens(path, tokenizer_bos, 1, 8, seed=0)
    monkeypatch.setattr(tokenizer_bos, "chat_template", None)
    with pytest.raises(LlmqError, match="has no chat template: give plain text"):
        tokens(path, tokenizer_bos, 1, 8, seed=0)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False)),
        ("ultrachat", ("HuggingFaceH4/ultrachat_200k", None, "train_sft", True)),
        ("org/name", ("org/name", None, "train", True)),
        ("org/name:en", ("org/name", "en", "train", True)),
        ("org/name::test", ("org/name", None, "test", True)),
    ],
)
def test_hub_names(monkeypatch, tokenizer_bos, prose, source, want):
    import datasets

    asked = []

    def load_dataset(repo, config, split, streaming):
        asked.append((repo, config, split, streaming))
        return [{"text": prose(100)}, {"text": ""}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    assert tokens(source, tokenizer_bos, 4, 16, seed=0).shape == (4, 16)
    assert asked == [want]


def test_a_hub_failure_is_one_line_with_the_remedy(monkeypatch, tokenizer_bos):
    import datasets

    def breaks_off(*args, **kwargs):
        yield {"text": "one row"}
        raise ConnectionError("Couldn't reach it\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", breaks_off)
    with pytest.raises(
        LlmqError, match=r"data set org/name: Couldn't reach it second line: give a text file, as --calib FILE"
    ):
        tokens("org/name", tokenizer_bos, 4, 16, seed=0)
    with pytest.raises(LlmqError, match=r"try this$"):
        list(hub_rows(HubText("org/name", None, "train"), "try this"))


def test_a_byte_order_mark_is_no_text(tmp_path, prose, tokenizer_bos):
    row = json.dumps({"text": prose(30)}) + "\n"
    for name, content in (("a.txt", prose(400)), ("a.jsonl", 20 * row)):
        plain, marked = tmp_path / name, tmp_path / f"marked-{name}"
        plain.write_text(content, encoding="utf-8")
        marked.write_text(content, encoding="utf-8-sig")
        found, wanted = (tokens(str(file), tokenizer_bos, 4, 32, seed=0) for file in (marked, plain))
        assert marked.read_bytes() != plain.read_bytes() and torch.equal(found, wanted)
