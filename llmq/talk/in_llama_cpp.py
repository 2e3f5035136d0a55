"""A GGUF file that speaks, by llama.cpp: through the server of the xllamacpp wheel, which listens on loopback alone.

It is asked over HTTP, under a key that is drawn for it, and answers in server-sent events, a token each:

    data: {"content": " Paris", "tokens_predicted": 1, "stop": false}
    data: {"content": "", "stop": true, "stop_type": "eos", "tokens_predicted": 7}

The cache of the last prompt is llama.cpp's own, so that the next turn of a chat begins where the last one ended.
Not here: the file itself (gguf/reader.py), torch (in_torch.py).
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.hub import called
from llmq.errors import LlmqError, one_line
from llmq.extras import require
from llmq.gguf.reader import GgufFile
from llmq.talk.speaker import Message, Piece, Sampling, Speaker

_CONTEXT = 8192  # tokens that room is kept for where nothing else is said
_LONGEST = 2**20  # bytes of an event
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment reads what is said
_FINISH = {"limit": "length"}  # what stopped llama.cpp; eos and word are "stop"


class InLlamaCpp(Speaker):
    """A GGUF file. context: tokens that it keeps room for; None is what the file says, at most 8192.

    Raises LlmqError for a file that is no GGUF, where xllamacpp is missing, and where llama.cpp does not load it.
    """

    def __init__(self, model: str, context: int | None = None) -> None:
        if context is not None and not 0 < context < 2**31:
            raise LlmqError(f"--context is {context}; it must be at least 1")
        file = GgufFile(Path(model).expanduser())
        require(("xllamacpp",), "llama-cpp", "GGUF files are run")
        import xllamacpp

        most = file.value(f"{file.value('general.architecture')}.context_length")
        self.name, self.weights = called(model), file.data_bytes()
        said = most if isinstance(most, int) and most > 0 else _CONTEXT  # llama.cpp refuses what is no number
        self.context = context or min(_CONTEXT, said)
        self.chats = file.value("tokenizer.chat_template") is not None
        self._key = secrets.token_urlsafe(32)
        params = xllamacpp.CommonParams()
        params.model.path, params.api_keys = str(file.path), [self._key]
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = self.context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.ui = params.endpoint_slots = False
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as e:
            raise LlmqError(f"{model}: llama.cpp does not load it ({one_line(e)})") from e
        self._ask("/lora-adapters").close()  # waits for its queue: a server that ends before that runs never ends

    def encode(self, text: str) -> list[int]:
        """See `Speaker.encode`."""
        with self._ask("/tokenize", content=text, add_special=True, parse_special=True) as answer:
            return [int(i) for i in json.load(answer)["tokens"]]

    def templated(self, messages: Sequence[Message]) -> list[int]:
        """See `Speaker.templated`. What begins a text is not the template's where the tokenizer puts it there."""
        with self._ask("/apply-template", messages=list(messages)) as answer:
            return self.encode(str(json.load(answer)["prompt"]))

    def pieces(self, ids: Sequence[int], how: Sampling) -> Iterator[Piece]:
        """See `Speaker.pieces`."""
        given = {"temperature": how.temperature or 0, "n_predict": how.max_new_tokens, "top_k": 0, "min_p": 0}
        given |= {"top_p": 1 if how.top_p is None else how.top_p}
        given |= {"seed": how.seed if how.seed is not None else secrets.randbits(31)}
        counted = 0  # of half a character there is no event
        with self._ask("/completion", prompt=list(ids), stream=True, **given) as answer:
            for event in _events(answer):
                if "error" in event:
                    raise LlmqError(f"{self.name}: llama.cpp: {event['error'].get('message')}")
                ended = bool(event.get("stop"))
                finish = _FINISH.get(str(event.get("stop_type")), "stop") if ended else None
                before, counted = counted, int(event.get("tokens_predicted", counted))
                yield Piece(str(event.get("content", "")), counted - before, finish)

    def _ask(self, path: str, **body: Any) -> HTTPResponse:
        """Return the answer to what is posted, or to the path alone where nothing is."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        url = self._server.listening_address + path
        posted = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, posted, headers)  # noqa: S310, a server of our own
        try:
            return _DIRECT.open(request)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as e:
            with e:
                raise LlmqError(f"{self.name}: llama.cpp refuses it: {_said(e.read())}") from e
        except (OSError, HTTPException) as e:
            raise LlmqError(f"{self.name}: llama.cpp does not answer ({one_line(e)})") from e


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream as they come."""
    while line := answer.readline(_LONGEST):
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])
        elif line.startswith(b"error: "):
            yield {"error": json.loads(line[7:])}


def _said(body: bytes) -> str:
    """Return the message of an error."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")
