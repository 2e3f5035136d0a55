"""Documents of calibration text: what files and rows hold, and a count of what is left out of it.

    .txt                        as it is, some lines at a time
    .jsonl, .parquet, .arrow    rows: `text`, or a chat in `messages` or `conversations`

A chat goes whole through the tokenizer's own template, tool calls, reasoning and the row's `tools` included, as
`apply_chat_template(messages, tools=row["tools"])` has it; ShareGPT's `from` and `value` are `role` and `content`. What
no document takes, a row without text or a key that is not read, is counted, and told in one line.

Files and templates may be hostile: all of this runs in a child process (guard/confined.py), which sends the text back.
Not here: tokens of the documents (text.py).
"""

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, one_line, printable
from llmq.guard.confined import note
from llmq.guard.reading import parse_json
from llmq.model.pretrained import foreign

SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
PIECE = 2**20
"""Characters that are tokenized at once: enough to be fast, small beside any model."""
_LINE = 64 * PIECE  # characters of one row; more is no row of text
_ROWS = 256  # of a table, made Python objects at once
_CHATS = ("messages", "conversations")
_READ = {"text", *_CHATS, "tools"}
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass
class Tally:
    """What of a source was left out. keys: how many rows have a key that is not read."""

    rows: int = 0
    empty: int = 0
    without: int = 0
    first: str = ""
    keys: dict[str, int] = field(default_factory=dict)

    def count(self, keys: Iterable[str]) -> None:
        """Count a row with keys that are not read."""
        self.rows += 1
        for key in keys:
            if key in self.keys or len(self.keys) < 1000:
                self.keys[key] = self.keys.get(key, 0) + 1

    def check(self) -> None:
        """Raise LlmqError where rows were read and none held text."""
        if self.rows and self.rows == self.without:
            raise LlmqError(self.first)

    def lines(self, source: str) -> Iterator[str]:
        """Yield what a user should know, if anything."""
        left = [f"{n:,} {what}" for n, what in ((self.empty, "empty"), (self.without, "without text or chat")) if n]
        if left:
            yield f"calibration text {source}: left out of {self.rows:,} rows: {', '.join(left)}"
        if self.keys:
            keys = [f"{printable(k, 40)} ({n:,})" for k, n in sorted(self.keys.items(), key=lambda kv: -kv[1])]
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            yield f"calibration text {source}: not read of its {self.rows:,} rows: {', '.join(keys[:8])}{more}"


def texts(path: Path) -> list[Path]:
    """Return a file, or a folder's files in the order of their paths. Raises LlmqError where they are no text."""
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise LlmqError(f"{path} holds no {', '.join(SUFFIXES)} file")
    if path in files and path.suffix not in SUFFIXES:
        raise LlmqError(f"{path}: calibration text must be one of {', '.join(SUFFIXES)}")
    return files


def documents(path: Path, tokenizer: Any, tally: Tally) -> Iterator[str]:
    """Yield the text of a file, or of a folder's files in the order of their paths, in pieces that read on."""
    for i, file in enumerate(texts(path)):
        if i:
            yield "\n\n"
        note(f"reading {file}")
        regular(file)
        try:
            if file.suffix == ".txt":
                yield from _lines(file)
            else:
                for where, row in _jsonl(file) if file.suffix == ".jsonl" else _columnar(file):
                    yield from _cut(row_text(row, tokenizer, where, tally))
        except UnicodeDecodeError as e:
            raise LlmqError(
                f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it (iconv -t utf-8)"
            ) from e
        except OSError as e:
            raise LlmqError(f"cannot read {file}: {one_line(e)}") from e


def regular(file: Path) -> None:
    """Raise LlmqError for what is no file to be read to its end: a device, a pipe, a folder."""
    try:
        mode = file.stat().st_mode
    except OSError as e:
        raise LlmqError(f"cannot read {file}: {one_line(e)}") from e
    if not stat.S_ISREG(mode):
        raise LlmqError(f"{file} is no regular file; text is read from files alone")


def gathered(documents: Iterator[str]) -> Iterator[list[str]]:
    """Yield documents by the quarter piece; what was read before an error counts before it."""
    some: list[str] = []
    size = 0
    try:
        for document in documents:
            some.append(document)
            size += len(document)
            if size >= PIECE // 4 or len(some) >= 1000:
                yield some
                some, size = [], 0
    except LlmqError:
        yield some
        raise
    yield some


