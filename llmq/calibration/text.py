"""Calibration tokens of a text: a file, a folder or a Hub data set.

Tokenized without special tokens, joined into one stream, cut into disjoint windows; a seeded draw keeps `samples` of
them, in the order of the text.
Not here: what files and rows hold (rows.py), text that the model writes (writing.py).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.rows import PIECE, SUFFIXES, Tally, documents, gathered, row_text, texts
from llmq.errors import LlmqError, one_line
from llmq.guard.confined import Confined
from llmq.model.pretrained import foreign

READ_FACTOR = 8
"""Text is read until it holds this many times the tokens asked for; the windows are drawn from that part."""

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


def read(source: str, tokenizer: Any, samples: int, seq_len: int, seed: int, warn: Callable[[str], Any]) -> Tensor:
    """Return `samples` sequences of the text at `source`, int64 `[samples, seq_len]`; see `calibration.tokens`."""
    tally = Tally()
    texts = _documents(source, tokenizer, tally)
    bos = bos_id(tokenizer)
    length = seq_len if bos is None else seq_len - 1
    stream = _stream(texts, tokenizer, bos, READ_FACTOR * samples * length)
    count = len(stream) // length
    if count < samples:
        tally.check()
        fewer = f"--samples {count} or fewer, " if count else ""
        raise LlmqError(
            f"{source} holds {len(stream)} tokens, {samples} samples of {length} need {samples * length}: "
            f"give more text, {fewer}or a shorter --seq-len"
        )
    for line in tally.lines(source) if source not in HUB else ():  # their blank lines and other columns are known
        warn(line)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    windows = torch.tensor(stream[: count * length]).view(count, length)[order[:samples].sort().values]
    return windows if bos is None else torch.cat([torch.full((samples, 1), bos), windows], dim=1)


def require(source: str) -> None:
    """Raise LlmqError for a source that is no text here, and cannot be one on the Hub by its name."""
    path = Path(source).expanduser()
    if source in HUB:
        return
    if path.exists():
        texts(path)
    elif not _HUB_NAME.fullmatch(source) or path.suffix in SUFFIXES:
        known = ", ".join((*HUB, "varied", "self"))
        raise LlmqError(f"no calibration text at {source}: give a file, a folder, {known} or org/name")


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
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise LlmqError(f"cannot read the data set {place.repo}: {one_line(e)}: {remedy}") from e


def _stream(documents: Iterable[str], tokenizer: Any, bos: int | None, limit: int) -> list[int]:
    """Return at least `limit` ids of the documents joined verbatim, or all of them; BOS is dropped where it is added.

    A chat template writes BOS itself, and a text may spell it out.
    """
    stream: list[int] = []
    piece: list[str] = []
    size = 0
    for document in itertools.chain(documents, [None]):
        piece.append(document or "")
        size += len(piece[-1])
        if document is None or size >= PIECE:
            stream.extend(i for i in encode(tokenizer, "".join(piece)) if i != bos)
            piece, size = [], 0
            if len(stream) >= limit:
                break
    return stream


def _documents(source: str, tokenizer: Any, tally: Tally) -> Iterator[str]:
    """Return the text of `source` in pieces that read on from one another; what is left out goes into `tally`."""
    require(source)
    remedy = "give a text file, as --calib FILE, or --calib varied"
    path = Path(source).expanduser()
    if source in HUB:
        return _of_rows(source, hub_rows(HUB[source], remedy), tokenizer, tally)
    if path.exists():
        return of_files(path, tokenizer, tally)
    repo, config, split = [*source.split(":"), "", ""][:3]
    place = HubText(repo, config or None, split or "train")
    return _of_rows(source, hub_rows(place, f"{remedy} (no local file has this name)"), tokenizer, tally)


def of_files(path: Path, tokenizer: Any, tally: Tally) -> Iterator[str]:
    """Yield the documents of local files, read in a child."""
    of_child = Tally()
    batches = gathered(documents(path, tokenizer, of_child))

    def more(_: None) -> tuple[list[str] | None, dict[str, Any]]:
        return next(batches, None), dataclasses.asdict(of_child)

    with Confined(more, f"reading {path}") as call:
        while True:
            texts, counts = call(None)
            tally.__dict__.update(counts)
            if texts is None:
                return
            yield from texts


def _of_rows(source: str, rows: Iterable[dict[str, Any]], tokenizer: Any, tally: Tally) -> Iterator[str]:
    """Yield the documents of rows from elsewhere, whose chats are rendered in a child."""
    of_child = Tally()

    def rendered(row: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return row_text(row[1], tokenizer, row[0], of_child), dataclasses.asdict(of_child)

    with Confined(rendered, f"reading {source}") as call:
        for number, row in enumerate(rows, start=1):
            text, counts = call([f"{source}, row {number}", row])
            tally.__dict__.update(counts)
            yield text
