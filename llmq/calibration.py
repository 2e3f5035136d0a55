"""Calibration tokens: the text on which a solver sees the activations that it must preserve.

Every source ends as one int64 tensor `[samples, seq_len]` of full sequences, so that nothing downstream knows pads:

    BOS  t_1 ... t_{L-1}     exactly one BOS, first, where the tokenizer adds one to a text; no BOS elsewhere
    t_1  t_2 ... t_L         else

- Text (a file, a folder, a Hub data set): tokenized without special tokens, joined into one stream, cut into disjoint
  windows; a seeded draw keeps `samples` of them, in the order of the text. Chats go through the chat template.
- `self`: the model writes its own text, sampled at temperature 1 from BOS, or from a random first token where the
  tokenizer adds none (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 3.1); it writes on after an end-of-text
  token, as in a stream of documents. Nothing is downloaded, but the whole model must be in memory, and every token
  costs a forward.

Not here: what is accumulated over the tokens (stats), running blocks on them (stream), scoring text (evaluation).
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import psutil
import torch
from torch import Tensor

from llmq.heads import head_dim, kv_heads
from llmq.pretrained import foreign
from llmq.types import LlmqError

READ_FACTOR = 8
"""Text is read until it holds this many times the tokens asked for; the windows are drawn from that part."""
WRITE_BATCH = 32
"""Sequences written side by side: on two cores the step of SmolLM2-135M costs 80 ms for 32 and 50 ms for 8."""
WRITE_CACHE_BYTES = 2**30
"""Their key-value cache may take this much, or as much as the weights where that is more."""
WRITE_FACTOR = 10
"""`self` is refused if writing would take this many times as long as one forward over the same tokens ..."""
WRITE_SECONDS = 600
"""... and longer than this. Quantizing takes between two and ten such forwards, the solving included."""

_PIECE = 2**20  # characters tokenized at once: enough to be fast, small beside any model
_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}")


@dataclass(frozen=True)
class HubText:
    """Where a text lies on the Hub. `stream`: read as it downloads, else download and cache the split whole."""

    repo: str
    config: str | None
    split: str
    stream: bool = True


HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", stream=False),
    "c4": HubText("allenai/c4", "en", "train"),
    "ultrachat": HubText("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
}
"""The short names of calibration sets."""


def tokens(
    source: str, tokenizer: Any, samples: int, seq_len: int, seed: int, model_writer: Callable[[], Any] | None = None
) -> Tensor:
    """Return `samples` calibration sequences, int64 `[samples, seq_len]` on the CPU; same arguments, same tokens.

    source: `self`; a short name of `HUB`; a .txt, .jsonl, .parquet or .arrow file, or a folder of them (read in the
        order of their paths); or a Hub data set as `org/name[:config[:split]]`. Rows hold `text` or a chat, in
        `messages` or `conversations`.
    model_writer: returns the transformers model that `self` asks to write; call `check_memory` before it loads one.

    Raises LlmqError for a source that cannot be read, is too short, or would take too long to write.
    """
    if samples < 1 or seq_len < 2:
        raise LlmqError(f"calibration wants --samples >= 1 and --seq-len >= 2, not {samples} and {seq_len}")
    if source == "self":
        if model_writer is None:
            raise LlmqError("calibration text `self` needs a model that writes it: give a text file instead")
        return _write(model_writer(), tokenizer, samples, seq_len, seed)
    bos = bos_id(tokenizer)
    length = seq_len if bos is None else seq_len - 1
    stream = _read(_documents(source, tokenizer), tokenizer, bos, READ_FACTOR * samples * length)
    count = len(stream) // length
    if count < samples:
        fewer = f"--samples {count} or fewer, " if count else ""
        raise LlmqError(
            f"{source} holds {len(stream)} tokens, {samples} samples of {length} need {samples * length}: "
            f"give more text, {fewer}or a shorter --seq-len"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    windows = torch.tensor(stream[: count * length]).view(count, length)[order[:samples].sort().values]
    return windows if bos is None else torch.cat([torch.full((samples, 1), bos), windows], dim=1)


def bos_id(tokenizer: Any) -> int | None:
    """Return the BOS id if `tokenizer` puts it before a text of its own accord, else None."""
    bos = tokenizer.bos_token_id
    with foreign("the tokenizer cannot cut a text"):
        return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` without special tokens added, of any length."""
    with foreign("the tokenizer cannot cut a text"):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def hub_rows(place: HubText, remedy: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Hub data set. Raises LlmqError, ending with `remedy`, where it cannot be had."""
    import datasets

    stream = place.stream and not datasets.config.HF_DATASETS_OFFLINE  # offline, only a cached copy can be read
    try:
        yield from datasets.load_dataset(place.repo, place.config, split=place.split, streaming=stream)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise LlmqError(f"cannot read the data set {place.repo}: {_first_line(e)}: {remedy}") from e


# Text


def _read(documents: Iterable[str], tokenizer: Any, bos: int | None, limit: int) -> list[int]:
    """Return at least `limit` ids of the documents joined verbatim, or all of them; BOS is dropped where it is added.

    A chat template writes BOS itself, and a text may spell it out.
    """
    stream: list[int] = []
    piece: list[str] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        piece.append(document or "")
        size += len(piece[-1])
        if document is None or size >= _PIECE:
            stream.extend(i for i in encode(tokenizer, "".join(piece)) if i != bos)
            piece, size = [], 0
            if len(stream) >= limit:
                break
    return stream


def _documents(source: str, tokenizer: Any) -> Iterator[str]:
    """Yield the text of `source` in pieces that read on from one another."""
    remedy = "give a text file, as --calib FILE, or --calib self"
    path = Path(source).expanduser()
    if source in HUB:
        rows = hub_rows(HUB[source], remedy)
    elif path.exists():
        yield from _files(path, tokenizer)
        return
    elif _HUB_NAME.fullmatch(source) and path.suffix not in _SUFFIXES:
        repo, config, split = [*source.split(":"), "", ""][:3]
        rows = hub_rows(HubText(repo, config or None, split or "train"), f"{remedy} (no local file has this name)")
    else:
        raise LlmqError(f"no calibration text at {source}: give `self`, a file, a folder, {', '.join(HUB)} or org/name")
    for number, row in enumerate(rows, start=1):
        yield _row_text(row, tokenizer, f"{source}, row {number}")


def _files(path: Path, tokenizer: Any) -> Iterator[str]:
    """Yield the text of a file, or of a folder's files in the order of their paths."""
    files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file()) if path.is_dir() else [path]
    if not files:
        raise LlmqError(f"{path} holds no {', '.join(_SUFFIXES)} file")
    for i, file in enumerate(files):
        if i:
            yield "\n\n"
        if file.suffix not in _SUFFIXES:
            raise LlmqError(f"{file}: calibration text must be one of {', '.join(_SUFFIXES)}")
        try:
            if file.suffix == ".txt":
                with file.open(encoding="utf-8") as f:
                    while lines := f.readlines(_PIECE):
                        yield "".join(lines)
            else:
                for where, row in _jsonl(file) if file.suffix == ".jsonl" else _columnar(file):
                    yield _row_text(row, tokenizer, where)
        except UnicodeDecodeError as e:
            raise LlmqError(
                f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it (iconv -t utf-8)"
            ) from e
        except OSError as e:
            raise LlmqError(f"cannot read {file}: {e.strerror or e}") from e


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise LlmqError(f"{file}, line {number} is not JSON: {e.msg}") from e
            if not isinstance(row, dict):
                raise LlmqError(f"{file}, line {number} is not a JSON object")
            yield f"{file}, line {number}", row


