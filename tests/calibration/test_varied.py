"""Varied text: some of every piece in few samples, seeded, with BOS where the tokenizer adds one, without an end."""

from __future__ import annotations

import pytest
import torch

from llmq.calibration import tokens
from llmq.calibration.text import encode
from llmq.calibration.varied import PIECES, RUN


@pytest.mark.parametrize("bos", [True, False])
def test_sequences_are_full_and_seeded(request, bos):
    tokenizer = request.getfixturevalue("tokenizer_bos" if bos else "tokenizer_plain")
    got, again, other = (tokens("varied", tokenizer, 6, 100, seed=seed) for seed in (0, 0, 1))
    assert (got.shape, got.dtype) == ((6, 100), torch.int64)
    assert torch.equal(got, again)
    assert not torch.equal(got, other)
    if bos:
        assert (got[:, 0] == 0).all()
        assert (got == 0).sum() == 6


def test_the_first_turn_holds_the_beginning_of_every_piece(tokenizer_plain):
    pieces = [torch.tensor(encode(tokenizer_plain, file.read_text(encoding="utf-8"))) for file in PIECES.glob("*.txt")]
    length = sum(min(RUN, len(piece)) for piece in pieces)
    got = tokens("varied", tokenizer_plain, 1, length, seed=3)[0]
    begun = {tuple(run.tolist()) for run in got.unfold(0, RUN, 1)}
    assert all(tuple(piece[:RUN].tolist()) in begun for piece in pieces if len(piece) >= RUN)


def test_pieces_begin_anew_once_they_are_through(tokenizer_plain):
    """More tokens than all pieces have: each token of a piece is there at least once."""
    text = "".join(file.read_text(encoding="utf-8") for file in PIECES.glob("*.txt"))
    every = encode(tokenizer_plain, text)
    got = tokens("varied", tokenizer_plain, 3, len(every), seed=0)
    assert got.unique().numel() > 0.95 * len(set(every))


def test_pieces_are_of_many_kinds():
    """A piece is short, ends its last line, and is none of the others."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in PIECES.glob("*.txt")}
    assert len(texts) == len(set(texts.values())) >= 60
    assert {"german", "chinese", "python", "c", "json", "english-story"} <= texts.keys()
    assert all(100 < len(text) < 1600 and text.endswith("\n") for text in texts.values())
    assert sum(not text.isascii() for text in texts.values()) >= 25
