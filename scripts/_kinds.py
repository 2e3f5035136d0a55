"""A checkpoint scored on several kinds of text at once, and methods set side by side on them.

    TEXT/window-2048/prose.txt      a folder of make_texts.py: each text is a kind, read in windows of so many tokens
    TEXT/prose.txt                  any other folder: each file or sub-folder is a kind, in the convention's window

What each scored token lost is kept beside the rows, so that two methods that were measured days apart are compared
token by token (llmq/evaluation/paired.py); rows on other tokens are not compared.
Not here: how a row is made (bench_accuracy.py), which texts there are (make_texts.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _rows import Row

import llmq
from llmq.checkpoint.digest import digest
from llmq.checkpoint.shards import write
from llmq.evaluation import paired
from llmq.evaluation.once import Once
from llmq.evaluation.paired import Mean
from llmq.evaluation.scores import Predictor
from llmq.evaluation.several import measure
from llmq.evaluation.tokens import Tokens
from llmq.evaluation.windows import find_convention, load_text
from llmq.guard.reading import tensor_entries
from llmq.loading import load_tokenizer

HOME = "home"
"""The kind of text that methods were chosen on; the mean over kinds leaves it out."""
KEPT = ("kl_mean", "kl_interval", "kl_p99", "top1", "perplexity", "baseline_perplexity", "tokens")
_WINDOW = re.compile(r"window-(\d+)")


@dataclass(frozen=True)
class Group:
    """Texts that are scored in windows of one length, by default the convention's. home: the one of that name."""

    text: Path
    window: int | None = None
    home: bool = False


def groups(text: Path, home: Path | None = None) -> list[Group]:
    """Return what is scored of a folder: its `window-N`, or all of it where it has none. home: a text beside it."""
    found = [Group(p, int(m[1])) for p in sorted(text.iterdir()) if (m := _WINDOW.fullmatch(p.name)) and p.is_dir()]
    first = [] if home is None else [Group(home, home=True)]
    return first + (sorted(found, key=lambda g: g.window or 0) or [Group(text)])


class Scorer:
    """Scores checkpoints against one baseline, which is run once for all of them; its states wait on the disk.

    windows: of 2048 tokens of each kind; of longer ones fewer, of shorter ones more, so that each kind has about as
    many tokens. room: an empty folder for the states.
    """

    def __init__(self, baseline: Path, of: Sequence[Group], windows: float, convention: str, room: Path) -> None:
        self.baseline, self.groups, self.windows, self.convention, self.room = baseline, of, windows, convention, room
        self.truths = dict[Group, Once]()

    def score(self, model: Path, tokens: Path) -> dict[str, dict[str, Any]]:
        """Return the figures of each kind, and write into the file `tokens` what each token lost."""
        figures, kept = dict[str, dict[str, Any]](), dict[str, Any]()
        tokenizer, loaded = load_tokenizer(model), Predictor(llmq.load(model, dtype=torch.float32), "the model")
        for group in self.groups:
            held = dict[str, Tokens]()
            how = find_convention(self.convention, group.window)
            windows = max(1, round(self.windows * 2048 / (how.window or 2048)))
            content = load_text(group.text, None, how, tokenizer)
            of = ({"": lambda: loaded}, self._truth(group), {"": tokenizer}, content, how, windows)
            (e,) = measure(*of, held=held).evaluations.values()
            for called, category, these in _kinds(group, e, held[""]):
                name = f"{called} {e.window}" if called in figures else called
                figures[name] = {k: category[k] for k in KEPT} | {"window": e.window, "ids": digest(these.ids)}
                kept |= {f"{name}.kl": these.truth.kl.float(), f"{name}.window": these.window.int()}
        tokens.parent.mkdir(parents=True, exist_ok=True)
        write(tokens, kept)
        return figures

    def _truth(self, group: Group) -> Once:
        """Return the baseline on a group; all of them are one model in memory."""
        if group not in self.truths:
            room = self.room / str(len(self.truths))
            room.mkdir()
            self.truths[group] = Once(Predictor(self._loaded, "the baseline"), room)
        return self.truths[group]

    @cached_property
    def _loaded(self) -> Any:
        return llmq.load(self.baseline, dtype=torch.float32)


def _kinds(group: Group, e: Any, tokens: Tokens) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield each kind of a group with its figures and its tokens, which stand one kind after the other."""
    if e.categories is None:
        yield HOME if group.home else group.text.stem, e.to_json(), tokens
        return
    start, windows = 0, tokens.window.tolist()
    for name, category in e.categories.items():
        end = start + category["tokens"]
        yield name, category, tokens.of(range(windows[start], windows[end - 1] + 1))
        start = end


def differences(a: Row, b: Row, of: Callable[[Row], Path]) -> dict[str, Mean]:
    """Return by kind the mean over tokens of a's KL minus b's, of kinds that both have on the same tokens.

    of: the file with a row's tokens.
    """
    same = [k for k, f in a["kinds"].items() if b["kinds"].get(k, {}).get("ids") == f["ids"]]
    of_a, of_b = (tensor_entries(of(row)) for row in (a, b))
    found = {}
    for kind in same:
        kl = [entries[f"{kind}.kl"].read().double() for entries in (of_a, of_b)]
        found[kind] = paired.mean(kl[0] - kl[1], paired.clusters(of_a[f"{kind}.window"].read().long()))
    return found


def travelled(values: Mapping[str, Mean], kinds: Sequence[str]) -> Mean | None:
    """Return the mean over the kinds but the home one, each counting the same; None where one is missing.

    Texts are independent of each other: the squares of their intervals add up.
    """
    away = [k for k in kinds if k != HOME]
    if not away or not all(k in values for k in away):
        return None
    half = math.sqrt(sum(values[k].half ** 2 for k in away)) / len(away)
    return Mean(sum(values[k].mean for k in away) / len(away), half)


def table(rows: Mapping[str, Row], of: Callable[[Row], Path], against: str | None = None) -> str:
    """Return the rows as Markdown: kinds as columns, and the mean over those that are not home as the last.

    A cell is mean KL / 99 % KL / top-1. Below each row stands by how much its mean KL differs from that of the row
    `against`, the first one by default, with the 95 % interval of the paired difference.
    """
    kinds = list(dict.fromkeys(k for r in rows.values() for k in r["kinds"]))
    first = against if against is not None and against in rows else next(iter(rows), "")
    lines = [["method", *kinds, "mean but home"], ["---"] * (len(kinds) + 2)]
    for name, row in rows.items():
        own = {k: Mean(f["kl_mean"], 0.0) for k, f in row["kinds"].items()}
        mean = travelled(own, kinds)
        cells = [_cell(row["kinds"][k]) if k in own else "" for k in kinds]
        lines.append([name, *cells, "" if mean is None else f"{mean.mean:.4f}"])
        if name != first:
            by = differences(row, rows[first], of)
            cells = [_signed(by[k]) if k in by else "" for k in kinds]
            mean = travelled(by, kinds)
            lines.append([f"… less `{first}`", *cells, "" if mean is None else _signed(mean)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(figures: Mapping[str, Any]) -> str:
    return f"{figures['kl_mean']:.4f} / {figures['kl_p99']:.2f} / {100 * figures['top1']:.1f} %"


def _signed(m: Mean) -> str:
    return f"{m.mean:+.4f} ± {m.half:.4f}" if math.isfinite(m.half) else f"{m.mean:+.4f}"
