"""How a bench scores its checkpoints and shows its rows: on one text, or on each kind of a folder of texts.

With `--text FILE` it is `llmq eval`, and rows are kept in OUT/NAME.json. With `--text FOLDER [--home FILE]` it is
_kinds.py; rows are kept in OUT/kinds.json, whichever bench made them, and what each token lost in OUT/tokens, so that
one table sets llmq's rows and the rivals' side by side.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import _kinds
import _measure as measure
from _rows import Row, Rows, show, show_markdown

KEPT = ("perplexity", "baseline_perplexity", "kl_mean", "kl_standard_error", "top1")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which texts are scored, and how."""
    parser.add_argument("--text", required=True, type=Path, help="a file, or a folder of kinds of text")
    parser.add_argument("--home", type=Path, help="one more kind, which the mean over kinds leaves out")
    parser.add_argument("--against", help="the row that others are compared with, by kind; the first by default")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--windows", type=int, default=8, help="of 2048 tokens, of each kind")
    parser.add_argument("--convention", default="gptq", help="llama.cpp for models that need BOS before every window")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print what is there as Markdown")


class Scores:
    """The scores of one bench. name: of its file of rows, where one text is scored. room: for the baseline's states.

    Exits where --home stands beside a --text that is a file.
    """

    def __init__(self, args: argparse.Namespace, name: str, room: Path) -> None:
        self.args, self.room, self.several = args, room, args.text.is_dir()
        if args.home and not self.several:
            raise SystemExit("--home is one more kind beside those of a folder; give --text FOLDER")
        self.rows = Rows(args.out / f"{'kinds' if self.several else name}.json")

    def of(self, name: str, checkpoint: Path) -> Row:
        """Return the figures of a checkpoint, the row `name`."""
        a = self.args
        if not self.several:
            figures = measure.scores(checkpoint, a.model, a.text, a.windows, "--convention", a.convention)
            return {k: figures[k] for k in KEPT}
        tokens = Path("tokens") / f"{re.sub(r'[^a-z0-9.-]+', '-', name.lower())}.safetensors"
        return {"kinds": self._scorer.score(checkpoint, a.out / tokens), "tokens": str(tokens)}

    def show(self, rows: Mapping[str, Row]) -> None:
        """Print the table of these rows."""
        print(self._by_kind(rows)) if self.several else show(rows)

    def markdown(self, rows: Mapping[str, Row]) -> None:
        """Print the table of these rows as Markdown."""
        print(self._by_kind(rows)) if self.several else show_markdown(rows)

    def floats(self) -> str:
        """Return the perplexity of the float model, by kind where there are several; "" without rows."""
        row = next(iter(self.rows.read().values()), {})
        kinds = {f" on {kind}": f for kind, f in row["kinds"].items()} if "kinds" in row else {"": row} if row else {}
        return ", ".join(f"{f['baseline_perplexity']:.3f}{kind}" for kind, f in kinds.items())

    @cached_property
    def _scorer(self) -> _kinds.Scorer:
        a = self.args
        return _kinds.Scorer(a.model, _kinds.groups(a.text, a.home), a.windows, a.convention, self.room)

    def _by_kind(self, rows: Mapping[str, Row]) -> str:
        return _kinds.table(rows, lambda row: self.args.out / row["tokens"], self.args.against)
