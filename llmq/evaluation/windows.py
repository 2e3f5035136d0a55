"""How a text becomes the windows that perplexity is measured in, by the conventions that others publish.

Perplexities by different conventions do not compare: state it with the number.

Sources: `gptq` is the script of Frantar et al. 2022, arXiv:2210.17323; `llama.cpp` is its tools/perplexity; `lm-eval`
is the task `wikitext` of lm-evaluation-harness.
Not here: scores (evaluation), text to calibrate on (calibration).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.calibration import HubText, bos_id, encode, hub_rows
from llmq.calibration.rows import SUFFIXES, Tally, regular
from llmq.calibration.text import of_files
from llmq.errors import LlmqError, one_line

Text = str | Sequence[str]  # one text, or documents


@dataclass(frozen=True)
class Convention:
    """How a text becomes windows, and what is scored in them.

    window: tokens a model reads at once; 0 is the model's max_position_embeddings.
    bos: before the "text", before each "document", or in place of the first token of each "window".
    half: score only the second half of a window, so that every scored token has context.
    unit: what perplexity is per, "token" or "word".
    joiner: what joins the rows of a data set to one text.
    """

    name: str
    window: int
    bos: str
    half: bool
    unit: str
    joiner: str


CONVENTIONS = {
    c.name: c
    for c in (
        Convention("gptq", window=2048, bos="text", half=False, unit="token", joiner="\n\n"),
        Convention("llama.cpp", window=512, bos="window", half=True, unit="token", joiner=""),
        Convention("lm-eval", window=0, bos="document", half=False, unit="word", joiner=""),
    )
}

TEXT_BYTES = 64 * 2**20
"""Size of a text that is scored; its tokens take some fifty times as much memory."""
EVAL_SETS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", stream=False),
    "c4": HubText("allenai/c4", "en", "validation"),
}
"""The short names of evaluation sets."""


def find_convention(name: str, window: int | None = None) -> Convention:
    """Return the convention `name`, with another window length if one is given. Raises LlmqError for a wrong one."""
    if name not in CONVENTIONS:
        raise LlmqError(f"no convention {name!r} (there are: {', '.join(CONVENTIONS)})")
    if window is not None and window < 4:
        raise LlmqError(f"a window of {window} tokens is too short: give 4 or more")
    how = CONVENTIONS[name]
    return how if window is None else dataclasses.replace(how, window=window)


def load_text(
    text: Path | None, dataset: str | None, convention: Convention, tokenizer: Any = None
) -> Text | dict[str, Text]:
    """Return the text of a file, those of a folder by category, or that of a Hub data set of `EVAL_SETS`.

    tokenizer: whose template renders chats. Raises LlmqError where it cannot be had.
    """
    if text is not None:
        path = Path(text).expanduser()
        return _categories(path, tokenizer) if path.is_dir() else _file_text(path, tokenizer)
    if dataset not in EVAL_SETS:
        raise LlmqError(f"no evaluation set {dataset!r} (there are: {', '.join(EVAL_SETS)}): or give --text FILE")
    rows = (row["text"] for row in hub_rows(EVAL_SETS[dataset], "give a text, as --text FILE"))
    if dataset == "wikitext2":  # rows are lines, a blank one is empty; the GPTQ script joins them as they are
        return convention.joiner.join(rows if convention.name == "gptq" else (row or " \n" for row in rows))
    documents = list(itertools.islice(rows, 1100))  # as many as the GPTQ script takes
    return documents if convention.unit == "word" else " ".join(documents)


def _categories(folder: Path, tokenizer: Any) -> dict[str, Text]:
    """Return the texts of a folder: each file is a category, called as it is but for its suffix, and each sub-folder.

    The files of a sub-folder, and of those in it, are the documents of one category, in the order of their paths.
    """
    found = dict[str, Text]()
    for place in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        name = place.stem if place.is_file() and place.stem not in found else place.name
        if place.is_dir():
            files = sorted(f for f in place.rglob("*") if f.is_file() and not f.name.startswith("."))
            found |= {name: [_file_text(f, tokenizer) for f in files]} if files else {}
        else:
            found[name] = _file_text(place, tokenizer)
    if not found:
        raise LlmqError(f"{folder} holds no text; put a file of each category into it")
    return found


def _file_text(file: Path, tokenizer: Any) -> str:
    """Return the text of a file, read whole: conventions tokenize it whole. Rows and chats are read as for --calib."""
    regular(file)
    if file.suffix in SUFFIXES and file.suffix != ".txt":
        return "".join(of_files(file, tokenizer, Tally()))
    try:
        if file.stat().st_size > TEXT_BYTES:
            raise LlmqError(f"{file} is larger than {TEXT_BYTES / 2**20:.0f} MiB; score a part of it")
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise LlmqError(f"cannot read {file} as UTF-8 text: {one_line(e)}") from e


@dataclass(frozen=True)
class Window:
    """Token ids, of which `ids[first:]` are scored; the last is only predicted, never read."""

    ids: list[int]
    first: int


@dataclass(frozen=True)
class Part:
    """What of the windows is one text's: which, and the words and bytes that they cover (0 where not counted)."""

    windows: range
    words: int
    bytes: int


