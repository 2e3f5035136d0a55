"""Trouble with the numbers of a linear, told from its line of the record: by kind, in a few words.

    line   {"damp": 0.1, "dampings": [0.01, 0.1], "dead_columns": 3, "tokens": 40, ...}       of a linear of 64 columns
    told   {"damping": "H factored with 0.1, not with 0.01",
            "dead columns": "3 of 64 get no signal",
            "few tokens": "40 for 64 columns"}

Steps record what they meet (algorithms/), solving.py what it sees of scales and activations; what of that is trouble is
decided here alone. A kind is a function of the line and the number of columns that returns the words, or "".
Not here: what is done about it, which whoever meets it decides.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llmq.types import QTensor

_CLIPPED = 0.01  # of the input's values: what a range leaves out on purpose is a tenth of that
_SCALES = {"lost": "too small to be stored", "coarse": "small, stored with few digits", "clipped": "too large"}

Line = Mapping[str, Any]


def _fallback(line: Line, K: int) -> str:
    return str(line.get("fallback", ""))


def _damping(line: Line, K: int) -> str:
    tried = line.get("dampings") or line.get("qep_dampings") or []
    if not tried:
        return ""
    failed = ", ".join(f"{d:g}" for d in tried[:-1])
    return f"{tried[-1]:g} after {failed} left H without a factor"


def _not_moved(line: Line, K: int) -> str:
    return str(line.get("qep", ""))


def _not_scaled(line: Line, K: int) -> str:
    return str(line.get("not_scaled", ""))


def _dead(line: Line, K: int) -> str:
    return f"{n} of {K} columns, which no token excites" if (n := line.get("dead_columns")) else ""


def _few(line: Line, K: int) -> str:
    return f"{n} for {K} columns" if 0 < (n := line.get("tokens", K)) < K else ""


def _scales(line: Line, K: int) -> str:
    return ", ".join(f"{n} {_SCALES[kind]}" for kind, n in line.get("scales", {}).items())


def _clipped(line: Line, K: int) -> str:
    return f"{share:.1%} of its values" if (share := line.get("input_clipped", 0.0)) > _CLIPPED else ""


KINDS: Mapping[str, Callable[[Line, int], str]] = {
    "rounded to nearest instead": _fallback,
    "damping raised": _damping,
    "not scaled": _not_scaled,
    "not corrected": _not_moved,
    "dead columns": _dead,
    "few tokens": _few,
    "scales": _scales,
    "input clipped": _clipped,
}


def strain(W_NK: Tensor, q: QTensor) -> dict[str, Any]:
    """Return what is recorded of scales that the file does not hold, or with few digits only, of a solved linear."""
    found = q.grid.strain(W_NK, q.params)
    return {"scales": found} if found else {}


def told(line: Line, K: int) -> dict[str, str]:
    """Return the trouble of a linear of K columns by kind."""
    return {kind: words for kind, words_of in KINDS.items() if (words := words_of(line, K))}


def summed(linears: Mapping[str, Line]) -> dict[str, dict[str, Any]]:
    """Return, for each kind of trouble that the lines tell, how many linears have it, and the first with its words."""
    found: dict[str, dict[str, Any]] = {}
    for name, line in linears.items():
        for kind, words in line.get("trouble", {}).items():
            found.setdefault(kind, {"linears": 0, "first": name, "says": words})["linears"] += 1
    return {kind: found[kind] for kind in KINDS if kind in found}
