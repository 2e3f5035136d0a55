"""OpenAI's requests and answers: what a body may ask for, and what is said back.

    read_chat(body, ...), read_text(body, ...) -> Wanted       POST /v1/chat/completions, /v1/completions
    Shape("chat.completion", model).whole(...), .chunk(...)    an answer at once, and piece by piece

Every key is looked at: what has no meaning here is refused by name where it would change the answer, and passed over
where it is the client's own affair.
Source: platform.openai.com/docs/api-reference, chat and completions.
Not here: HTTP (server.py), generating (speaker.py).
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmq.errors import LlmqError, printable
from llmq.talk.speaker import Message, Sampling

_STOPS, _STOP_LENGTH = 16, 1000
_TURNS = 10_000
_COMPLETION = 16  # tokens of /v1/completions where nothing is said
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ONE_ANSWER: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False, 0),
    "top_logprobs": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "echo": (False,), "suffix": ("",), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": (),
    "verbosity": (),
}  # fmt: skip
"""Keys that would change the answer, and the values with which they do not."""
_THE_CLIENTS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier",
}  # fmt: skip
_READ = {"model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens"}


class RequestError(LlmqError):
    """A request that is refused. status: of HTTP. kind, param, code: as OpenAI's errors have them."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or "invalid_request_error"

    def to_json(self) -> dict[str, Any]:
        """Return the body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: an answer to `messages`, or the text, or ids, behind `prompt`.

    stream: piece by piece. usage: counts at the end of that.
    """

    how: Sampling
    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | None = None
    stream: bool = False
    usage: bool = False


def read_chat(body: Mapping[str, Any], model: str, most: int) -> Wanted:
    """Return what a chat's body asks for. model: that is served. most: tokens of an answer. Raises RequestError."""
    _known(body, {*_READ, "messages", "max_completion_tokens"})
    _model(body, model)
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    turns = _of(body, "messages", list)
    if not 0 < len(turns or []) <= _TURNS:
        raise RequestError("messages must be a list of turns", "messages")
    stream, usage = _stream(body)
    messages = [_turn(t, i) for i, t in enumerate(turns or [])]
    return Wanted(_sampling(body, limit, most, most), messages, None, stream, usage)


def read_text(body: Mapping[str, Any], model: str, most: int) -> Wanted:
    """Return what a completion's body asks for; parameters and errors as of `read_chat`."""
    _known(body, {*_READ, "prompt"})
    _model(body, model)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
    if not isinstance(prompt, str) and not ids:
        raise RequestError("prompt must be one text, or the ids of its tokens", "prompt")
    stream, usage = _stream(body)
    return Wanted(_sampling(body, "max_tokens", most, min(_COMPLETION, most)), None, prompt, stream, usage)


def _known(body: Mapping[str, Any], read: set[str]) -> None:
    """Refuse keys that are not known, or would change the answer."""
    for key, value in body.items():
        if key in read or key in _THE_CLIENTS or value is None:
            continue
        if key not in _ONE_ANSWER:
            raise RequestError(f"unrecognized request argument: {printable(key, 80)}", printable(key, 80))
        if value not in _ONE_ANSWER[key]:
            raise RequestError(f"{key} is not supported by llmq serve; leave it out", key, code="unsupported_parameter")


def _model(body: Mapping[str, Any], model: str) -> None:
    asked = _of(body, "model", str)
    if asked is None:
        raise RequestError(f"model is missing; this server has {model}", "model")
    if asked != model:
        said = f"there is no model {printable(asked, 100)} here; this server has {model}"
        raise RequestError(said, "model", 404, "model_not_found")


def _sampling(body: Mapping[str, Any], limit: str, most: int, default: int) -> Sampling:
    tokens = _of(body, limit, int)
    if tokens is not None and tokens < 1:
        raise RequestError(f"{limit} is {tokens}; it must be at least 1", limit)
    temperature, top_p = (_of(body, key, float) for key in ("temperature", "top_p"))
    for key, value, high in (("temperature", temperature, 2), ("top_p", top_p, 1)):
        if value is not None and not 0 <= value <= high:
            raise RequestError(f"{key} is {value}; it goes from 0 to {high}", key)
    seed = _of(body, "seed", int)
    how = None if seed is None else seed % 2**32
    return Sampling(min(tokens or default, most), temperature, top_p, how, _stops(body))


def _stops(body: Mapping[str, Any]) -> Sequence[str]:
    found = body.get("stop")
    several = [] if found is None else found if isinstance(found, list) else [found]
    if len(several) > _STOPS or any(not isinstance(s, str) or not 0 < len(s) <= _STOP_LENGTH for s in several):
        said = f"stop must be a text, or at most {_STOPS} of them, each of 1 to {_STOP_LENGTH} characters"
        raise RequestError(said, "stop")
    return several


def _stream(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether the answer is to come piece by piece, and whether counts are to end it."""
    options = _of(body, "stream_options", dict) or {}
    return bool(_of(body, "stream", bool)), bool(_of(options, "include_usage", bool))


def _turn(turn: Any, i: int) -> Message:
    """Return a turn as templates read it. Raises RequestError for what is no text of a known role."""
    where = f"messages[{i}]"
    if not isinstance(turn, dict) or turn.get("role") not in [*_ROLES]:  # a list: a role may be what has no hash
        raise RequestError(f"{where} must have a role: {', '.join(_ROLES)}", f"{where}.role")
    if turn.get("tool_calls"):
        raise RequestError(f"{where}: tools are not supported by llmq serve", f"{where}.tool_calls")
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(p["text"] if isinstance(p.get("text"), str) else "" for p in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}: its content must be text", f"{where}.content")
    return {"role": _ROLES[turn["role"]], "content": content}


def _of(body: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return a value of a type, None where it is missing or null. Raises RequestError for one of another type."""
    value = body.get(key)
    good = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if value is not None and (not good or (isinstance(value, bool) and kind is not bool)):
        raise RequestError(f"{key} must be of type {kind.__name__}", key)
    return value


@dataclass(frozen=True)
class Shape:
    """How the answers of one request look. kind: chat.completion or text_completion. model: that is served."""

    kind: str
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        """Whether it answers messages."""
        return self.kind == "chat.completion"

    def whole(self, text: str, finish: str | None, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return an answer at once."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._around([{"index": 0, **said, "logprobs": None, "finish_reason": finish}]) | {"usage": usage}

    def begin(self) -> dict[str, Any]:
        """Return what goes before the pieces of a chat's answer."""
        return self._piece({"role": "assistant", "content": ""}, None)

    def chunk(self, text: str) -> dict[str, Any]:
        """Return a piece."""
        return self._piece({"content": text} if self.chat else text, None)

    def end(self, finish: str | None) -> dict[str, Any]:
        """Return what goes behind the last piece."""
        return self._piece({} if self.chat else "", finish)

    def counts(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return what goes last, where it is asked for."""
        return self._around([], ".chunk" * self.chat) | {"usage": usage}

    def _piece(self, said: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta" if self.chat else "text": said, "logprobs": None, "finish_reason": finish}
        return self._around([choice], ".chunk" * self.chat)

    def _around(self, choices: list[dict[str, Any]], piece: str = "") -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}{piece}",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return how many tokens a request took."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
