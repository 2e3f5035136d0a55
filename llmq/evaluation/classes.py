"""Classes of tokens, by the text that a token stands for: the loss of quantization falls on them unevenly.

    "The year 1984,"  ->  The: words | year: words | 19, 84: numbers | ,: punctuation
    "unquantized"     ->  un: words | quant, ized: word pieces

    words          a word of Latin letters, or its beginning
    word pieces    letters that go on where the token before ended in a letter
    numbers        begins, after spaces, with a digit
    punctuation    neither letters nor digits: marks, operators, symbols
    whitespace     spaces, tabs, newlines alone
    other scripts  letters beyond Latin: Greek, Cyrillic, Chinese ...
    bytes          a part of a character that several tokens spell together
    special        what the tokenizer calls so: beginning and end of text, roles of a chat

Not here: figures by class (scores.py).
"""

import re
import unicodedata
from typing import Any

import torch
from torch import Tensor

CLASSES = ("words", "word pieces", "numbers", "punctuation", "whitespace", "other scripts", "bytes", "special")
_SPACES = "\u0120\u2581"  # how byte-level and sentencepiece vocabularies spell a leading space
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def classes(ids: Tensor, before: Tensor, tokenizer: Any) -> Tensor:
    """Return the class of each token, int64 `[T]`, as an index into `CLASSES`.

    ids: the tokens, int64 `[T]`; before: the token before each in the text.
    """
    seen, place = torch.cat([ids, before]).unique(return_inverse=True)
    texts = [_text(tokenizer, i) for i in seen.tolist()]
    special = set(tokenizer.all_special_ids)
    kinds = ["special" if i in special else _kind(t) for i, t in zip(seen.tolist(), texts, strict=True)]
    found = torch.tensor([CLASSES.index(k) for k in kinds])[place[: len(ids)]]
    in_word = torch.tensor([k != "special" and t[-1:].isalpha() for k, t in zip(kinds, texts, strict=True)])
    goes_on = torch.tensor([not t[:1].isspace() for t in texts])[place[: len(ids)]] & in_word[place[len(ids) :]]
    return found.where((found != 0) | ~goes_on, torch.tensor(CLASSES.index("word pieces")))


def _text(tokenizer: Any, i: int) -> str:
    """Return the text of a token, its leading space kept; U+FFFD for bytes that make no character alone."""
    piece = tokenizer.convert_ids_to_tokens(i)
    if piece is None:  # an id beyond the vocabulary, which a model may have
        return ""
    if _BYTE.fullmatch(piece):
        byte = int(piece[3:5], 16)
        return chr(byte) if byte < 128 else "\ufffd"
    text = tokenizer.convert_tokens_to_string([piece])
    return f" {text.lstrip()}" if piece[:1] in _SPACES and text.strip() else text or " " * (piece[:1] in _SPACES)


def _kind(text: str) -> str:
    """Return the class of a token that is not special; "words" for Latin letters, wherever they stand in a word."""
    bare = text.strip()
    if "\ufffd" in text:
        return "bytes"
    if not bare:
        return "whitespace" if text else "special"
    if bare[0].isdigit():
        return "numbers"
    letters = [c for c in bare if c.isalpha()]
    if not letters:
        return "punctuation"
    return "words" if all("LATIN" in unicodedata.name(c, "") for c in letters) else "other scripts"
