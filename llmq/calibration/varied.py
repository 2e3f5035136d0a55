"""`varied`: short texts of ours in many languages and kinds, a file each in pieces/.

A text of one kind leaves most directions of the hidden states unseen: what is rounded for it alone makes up for errors
at the cost of all other texts, those in other languages first. A quarter of the calibration from here takes a third to
a half off the divergence on kinds that the rest does not hold (docs/calibration.md); nothing is downloaded or written.
Another language, or another kind, is another file of about 700 bytes.
Not here: the user's text (text.py), what the model writes itself (writing.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.text import bos_id, encode

PIECES = Path(__file__).with_name("pieces")
RUN = 64
"""Tokens of a piece that follow one another, so that few samples hold some of every piece."""


def varied(tokenizer: Any, samples: int, seq_len: int, seed: int) -> Tensor:
    """Return `samples` sequences, int64 `[samples, seq_len]`, that begin with BOS where the tokenizer adds one.

    They are runs of all pieces in turns, each turn in another order, drawn by `seed`; once a piece is through it begins
    anew.
    """
    bos = bos_id(tokenizer)
    length = seq_len if bos is None else seq_len - 1
    pieces = [encode(tokenizer, file.read_text(encoding="utf-8")) for file in sorted(PIECES.glob("*.txt"))]
    runs = _in_turns([torch.tensor(ids).split(RUN) for ids in pieces], torch.Generator().manual_seed(seed))
    found = list[Tensor]()
    while sum(map(len, found)) < samples * length:
        found.append(next(runs))
    windows = torch.cat(found)[: samples * length].view(samples, length)
    return windows if bos is None else torch.cat([torch.full((samples, 1), bos), windows], dim=1)


def _in_turns(pieces: Sequence[Sequence[Tensor]], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the first run of every piece, then the second of every piece, without an end."""
    for turn in itertools.count():
        for i in torch.randperm(len(pieces), generator=generator).tolist():
            yield pieces[i][turn % len(pieces[i])]
