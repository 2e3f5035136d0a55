"""The figures of `llmq eval --keep`, beside the checkpoint that they are of: OUT/evaluation.json.

    {"llmq": "0.1.0", "evaluations": [{"text": "wikitext2", "convention": "gptq", "perplexity": 8.1, ...}],
     "cards": ["5e1f..."], "sha256": "9c40..."}

An entry says what was scored (`_KEY`) and what was found (`Evaluation`, tasks); one that is measured again takes the
place of the old one. Texts and baselines are named, their paths on this machine are not. Beside a file NAME.gguf it is
NAME.evaluation.json.
`cards` are checksums of a README.md whose figures were renewed: quantization.json, which seals the folder, stays as it
was written, and `llmq verify` takes the card by either.
Not here: measuring (scores.py, tasks.py), the card's words (checkpoint/card.py).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq import __version__
from llmq.checkpoint.card import with_figures
from llmq.checkpoint.digest import sealed
from llmq.checkpoint.disk import write_text
from llmq.checkpoint.hub import origin
from llmq.checkpoint.place import RECORD, beside, one_file, recorded, user_path
from llmq.errors import LlmqError, one_line
from llmq.guard.reading import field, json_object

_FILE = "evaluation.json"
_KEY = ("text", "convention", "window", "windows", "baseline", "kv_bits", "limit")


def place(checkpoint: str | Path) -> Path:
    """Return the file of a checkpoint's figures. Raises LlmqError where there is no such folder or .gguf file here."""
    path = user_path(checkpoint)
    if not path.is_dir() and not (one_file(path) and path.is_file()):
        raise LlmqError(f"{checkpoint} is no folder or .gguf file of this machine; figures are kept beside one alone")
    return beside(path, _FILE)


def read(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Return the entries that were kept of a checkpoint, none where there are none.

    Raises LlmqError for a broken file.
    """
    file = place(checkpoint)
    return _entries(json_object(file), file) if file.exists() else []


def keep(checkpoint: str | Path, evaluation: Mapping[str, Any]) -> None:
    """Keep an entry, in the place of an earlier one of the same text, convention, windows, baseline, cache and limit.

    The checkpoint's card, where llmq wrote it, gets the figures of all entries.
    evaluation: as `entry` returns it. Raises LlmqError where the file cannot be read or written.
    """
    file = place(checkpoint)
    before = read(checkpoint)
    same = [e for e in before if _key(e) == _key(evaluation)]
    tasks = {"tasks": same[0].get("tasks", {}) | evaluation["tasks"]} if same and "tasks" in evaluation else {}
    entries = [*(e for e in before if e not in same), {**evaluation, **tasks}]
    card, texts = file.with_name("README.md"), list[str]()
    if file.name == _FILE and card.is_file() and "README.md" in _written(file.parent):
        try:
            old = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise LlmqError(f"cannot read {card} ({one_line(e)}); move it away and measure again") from e
        texts = [old, with_figures(old, [e for e in entries if e.get("text")])]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    found = sealed({"llmq": __version__, "evaluations": entries, "cards": digests})
    write_text(file, json.dumps(found, indent=2) + "\n")  # first: whichever card lies there is one of it
    if texts:
        write_text(card, texts[1])


def entry(
    found: Mapping[str, Any], *, text: str | Path | None, baseline: str | Path | None, windows: int | None = None
) -> dict[str, Any]:
    """Return the figures of an evaluation as an entry.

    found: `Evaluation.to_json()`, or `tasks` by name, which are kept beside those that were run before.
    text: a file or folder, whose name alone is kept, or a data set. baseline: a checkpoint, which is called as its
        model is. windows: how many were scored at most, None for all.
    """
    name = None if text is None else user_path(text).name
    return {"text": name, "baseline": None if baseline is None else _name(baseline), "windows": windows, **found}


def _name(checkpoint: str | Path) -> str:
    """Return what to call a checkpoint: org/name, or the last part of a path."""
    path = user_path(checkpoint)
    if path.is_dir():
        return origin(path).name
    return path.name if path.is_file() else str(checkpoint)


def _written(folder: Path) -> Mapping[str, Any]:
    """Return the files of a folder that llmq wrote, with their checksums; none of a peer's."""
    return field(recorded(folder) or {}, "files", dict, str(folder / RECORD), {})


def _entries(found: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    entries = field(found, "evaluations", list, str(file), [])
    if not all(isinstance(e, dict) and isinstance(e.get("tasks", {}), dict) for e in entries):
        raise LlmqError(f"{file}: its evaluations, and their tasks, must be objects; move it away and measure again")
    return entries


def _key(e: Mapping[str, Any]) -> list[Any]:
    return [e.get(name) for name in _KEY]
