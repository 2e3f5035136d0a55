"""The figures of `llmq eval --keep`, beside the checkpoint that they are of: OUT/evaluation.json.

    {"llmq": "0.1.0", "evaluations": [{"text": "wikitext2", "convention": "gptq", "perplexity": 8.1, ...}],
     "cards": ["5e1f..."], "sha256": "9c40..."}

An entry says what was scored (`_KEY`) and what was found (`Evaluation`, tasks); one that is measured again takes the
place of the old one. Texts and baselines are named, their paths on this machine are not. Beside a file NAME.gguf it is
NAME.evaluation.json.
`cards` are checksums of README.md, whose figures are renewed with it: quantization.json, which seals the folder, stays
as it was written, and `llmq verify` takes the card by either.
Not here: measuring (scores.py, tasks.py), the card's words (checkpoint/card.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq import __version__
from llmq.checkpoint.digest import file_digest, sealed
from llmq.checkpoint.disk import write_json
from llmq.checkpoint.hub import origin
from llmq.checkpoint.place import MEASURED, user_path
from llmq.errors import LlmqError
from llmq.guard.reading import field, json_object

_KEY = ("text", "convention", "window", "windows", "baseline", "kv_bits")


def place(checkpoint: str | Path) -> Path:
    """Return the file of a checkpoint's figures. Raises LlmqError where there is no such folder or .gguf file here."""
    path = user_path(checkpoint)
    if path.is_dir():
        return path / MEASURED
    if path.suffix == ".gguf" and path.is_file():
        return path.with_name(f"{path.stem}.{MEASURED}")
    raise LlmqError(f"{checkpoint} is no folder or .gguf file of this machine; --keep writes figures beside one")


def read(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Return the entries that were kept of a checkpoint, none where there are none. Raises LlmqError for a broken file.
    """
    file = place(checkpoint)
    return _entries(file) if file.exists() else []


def keep(checkpoint: str | Path, evaluation: Mapping[str, Any]) -> None:
    """Keep an entry, in the place of an earlier one of the same text, convention, windows, baseline and cache.

    evaluation: as `entry` returns it. Raises LlmqError where the file cannot be read or written.
    """
    file = place(checkpoint)
    others = [e for e in (_entries(file) if file.exists() else []) if _key(e) != _key(evaluation)]
    cards = [file_digest(card)] if (card := file.parent / "README.md").is_file() and file.name == MEASURED else []
    write_json(file, sealed({"llmq": __version__, "evaluations": [*others, dict(evaluation)], "cards": cards}))


def entry(
    found: Mapping[str, Any], *, text: str | Path | None, baseline: str | Path | None, windows: int | None = None
) -> dict[str, Any]:
    """Return the figures of an evaluation as an entry.

    found: `Evaluation.to_json()`, and `tasks` where some were run. text: a file, whose name alone is kept, or a data
    set. baseline: a checkpoint, which is called as its model is. windows: how many were scored at most, None for all.
    """
    said = {"text": None if text is None else Path(text).name, "baseline": None if baseline is None else _name(baseline)}
    return {**said, "windows": windows, **found}


def _name(checkpoint: str | Path) -> str:
    """Return what to call a checkpoint: org/name, or the last part of a path."""
    path = user_path(checkpoint)
    return origin(path).name if path.is_dir() else path.name if path.is_file() else str(checkpoint)


def _entries(file: Path) -> list[dict[str, Any]]:
    entries = field(json_object(file), "evaluations", list, str(file))
    if not all(isinstance(e, dict) for e in entries):
        raise LlmqError(f"{file}: evaluations must be objects; move the file away and measure again")
    return entries


def _key(e: Mapping[str, Any]) -> list[Any]:
    return [e.get(name) for name in _KEY]
