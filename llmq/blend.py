"""Several calibration texts in one run: which, and how many of the samples each gives.

    text.txt                                  all samples
    text.txt, code.jsonl                      half of them each
    text.txt:weight=3, code.jsonl, self       three fifths, a fifth, a fifth

The samples are dealt by largest remainder, so that 8 of 3:1:1 are 5, 2 and 1. Sequences of the sources take turns, and
any part of the calibration, such as what one process has or what is held out, is a blend too.
`:weight=` is no weight where a file of that whole name is there: a path may hold any character.
Not here: what a source is and how it is read (calibration/).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmq.errors import LlmqError, printable

SELF = "self"
"""The source that the model writes."""
VARIED = "varied"
"""The source of short texts of ours in many languages and kinds."""
_WEIGHED = re.compile(r"(?P<source>.+):weight=(?P<weight>[^:/\\]*)", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A source and how many of the samples are its own."""

    source: str
    samples: int


Calib = str | tuple[str, ...] | None
"""What a recipe's `calib` is: one source, several, none."""


def checked(calib: str | Sequence[str] | None, samples: int | None) -> Calib:
    """Return what a recipe's `calib` is, a list of one as that one.

    Raises LlmqError for sources that cannot share the samples, where it is known how many there are.
    """
    several = (calib,) if isinstance(calib, str) else tuple(calib or ())
    dealt(several, samples or 0)
    return several[0] if len(several) == 1 else several or None


def parted(calib: str | Sequence[str] | None) -> dict[str, float]:
    """Return the weight of each source that a recipe's `calib` names, in its order; none where it names none.

    Raises LlmqError for a weight that is no number above 0, and for a source that is named twice.
    """
    found: dict[str, float] = {}
    for word in (calib,) if isinstance(calib, str) else calib or ():
        source, weight = _read(word)
        if source in found:
            raise LlmqError(f"--calib names {printable(source, 80)} twice; name it once, with :weight=2")
        found[source] = weight
    return found


def dealt(calib: str | Sequence[str] | None, samples: int) -> list[Part]:
    """Return how many of the samples each source gives, by largest remainder; the earlier source where two tie.

    Raises LlmqError as `parted`, and for a source that would give none.
    """
    weights = parted(calib)
    exact = [samples * w / sum(weights.values()) for w in weights.values()]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    parts = [Part(source, n) for source, n in zip(weights, counts, strict=True)]
    for part in parts:
        if not part.samples and samples:
            raise LlmqError(
                f"--calib {printable(part.source, 80)} would give none of {samples} samples; give it more :weight=, "
                "or raise --samples"
            )
    return parts


def in_turns(counts: Iterable[int]) -> list[int]:
    """Return the order in which rows stand that were read source by source: each source's spread evenly."""
    places = [((j + 0.5) / n, i) for i, n in enumerate(counts) for j in range(n)]
    return sorted(range(len(places)), key=lambda row: places[row])


def written(calib: str | Sequence[str] | None, samples: int | None) -> int:
    """Return how many of the samples the model writes itself."""
    return sum(p.samples for p in dealt(calib, samples or 0) if p.source == SELF)


def sharing(calib: str | Sequence[str], share: float) -> tuple[str, ...]:
    """Return sources with VARIED beside them, which gives that share of the samples; those that name it are as it is.

    Example: of `text.txt` and 0.25, `text.txt` and `varied:weight=0.333333`.
    """
    words = (calib,) if isinstance(calib, str) else tuple(calib)
    weights = parted(words)
    if VARIED in weights:
        return words
    return (*words, f"{VARIED}:weight={sum(weights.values()) * share / (1 - share):.6g}")


def named(calib: str | Sequence[str] | None) -> str:
    """Return the sources for a message."""
    return ", ".join(parted(calib))


def _read(word: str) -> tuple[str, float]:
    """Return a source and its weight, 1 where none is said."""
    found = _WEIGHED.fullmatch(word)
    if found is None or _there(word):
        return word, 1.0
    try:
        weight = float(found["weight"])
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        right = f"{printable(found['source'], 40)}:weight=2"
        raise LlmqError(f"--calib {printable(word, 80)}: a weight is a number above 0, as in {right}")
    return found["source"], weight


def _there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # what no path can be is no path
        return False