def row_text(row: dict[str, Any], tokenizer: Any, where: str, tally: Tally) -> str:
    """Return the text of one row, ended by a blank line, or its chat; "" where it holds neither, which is counted."""
    key = "text" if isinstance(row.get("text"), str) else next((k for k in _CHATS if isinstance(row.get(k), list)), "")
    used = {key, "tools"} if key in _CHATS else {key}
    tally.count(k for k, v in row.items() if k not in used and v is not None)
    if not key:
        tally.without += 1
        tally.first = tally.first or (
            f"{where} has no text, messages or conversations (it has: {', '.join(row) or 'nothing'})"
        )
        return ""
    if key == "text":
        text = row[key].rstrip("\n") + "\n\n" if row[key].strip() else ""
    else:
        text = _chat(row[key], row.get("tools"), tokenizer, where) if row[key] else ""
    tally.empty += not text
    return text


def _chat(turns: list[Any], tools: Any, tokenizer: Any, where: str) -> str:
    """Return what the tokenizer's chat template makes of a chat."""
    if not tokenizer.chat_template:
        raise LlmqError(f"{where} is a chat, and the tokenizer has no chat template: give plain text")
    if isinstance(tools, str):  # as tables hold what has no fixed columns
        tools = parse_json(tools, f"{where}: tools") if tools.strip() else None
    if not isinstance(tools or [], list):
        raise LlmqError(f"{where}: tools is a list of JSON schemas, or the JSON text of one")
    messages = [_turn(turn, where) for turn in turns]
    note(f"{where}: the chat template")
    with foreign(f"{where}: the chat template refuses it"):
        text = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
    note(f"reading on from {where}")
    return text


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """Return a turn with its `role`; ShareGPT calls it `from` (human, gpt, system), and the content `value`."""
    if isinstance(turn, dict) and isinstance(turn.get("role"), str):
        return turn
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise LlmqError(f"{where}: a turn of a chat needs `role` and `content`, or `from` and `value`")
    rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}


def _cut(text: str) -> Iterator[str]:
    """Yield a text in parts of at most a piece."""
    while len(text) > PIECE:
        head, rest = _parted(text[:PIECE])
        yield head
        text = rest + text[PIECE:]
    yield text


def _parted(text: str) -> tuple[str, str]:
    """Return a text cut before its last blank, where tokenizers cut too; whole where it has none."""
    at = text.rfind(" ", 1)
    return (text[:at], text[at:]) if at > 0 else (text, "")


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a text file, many at a time; one that is longer than a piece is cut."""
    some: list[str] = []
    size, rest = 0, ""
    with file.open(encoding="utf-8-sig") as f:
        while line := f.readline(PIECE):
            line, rest = _parted(rest + line) if len(line) == PIECE else (rest + line, "")
            some.append(line)
            size += len(line)
            if size > PIECE - len(rest):
                yield "".join(some)
                some, size = [], 0
        yield "".join([*some, rest])


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as f:
        number = 0
        while line := f.readline(_LINE):
            number += 1
            where = f"{file}, line {number}"
            note(f"reading {where}")
            if len(line) == _LINE:
                raise LlmqError(f"{where} is longer than {_LINE:,} characters, which no row of text is")
            if not line.strip():
                continue
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise LlmqError(f"{where} is not a JSON object")
            yield where, row


def _columnar(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a parquet file, or of an arrow file in either of its two containers; of other columns True."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # the others reserve a gigabyte and more, a thread's stack is counted
    pa.set_cpu_count(1)
    with file.open("rb") as f, foreign(f"{file} is not a readable {file.suffix[1:]} file"):
        batches: Iterable[Any]
        if file.suffix == ".parquet":
            table = pq.ParquetFile(f, buffer_size=PIECE)
            names = table.schema_arrow.names
            batches = table.iter_batches(batch_size=_ROWS, columns=[n for n in names if n in _READ], use_threads=False)
        elif f.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(f)
            names = reader.schema.names
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            f.seek(0)
            batches = stream = pa.ipc.open_stream(f)
            names = stream.schema.names
        unread = dict.fromkeys((n for n in names if n not in _READ), True)
        for number, row in enumerate((row for batch in batches for row in _rows(batch)), start=1):
            note(f"reading on from {file}, row {number}")
            yield f"{file}, row {number}", unread | {k: _present(v) for k, v in row.items()}


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch, after a look at every offset in it: a wrong one reads foreign memory."""
    batch = batch.select([n for n in batch.schema.names if n in _READ])
    batch.validate(full=True)
    for at in range(0, batch.num_rows, _ROWS):
        yield from batch.slice(at, _ROWS).to_pylist()


def _present(value: Any) -> Any:
    """Return a value without the nulls by which a table says that a row has no such key."""
    if isinstance(value, list):
        return [_present(v) for v in value]
    return {k: _present(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value