@dataclass(frozen=True)
class Passages:
    """Texts as the windows that are scored. how: the convention, its window resolved. parts: by category."""

    how: Convention
    windows: list[Window]
    parts: dict[str, Part]

    @property
    def whole(self) -> Part:
        """All categories as one."""
        of = self.parts.values()
        return Part(range(len(self.windows)), sum(p.words for p in of), sum(p.bytes for p in of))


def passages(
    texts: Mapping[str, Text], tokenizer: Any, model: Any, convention: Convention, limit: int | None
) -> Passages:
    """Return the windows of texts by category, the first `limit` of each. Raises LlmqError for one that has none."""
    how, windows, parts = fit(convention, model), list[Window](), dict[str, Part]()
    for name, text in texts.items():
        try:
            found, words, bytes_ = cut(text, tokenizer, how, limit)
        except LlmqError as e:
            raise LlmqError(f"{name}: {e}" if name else str(e)) from e
        parts[name] = Part(range(len(windows), len(windows) + len(found)), words, bytes_)
        windows += found
    return Passages(how, windows, parts)


def fit(convention: Convention, model: Any) -> Convention:
    """Return the convention with its window resolved against what the model can read."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = convention.window or longest or 2048
    if longest and window > longest:
        raise LlmqError(f"the model reads {longest} tokens, not a window of {window}: give a shorter --window")
    return dataclasses.replace(convention, window=window)


def cut(text: Text, tokenizer: Any, how: Convention, limit: int | None) -> tuple[list[Window], int, int]:
    """Return the windows with the words and bytes of the text that they cover (0 where the unit is the token)."""
    L, bos = how.window, bos_id(tokenizer)
    if how.bos == "document":
        return _rolling(text, tokenizer, L, limit)
    stream = encode(tokenizer, text if isinstance(text, str) else how.joiner.join(text))
    stream = stream if bos is None else [bos, *stream]
    if len(stream) < L:
        raise LlmqError(f"the text has {len(stream)} tokens, one window needs {L}: give a longer text")
    first = L // 2 + 1 if how.half else 1
    windows = [Window(stream[i : i + L], first) for i in range(0, len(stream) - L + 1, L)][:limit]
    if how.bos == "window" and bos is not None:
        windows = [Window([bos, *w.ids[1:]], first) for w in windows]
    return windows, 0, 0


def _rolling(text: Text, tokenizer: Any, L: int, limit: int | None) -> tuple[list[Window], int, int]:
    """Return windows that score every token of every document once, each with up to `L` tokens before it.

    The first token of a document is predicted from BOS, or from EOS where the tokenizer has no BOS.
    """
    documents = [d for d in (articles(text) if isinstance(text, str) else text) if d.strip()][:limit]
    if not documents:
        raise LlmqError("the text is empty: give a longer text")
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise LlmqError("lm-eval predicts the first token from BOS or EOS: the tokenizer has neither")
    tokenised = any(mark in d for d in documents for mark in (" @-@ ", " @,@ ", " @.@ "))
    windows = []
    for document in documents:
        ids = [prefix, *encode(tokenizer, detokenise(document) if tokenised else document)]
        windows.append(Window(ids[: L + 1], 1))
        for start in range(L + 1, len(ids), L):
            end = min(start + L, len(ids))
            windows.append(Window(ids[end - L - 1 : end], L + 1 - (end - start)))
    words = sum(len(re.split(r"\s+", d)) for d in documents)
    return windows, words, sum(len(d.encode()) for d in documents)


def articles(text: str) -> list[str]:
    """Return the articles of a WikiText file, each from its title line ` = Title = `; a text without titles is one."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        flat = line.replace("= = =", "===").replace("= =", "==").strip()
        if flat.startswith("= ") and flat.endswith(" ="):
            found = [*found, []] if "".join(found[-1]).strip() else [[]]
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def detokenise(text: str) -> str:
    """Return WikiText with its spaced punctuation and ` @-@ ` marks undone, as lm-eval's `wikitext` task reads it.

    The order of the replacements, and that some of them miss, is part of the convention.
    """
    text = text.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for a, b in ("()", "[]", "{}", '""', "''"):
        text = re.sub(rf"{re.escape(a)}\s*([^{re.escape(b)}]*?)\s*{re.escape(b)}", rf"{a}\1{b}", text)
    for spaced, plain in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \xb0 ", "\xb0")):
        text = text.replace(spaced, plain)
    for spaced, plain in ((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(spaced, plain)
    return text
