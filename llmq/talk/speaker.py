"""What a model that speaks is asked: a prompt as token ids goes in, an answer comes out piece by piece.

    with opened("./my-llama-int4") as speaker:
        ids = speaker.prompt([{"role": "user", "content": "Hello"}])     # by its chat template
        answer = speaker.answer(ids, Sampling(max_new_tokens=64))
        for piece in answer:
            print(piece, end="")
        answer.finish                                                    # "stop" or "length"

Whoever stops listening calls `answer.close()`; the model then stops too.
Not here: what computes (in_torch.py, in_llama_cpp.py), where text ends (words.py).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from llmq.checkpoint.place import is_gguf
from llmq.errors import LlmqError
from llmq.talk.words import until

Message = Mapping[str, str]
"""A turn: `role` (system, user, assistant) and `content`."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when there is none.

    max_new_tokens: at most so many. temperature: 0 takes the likeliest; None is what the checkpoint says, else 0.
    top_p: choose among the likeliest that have this probability together. seed: of the draw; None is another each time.
    stop: texts at which the answer ends, itself without them.
    """

    max_new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1),
            ("temperature", self.temperature, 0, 100),
            ("top_p", self.top_p, 0, 1),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            if value is not None and not low <= value <= high:
                raise LlmqError(f"{name} is {value}; it goes from {low} to {high}")


@dataclass(frozen=True)
class Piece:
    """What the model said at once. text: perhaps none yet, of half a character. tokens: how many it is.

    finish: "stop" where the model ended its answer with it, "length" where no more tokens were wanted, else None.
    """

    text: str
    tokens: int = 1
    finish: str | None = None


class Answer:
    """Text as it comes. prompt_tokens, tokens: counted so far. finish: why it ended, None before that.

    first, seconds: until the first piece, and until the last so far.
    """

    def __init__(self, pieces: Iterator[Piece], prompt_tokens: int, stop: Sequence[str]) -> None:
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self.finish: str | None = None
        self.first = self.seconds = 0.0
        self._start = time.monotonic()
        self._pieces = pieces
        self._texts = until(self._counted(), stop)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text, none of them empty. Raises LlmqError where the model cannot go on."""
        if (yield from self._texts):
            self.finish = "stop"
        self.close()

    def close(self) -> None:
        """Have the model stop."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()

    @property
    def rate(self) -> float:
        """Tokens a second behind the first."""
        spent = self.seconds - self.first
        return (self.tokens - 1) / spent if spent > 0 and self.tokens > 1 else 0.0

    def _counted(self) -> Iterator[str]:
        for piece in self._pieces:
            self.tokens += piece.tokens
            self.seconds = time.monotonic() - self._start
            self.first = self.first or self.seconds
            self.finish = piece.finish
            yield piece.text


class Speaker(AbstractContextManager["Speaker"], ABC):
    """A model that is open. name: what it is called, without where it lies: clients read it in errors.

    context: tokens that prompt and answer may have together. chats: whether it has a chat template. weights: in bytes.
    """

    name: str
    context: int | None
    chats: bool
    weights: int

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        """Let go of what it holds beside its weights."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that is to be continued. Raises LlmqError where it cannot be cut."""

    @abstractmethod
    def templated(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a chat up to where the model answers. Raises LlmqError where the template refuses it."""

    @abstractmethod
    def pieces(self, ids: Sequence[int], how: Sampling) -> Iterator[Piece]:
        """Yield what follows; the last has a finish. Closed before, the model stops."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a chat up to where the model answers. Raises LlmqError where there is no chat template."""
        if not self.chats:
            raise LlmqError(f"{self.name} has no chat template: it continues texts, and answers no messages")
        return self.templated(messages)

    def answer(self, ids: Sequence[int], how: Sampling) -> Answer:
        """Return what follows, which is computed as it is asked for.

        Raises LlmqError for an empty prompt, and for one that leaves no room in the context.
        """
        if not ids:
            raise LlmqError("the prompt is empty; give some text to continue")
        room = how.max_new_tokens if self.context is None else self.context - len(ids)
        if room < 1:
            raise TooLongError(f"the prompt has {len(ids):,} tokens, and {self.name} takes {self.context:,} in all")
        most = Sampling(min(how.max_new_tokens, room), how.temperature, how.top_p, how.seed)
        return Answer(self.pieces(ids, most), len(ids), how.stop)

    def memory(self) -> dict[str, int]:
        """Return the bytes that are held, by what holds them."""
        return {"weights": self.weights, "process": psutil.Process().memory_info().rss}


class TooLongError(LlmqError):
    """A prompt that leaves the model no room."""


def opened(
    model: str,
    device: str = "auto",
    context: int | None = None,
    *,
    compiled: bool = True,
    kv_bits: int | None = None,
) -> Speaker:
    """Return the model at a path: a folder or a Hub id in torch, a GGUF file in llama.cpp.

    device: of torch. compiled: have torch compile it, on a GPU. context: of llama.cpp, which keeps room for it; None is
        what the file says, at most 8192. kv_bits: of torch's key-value cache, 8 or 4; None is one in floats.
    Raises LlmqError as `load` does, where xllamacpp is missing for a GGUF file, and for kv_bits of one.
    """
    if is_gguf(model):
        if kv_bits is not None:
            raise LlmqError("--kv-bits is for checkpoints that run in torch; a GGUF file's cache is llama.cpp's own")
        from llmq.talk.in_llama_cpp import InLlamaCpp

        return InLlamaCpp(model, context)
    from llmq.talk.in_torch import InTorch

    return InTorch(model, device, compiled=compiled, kv_bits=kv_bits)
