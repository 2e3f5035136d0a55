"""`llmq serve`: a model over HTTP as OpenAI's clients ask for it, one answer after the other.

    GET /v1/models, POST /v1/chat/completions, POST /v1/completions, GET /health

One thread generates; who comes meanwhile waits in line, a bounded number of them. A client that goes away leaves the
line, or its answer is computed no further. No request names a file or runs code: a body is JSON of a bounded size whose
every key is looked at (protocol.py). On loopback without a key only what is addressed to this machine is heard, as
JSON, so that no page in a browser can ask.
Not here: what a body means (protocol.py), generating (speaker.py).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmq.errors import LlmqError, one_line
from llmq.guard.reading import parse_json
from llmq.talk.protocol import RequestError, Shape, Wanted, read_chat, read_text, usage
from llmq.talk.speaker import Answer, Speaker, TooLongError

log = logging.getLogger(__name__)
_CONNECTIONS = 256
_BODY_SECONDS, _LOOK_SECONDS, _END_SECONDS = 60, 0.25, 3
_ANSWER = 4096  # tokens of an answer at most, of a model that says nothing of its context


@dataclass(frozen=True)
class Limits:
    """What a server takes on. waiting: requests in line behind the one that is answered. body: bytes of a request.

    answer: tokens of an answer, None for what the context has room for. Raises LlmqError for what lets nothing in.
    """

    waiting: int = 16
    body: int = 2**20
    answer: int | None = None

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--max-waiting", self.waiting, 0),
            ("--max-body", self.body, 1),
            ("--max-new-tokens", self.answer, 1),
        ):
            if value is not None and value < least:
                raise LlmqError(f"{option} is {value}; it must be at least {least}")


class Turns:
    """The line in front of the one thread that generates."""

    def __init__(self, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, "generation")
        self._most, self._held = waiting + 1, 0

    async def pieces(self, begin: Callable[[], Answer]) -> AsyncIterator[Answer | str]:
        """Yield the answer that `begin` returns when its turn has come, then its pieces. Closed, it is given up.

        Raises RequestError where the line is full, and what `begin` and the answer raise.
        """
        if self._held >= self._most:
            said = f"{self._held} requests are in line already; ask again later"
            raise RequestError(said, status=429, code="rate_limit_exceeded", kind="rate_limit_error")
        loop, given = asyncio.get_running_loop(), asyncio.Queue[Answer | str | None]()
        gone = threading.Event()

        def tell(item: Answer | str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(given.put_nowait, item)

        def run() -> None:
            if not gone.is_set():
                answer = begin()
                tell(answer)
                for piece in answer:
                    if gone.is_set():
                        answer.close()
                        return
                    tell(piece)

        self._held += 1
        done = self._thread.submit(run)
        done.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._leave))
        done.add_done_callback(lambda _: tell(None))
        try:
            while (item := await given.get()) is not None:
                yield item
            done.result()
        finally:
            gone.set()
            done.cancel()  # of one whose turn has not come: its place is free

    def end(self) -> None:
        """Wait for the thread, which has been given up by everyone."""
        self._thread.shutdown(cancel_futures=True)

    def _leave(self) -> None:
        self._held -= 1


class Service:
    """What answers requests. name: what the model is called in them."""

    def __init__(self, speaker: Speaker, name: str, limits: Limits) -> None:
        self.speaker, self.name, self.limits = speaker, name, limits
        self.turns = Turns(limits.waiting)
        self.most = limits.answer or speaker.context or _ANSWER

    async def models(self, request: Request) -> Response:
        """Return the one model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "llmq"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        if request.path_params["name"] != self.name:
            raise RequestError(f"there is no such model; this server has {self.name}", "model", 404, "model_not_found")
        return JSONResponse(model)

    async def chat(self, request: Request) -> Response:
        """Answer messages."""
        wanted = read_chat(await _body(request, self.limits.body), self.name, self.most)
        return await self._answered(request, wanted, Shape("chat.completion", self.name))

    async def text(self, request: Request) -> Response:
        """Continue a text."""
        wanted = read_text(await _body(request, self.limits.body), self.name, self.most)
        return await self._answered(request, wanted, Shape("text_completion", self.name))

    def _begin(self, wanted: Wanted) -> Answer:
        if wanted.messages is not None:
            ids = self.speaker.prompt(wanted.messages)
        else:
            ids = self.speaker.encode(wanted.prompt) if isinstance(wanted.prompt, str) else list(wanted.prompt or [])
        return self.speaker.answer(ids, wanted.how)

    async def _answered(self, request: Request, wanted: Wanted, shape: Shape) -> Response:
        pieces = self.turns.pieces(lambda: self._begin(wanted))
        work = _begun(pieces, shape, counts=wanted.usage) if wanted.stream else _whole(pieces, shape)
        return await _while_there(request, work)