def _columnar(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a parquet file, or of an arrow file in either of its two containers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as f:
            batches: Iterable[Any]
            if file.suffix == ".parquet":
                batches = pq.ParquetFile(f).iter_batches(batch_size=256)
            elif f.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(f)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                f.seek(0)
                batches = pa.ipc.open_stream(f)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
    except pa.ArrowException as e:
        raise LlmqError(f"{file} is not a readable {file.suffix[1:]} file: {_first_line(e)}") from e


def _row_text(row: dict[str, Any], tokenizer: Any, where: str) -> str:
    """Return the text of one row, ended by a blank line; "" where it holds nothing."""
    if isinstance(text := row.get("text"), str):
        return text.rstrip("\n") + "\n\n" if text.strip() else ""
    chat = row.get("messages") or row.get("conversations")
    if not isinstance(chat, list):
        raise LlmqError(f"{where} has no text, messages or conversations (it has: {', '.join(row) or 'nothing'})")
    if not tokenizer.chat_template:
        raise LlmqError(f"{where} is a chat, and the tokenizer has no chat template: give plain text")
    try:
        return tokenizer.apply_chat_template([_turn(t) for t in chat], tokenize=False)
    except (KeyError, TypeError, AttributeError) as e:
        raise LlmqError(f"{where}: a turn of a chat needs `role` and `content`, or `from` and `value`") from e
    except jinja2.TemplateError as e:
        raise LlmqError(f"{where}: the chat template refuses it: {_first_line(e)}") from e


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn as `role` and `content`; ShareGPT calls them `from` (human, gpt, system) and `value`."""
    if "role" in turn:
        return {"role": turn["role"], "content": turn["content"]}
    return {"role": {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"]), "content": turn["value"]}


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


# Text written by the model itself


def check_memory(parameter_bytes: int, device: str | torch.device = "cpu") -> None:
    """Raise LlmqError if a model of `parameter_bytes` cannot write on `device`: weights and cache exceed what is free.

    Ask before loading it: `tokens` sees it loaded.
    """
    free = free_memory(torch.device(device))
    need = parameter_bytes + max(parameter_bytes, WRITE_CACHE_BYTES)
    if need > free:
        raise LlmqError(
            f"calibration text `self` needs the whole model and its cache in memory, {need / 1e9:.1f} GB of which "
            f"{free / 1e9:.1f} GB are free: give a text file, as --calib FILE"
        )


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _write(model: Any, tokenizer: Any, samples: int, seq_len: int, seed: int) -> Tensor:
    """Return `samples` sequences that `model` writes, int64 `[samples, seq_len]`; BOS, if added, is never sampled."""
    model.eval()
    batch = min(samples, _write_batch(model, seq_len))
    _check_time(model, samples, seq_len, batch)
    generator = torch.Generator(model.device).manual_seed(seed)
    bos = bos_id(tokenizer)
    bias_V = torch.zeros(model.config.get_text_config().vocab_size, device=model.device)
    bias_V[len(tokenizer) :] = -torch.inf  # rows that only pad the embedding
    if bos is None:
        start_V = bias_V.clone()
        start_V[[i for i in tokenizer.all_special_ids if i < len(start_V)]] = -torch.inf
        first = _draw(start_V.repeat(samples, 1), generator)
    else:
        bias_V[bos] = -torch.inf
        first = torch.full((samples, 1), bos, device=model.device)
    written = [_continue(model, part, seq_len, generator, bias_V) for part in first.split(batch)]
    return torch.cat(written).cpu()


@torch.inference_mode()
def _continue(model: Any, first_B1: Tensor, length: int, generator: torch.Generator, bias_V: Tensor | float) -> Tensor:
    """Return `first_B1` continued to `[B, length]` by sampling at temperature 1 from the logits plus `bias_V`."""
    from llmq.roomy_cache import roomy_cache

    written, cache = [first_B1], roomy_cache(model.config, length)
    while len(written) < length:
        out = model(written[-1], past_key_values=cache, use_cache=True)
        written.append(_draw(out.logits[:, -1].float() + bias_V, generator))
    return torch.cat(written, dim=1)


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Return one id per row, `[B, 1]`, by inverting the cumulative distribution: a third of the time of multinomial."""
    cdf_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    if not cdf_BV[:, -1].isfinite().all():
        raise LlmqError("the model writes NaN: its weights are broken, or overflow in this dtype")
    u_B1 = torch.rand(len(cdf_BV), 1, dtype=torch.float64, device=cdf_BV.device, generator=generator)
    return torch.searchsorted(cdf_BV, u_B1 * cdf_BV[:, -1:], right=True)


def _write_batch(model: Any, seq_len: int) -> int:
    """Return how many sequences the cache holds: a function of the model alone, so that a seed means one text."""
    config = model.config.get_text_config()
    each = 2 * config.num_hidden_layers * kv_heads(config) * head_dim(config) * seq_len * model.dtype.itemsize
    room = max(WRITE_CACHE_BYTES, sum(p.nbytes for p in model.parameters()))
    return max(1, min(WRITE_BATCH, room // each))


def _check_time(model: Any, samples: int, seq_len: int, batch: int) -> None:
    """Raise LlmqError if writing would far outlast quantizing, from the best of a few short timings of both."""
    generator = torch.Generator(model.device).manual_seed(0)
    start = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    step = min(_seconds(lambda: _continue(model, start, 4, generator, 0.0)) for _ in range(4)) / 3
    writing = step * seq_len * -(-samples // batch)
    if writing <= WRITE_SECONDS:
        return
    long = torch.zeros(1, min(seq_len, 512), dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        read = min(_seconds(lambda: model(long, use_cache=False).logits) for _ in range(2))
    reading = read * samples * seq_len / long.shape[1]
    if writing > WRITE_FACTOR * reading:
        raise LlmqError(
            f"calibration text `self` would take about {writing / 60:.0f} min to write, {writing / reading:.0f} times "
            "what it takes to read: give a text file, as --calib FILE, or lower --samples or --seq-len"
        )


def _seconds(run: Callable[[], Tensor]) -> float:
    """Return how long `run` takes, to the moment its result can be read on the CPU."""
    began = time.perf_counter()
    run().flatten()[-1].item()
    return time.perf_counter() - began
