"""A speaker without a model, for tests: it repeats the prompt, a letter a token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from llmq.talk.speaker import Message, Piece, Sampling, Speaker


class Parrot(Speaker):
    """It repeats the prompt. seconds: that a token takes. spoken: tokens of all answers so far."""

    name, weights = "parrot", 0

    def __init__(self, chats: bool = True, context: int | None = None, seconds: float = 0) -> None:
        self.chats, self.context, self.seconds, self.spoken = chats, context, seconds, 0

    def encode(self, text: str) -> list[int]:
        """Return the letters."""
        return [ord(c) for c in text]

    def templated(self, messages: Sequence[Message]) -> list[int]:
        """Return each turn behind the first letter of who speaks: <u>hello."""
        return self.encode("".join(f"<{m['role'][0]}>{m['content']}" for m in messages))

    def pieces(self, ids: Sequence[int], how: Sampling) -> Iterator[Piece]:
        """Yield the letters."""
        for i, token in enumerate(ids[: how.max_new_tokens], 1):
            time.sleep(self.seconds)
            self.spoken += 1
            finish = "stop" if i == len(ids) else "length" if i == how.max_new_tokens else None
            yield Piece(chr(token), finish=finish)