async def _whole(pieces: AsyncIterator[Answer | str], shape: Shape) -> Response:
    async with aclosing(pieces) as items:  # type: ignore[type-var]  # an async generator
        answer: Any = await anext(items)  # what is wrong here is wrong with the request
        try:
            text = "".join([str(piece) async for piece in items])
        except LlmqError as e:
            raise _broken(e) from e
    return JSONResponse(shape.whole(text, answer.finish, usage(answer.prompt_tokens, answer.tokens)))


async def _begun(pieces: AsyncIterator[Answer | str], shape: Shape, *, counts: bool) -> Response:
    answer: Any = await anext(pieces)  # what is wrong with the request is said before anything else
    return StreamingResponse(
        _streamed(answer, pieces, shape, counts=counts),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


async def _while_there(request: Request, work: Any) -> Response:
    """Return what a coroutine does, which is given up when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_LOOK_SECONDS)
            if not task.done() and await request.is_disconnected():
                return Response(status_code=499)
        return task.result()  # type: ignore[no-any-return]
    finally:
        task.cancel()


async def _streamed(
    answer: Answer, pieces: AsyncIterator[Answer | str], shape: Shape, *, counts: bool
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; what goes wrong on the way is the last of them."""
    async with aclosing(pieces) as items:  # type: ignore[type-var]
        try:
            if shape.chat:
                yield _event(shape.begin())
            async for piece in items:
                yield _event(shape.chunk(str(piece)))
            yield _event(shape.end(answer.finish))
            if counts:
                yield _event(shape.counts(usage(answer.prompt_tokens, answer.tokens)))
        except LlmqError as e:
            yield _event(_broken(e).to_json())
    yield "data: [DONE]\n\n"


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


async def _body(request: Request, most: int) -> dict[str, Any]:
    """Return the object in a request's body. Raises RequestError for another thing, and for too much of it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("the body must be sent as Content-Type: application/json", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise RequestError(f"the body has more than {most:,} bytes", status=413)
    except TimeoutError as e:
        raise RequestError("the body did not come", status=408) from e
    try:
        found = parse_json(bytes(data), "the body")
    except LlmqError as e:
        raise RequestError(str(e)) from e
    if not isinstance(found, dict):
        raise RequestError("the body must be an object")
    return found


def _refusal(e: LlmqError) -> RequestError:
    """Return an error as OpenAI's clients know it."""
    if isinstance(e, RequestError):
        return e
    return RequestError(str(e), code="context_length_exceeded" if isinstance(e, TooLongError) else None)


def _broken(e: LlmqError) -> RequestError:
    """Return what is said of an answer that broke off on its way, which no client can mend."""
    return RequestError(str(e), status=500, kind="server_error")


async def _refused(_request: Request, e: Exception) -> Response:
    found = (
        _refusal(e) if isinstance(e, LlmqError) else RequestError(one_line(e), status=getattr(e, "status_code", 500))
    )
    return JSONResponse(found.to_json(), found.status, {"Retry-After": "1"} if found.status == 429 else None)


async def _fault(_request: Request, e: Exception) -> Response:
    """Say that llmq is at fault, here with where, to the client without."""
    log.error("a fault of llmq: %s: %s", type(e).__name__, one_line(e), exc_info=e)
    return JSONResponse(RequestError("the server failed", status=500, kind="server_error").to_json(), 500)


async def _left(_request: Request, _e: Exception) -> Response:
    return Response(status_code=499)


class _Key:
    """Middleware that hears nobody without the key. Compared in a time that says nothing of where keys differ."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._said = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and scope["path"] != "/health" and not hmac.compare_digest(given, self._said):
            e = RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")
            await JSONResponse(e.to_json(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)


def application(service: Service, key: str | None, hosts: list[str]) -> Starlette:
    """Return the application. key: that every request must have. hosts: to which it may be addressed."""
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    middleware += [] if key is None else [Middleware(_Key, key=key)]
    return Starlette(
        routes=[
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.models),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.text, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={LlmqError: _refused, HTTPException: _refused, ClientDisconnect: _left, Exception: _fault},
    )


def listening(host: str, port: int, key: str | None) -> socket.socket:
    """Return a socket that listens. Raises LlmqError where others could ask without a key, or the port is taken."""
    if key is None and not is_loopback(host):
        raise LlmqError(
            f"--host {host} lets other machines ask: set a key by LLMQ_API_KEY (or --api-key), or keep 127.0.0.1"
        )
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip()):
        raise LlmqError("the API key must be of visible ASCII characters, at least one")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as e:
        raise LlmqError(f"cannot listen at {host}, port {port} ({one_line(e)}); choose others: --host, --port") from e


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    service: Service, key: str | None, sock: socket.socket, begun: Callable[[uvicorn.Server], Any] = lambda _: None
) -> None:
    """Answer until a signal comes. What is being answered then is given up within seconds.

    begun: called with what serves, whose `should_exit` ends it too.
    """
    alone = is_loopback(sock.getsockname()[0]) and key is None
    app = application(service, key, ["localhost", "127.0.0.1", "[::1]", "::1"] if alone else ["*"])
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_END_SECONDS,
    )
    running = uvicorn.Server(config)
    begun(running)
    try:
        running.run(sockets=[sock])
    finally:
        service.turns.end()
