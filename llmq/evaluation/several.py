"""Several models on the same tokens of the same texts: the figures of each, and whether they differ.

    found = measure({"a": open_a, "b": open_b}, truth, tokenizers, text, convention)
    found.evaluations["a"].kl_mean
    found.pairs[0].said          "a is better than b by 0.0123 ± 0.0031 in KL (95 %)"

Two models are compared token by token (paired.py). Against a baseline that is in KL; without one, in -log q, of which
the mean is the logarithm of the perplexity per token. Models are in memory one after the other, the baseline's states
are run once (once.py).
Not here: the figures of one (scores.py), tasks (tasks.py).
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmq.evaluation import paired, scores
from llmq.evaluation.once import Once
from llmq.evaluation.scores import Evaluation
from llmq.evaluation.tokens import Predicts, Tokens, score
from llmq.evaluation.windows import Convention, Passages, Text
from llmq.types import LlmqError

KL, NLL = "KL", "-log q"


class TokenStore(Protocol):
    """Where what was made of every token is kept, by the name of the model."""

    def __contains__(self, name: object, /) -> bool:
        """Say whether a model is there."""

    def __getitem__(self, name: str, /) -> Tokens:
        """Return what was made of the tokens."""

    def __setitem__(self, name: str, tokens: Tokens, /) -> None:
        """Keep it."""


@dataclass(frozen=True)
class Pair:
    """How two models differ in a loss, the mean over tokens of a's minus b's. half: of the 95 % interval; said: so."""

    a: str
    b: str
    of: str
    difference: float
    half: float
    said: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `json.dumps` takes them."""
        interval = paired.Mean(self.difference, self.half).interval
        return {"a": self.a, "b": self.b, "of": self.of, "difference": self.difference, "interval": interval}


@dataclass(frozen=True)
class Several:
    """Models measured on the same tokens: figures by model, best first in `ranked`; pairs: of all, the better first."""

    evaluations: dict[str, Evaluation]
    ranked: list[str]
    pairs: list[Pair]

    def to_json(self) -> dict[str, Any]:
        """Return the figures by model, and of several `pairs`, as `json.dumps` takes them."""
        pairs = {"pairs": [p.to_json() for p in self.pairs]} if self.pairs else {}
        return {name: e.to_json() for name, e in self.evaluations.items()} | pairs

    @property
    def neighbours(self) -> list[Pair]:
        """The pairs of each model and the next worse."""
        return [p for p in self.pairs if self.ranked.index(p.b) == self.ranked.index(p.a) + 1]


def measure(  # noqa: PLR0913, what is measured and how
    models: Mapping[str, Callable[[], Predicts]],
    truth: Predicts | None,
    tokenizers: Mapping[str, Any],
    text: Text | Mapping[str, Text],
    convention: Convention,
    windows: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    held: TokenStore | None = None,
) -> Several:
    """Measure models, each opened when its turn comes, by name.

    tokenizers: theirs. progress: called with (done, total, name) after every window of each. held: keeps what was made
    of every token, by name; a model that it has is not opened, where there is a truth to say which windows there are.
    Raises LlmqError as `scores.measure` does, and where models cut the text into different tokens.
    """
    found, seen, first = dict[str, Evaluation](), dict[str, Tokens](), None
    kept: TokenStore = {} if held is None else held
    reader = truth.model if truth is not None and any(name in kept for name in models) else None
    with ExitStack() as stack:
        if truth is not None and len(models) > 1:
            truth = Once(truth, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmq-states-"))))
        for name, opened in models.items():
            scored = None if name in kept and reader is not None else opened()
            began = time.perf_counter()
            pieces = scores.prepare(scored.model if scored else reader, tokenizers[name], text, convention, windows)
            first = first or (name, pieces)
            _require_same(name, pieces, *first)
            if scored is not None:
                scores.require_same_vocabulary(scored, truth)
                told = None if progress is None else _naming(progress, name)
                kept[name] = score(pieces.windows, scored, truth, told)
            seen[name] = kept[name]
            seconds, bits = time.perf_counter() - began, scored.kv_bits if scored else None
            found[name] = scores.figures(seen[name], pieces, tokenizers[name], seconds, bits)
            del scored  # before the next is opened
    ranked = sorted(found, key=lambda n: _loss(found[n]))
    return Several(found, ranked, [_pair(a, b, seen) for a, b in itertools.combinations(ranked, 2)])


def _naming(progress: Callable[[int, int, str], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, name)


def _require_same(name: str, pieces: Passages, other: str, of_other: Passages) -> None:
    if pieces.windows != of_other.windows:
        raise LlmqError(
            f"{name} cuts the text into other tokens than {other}, so they cannot be paired; measure each by itself"
        )


def _loss(e: Evaluation) -> float:
    return e.perplexity if e.kl_mean is None else e.kl_mean


def _pair(a: str, b: str, seen: Mapping[str, Tokens]) -> Pair:
    """Return how two models differ on the tokens that both have seen."""
    of_a, of_b = seen[a], seen[b]
    if of_a.truth is not None and of_b.truth is not None:
        of, values = KL, of_a.truth.kl - of_b.truth.kl
    else:
        of, values = NLL, of_a.nll - of_b.nll
    found = paired.mean(values, paired.clusters(of_a.window))
    return Pair(a, b, of, found.mean, found.half, paired.says(found, a, b, of))
