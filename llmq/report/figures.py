"""The figures of an evaluation as a report takes them: what of a kept entry is a number where one belongs.

A file may hold anything, and plots format what they are given; what is of another type counts as not there.
Not here: the file (evaluation/kept.py), what the figures mean (evaluation/scores.py).
"""

from collections.abc import Mapping
from typing import Any

from llmq.guard.reading import number

_NUMBERS = (
    "perplexity", "baseline_perplexity", "kl_mean", "kl_standard_error", "kl_p99", "kl_p999", "top1", "tokens",
)  # fmt: skip
_WORDS = ("text", "convention", "baseline")


def figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an entry says, without what is no number, or no text, where one belongs."""
    found: dict[str, Any] = _numbers(entry)
    found |= {key: str(entry[key]) for key in _WORDS if entry.get(key) is not None}
    pairs = entry.get("kl_by_position")
    found["kl_by_position"] = [p for p in pairs if _pair(p)] if isinstance(pairs, list) else []
    found["classes"] = {n: _numbers(of) for n, of in _objects(entry, "classes") if _has(of, "top1")}
    found["categories"] = {
        n: _numbers(of) | {"kl_interval": of["kl_interval"] if _pair(of.get("kl_interval")) else (None, None)}
        for n, of in _objects(entry, "categories")
        if _has(of, "kl_mean", "top1", "tokens")
    }
    return found


def _objects(entry: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = entry.get(key)
    return [(str(n), of) for n, of in found.items() if isinstance(of, dict)] if isinstance(found, dict) else []


def _numbers(of: Mapping[str, Any]) -> dict[str, float]:
    return {key: x for key in _NUMBERS if (x := number(of.get(key))) is not None}


def _has(of: Mapping[str, Any], *keys: str) -> bool:
    return all(number(of.get(key)) is not None for key in keys)


def _pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(number(x) is not None for x in value)
