"""Pieces of text out of tokens, and where a stop string ends them.

A token can be half a character, and a word can be spelled otherwise in front of another: text is only given out when
the next token cannot change it. A stop string can begin in one piece and end in a later one: what may be its beginning
is held back.
Source: text-generation-inference and vLLM decode from two offsets, so that each step decodes a few tokens.
"""

from collections.abc import Callable, Generator, Iterable, Sequence

_HALF = "\ufffd"  # what a decoder makes of half a character
_WAITING = 8  # ids that may wait for the rest of a character, of four bytes at most: more of them spell none


class Decoded:
    """The text of ids as they come. decode: of a list of ids."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before)[-8:]  # a first token is spelled as behind the prompt, with its space
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int | None) -> str:
        """Return the text that the next id adds, none while it is half a character; None ends it: all that is left."""
        if token is not None:
            self._ids.append(token)
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        waits = token is not None and len(self._ids) - self._read < _WAITING
        if len(now) <= len(before) or (now.endswith(_HALF) and waits):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


def until(pieces: Iterable[str], stop: Sequence[str]) -> Generator[str, None, bool]:
    """Yield text up to the first stop string, none of it empty; ask for no more behind it. Returns whether one came."""
    held = ""
    for piece in pieces:
        held += piece
        if (at := _first(held, stop)) is not None:
            if held[:at]:
                yield held[:at]
            return True
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held
    return False


def _first(text: str, stop: Sequence[str]) -> int | None:
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)
