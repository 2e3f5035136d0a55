"""`llmq serve` as OpenAI's own client asks it, and as others should not."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import openai
import pytest
from _parrot import Parrot

import llmq
from llmq import cli
from llmq.talk import server
from llmq.talk.server import Limits, Service
from llmq.talk.speaker import opened

KEY = "s3cret"


@contextmanager
def served(speaker, key=None, service=None, **limits):
    """Serve in a thread; yields where."""
    service = service or Service(speaker, "me/parrot", Limits(**limits))
    sock = server.listening("127.0.0.1", 0, key)
    running = []
    thread = threading.Thread(target=server.serve, args=(service, key, sock, running.append))
    thread.start()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}"
    finally:
        while not running:
            time.sleep(0.01)
        running[0].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def client(at, key="none"):
    return openai.OpenAI(base_url=f"http://{at}/v1", api_key=key, max_retries=0, timeout=30)


def ask(at, path="/v1/completions", headers=None, body=None, **values):
    """Post by hand; returns the status and what came."""
    link = http.client.HTTPConnection(at, timeout=30)
    text = json.dumps({"model": "me/parrot", **values}) if body is None else body
    link.request("POST", path, text, {"Content-Type": "application/json"} | (headers or {}))
    answer = link.getresponse()
    found = answer.status, answer.read()
    link.close()
    return found


USER = [{"role": "user", "content": "hello"}]


def test_the_official_client_chats_streams_and_completes():
    with served(Parrot()) as at, client(at) as c:
        assert [m.id for m in c.models.list()] == ["me/parrot"] and c.models.retrieve("me/parrot").owned_by == "llmq"
        told = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]}]
        done = c.chat.completions.create(model="me/parrot", messages=[*told, *USER])
        assert done.choices[0].message.content == "<s>be kind<u>hello" and done.choices[0].finish_reason == "stop"
        assert done.usage.prompt_tokens == done.usage.completion_tokens == 18 and done.usage.total_tokens == 36
        cut = c.chat.completions.create(model="me/parrot", messages=USER, max_completion_tokens=4)
        assert cut.choices[0].message.content == "<u>h" and cut.choices[0].finish_reason == "length"
        stopped = c.chat.completions.create(model="me/parrot", messages=USER, stop=["ll", "zz"])
        assert stopped.choices[0].message.content == "<u>he" and stopped.choices[0].finish_reason == "stop"
        with c.chat.completions.create(
            model="me/parrot", messages=USER, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
        assert "".join(x.choices[0].delta.content or "" for x in chunks if x.choices) == "<u>hello"
        assert [x.choices[0].finish_reason for x in chunks if x.choices][-1] == "stop"
        assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 8
        text = c.completions.create(model="me/parrot", prompt="abc def", max_tokens=5)
        assert text.choices[0].text == "abc d" and text.choices[0].finish_reason == "length"
        assert (
            "".join(x.choices[0].text for x in c.completions.create(model="me/parrot", prompt="abc", stream=True))
            == "abc"
        )
        assert c.completions.create(model="me/parrot", prompt=[97, 98]).choices[0].text == "ab"


def test_a_real_model_answers_as_it_does_elsewhere(tiny_checkpoint):
    with opened(str(tiny_checkpoint()), "cpu") as speaker, served(speaker) as at, client(at) as c:
        how = {"model": "me/parrot", "messages": USER, "max_tokens": 6}
        once = c.chat.completions.create(**how, temperature=0).choices[0].message.content
        stream = c.chat.completions.create(**how, temperature=0, stream=True)
        assert "".join(x.choices[0].delta.content or "" for x in stream) == once
        drawn = [c.chat.completions.create(**how, temperature=1.5, seed=s).choices[0].message.content for s in (7, 7)]
        assert drawn[0] == drawn[1] != once
        with pytest.raises(openai.BadRequestError, match="has 600 tokens") as e:
            c.completions.create(model="me/parrot", prompt=[5] * 600)
        assert e.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="the model has embeddings of 320 tokens only"):
            c.completions.create(model="me/parrot", prompt=[100_000])


def test_without_the_key_nobody_is_heard():
    with served(Parrot(), KEY) as at:
        for wrong in ("none", KEY + "x", KEY[:-1]):
            with client(at, wrong) as c, pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                c.models.list()
        assert ask(at, prompt="a")[0] == 401
        with client(at, KEY) as c:
            assert c.completions.create(model="me/parrot", prompt="abc").choices[0].text == "abc"
        link = http.client.HTTPConnection(at)
        link.request("GET", "/health")
        assert json.load(link.getresponse()) == {"status": "ok"}
        link.close()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "gpt-5"}, "there is no model gpt-5 here"),
        ({"model": None}, "model is missing"),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": "hi"}, "messages must be of type list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must have a role"),
        ({"messages": [{"role": []}]}, "must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "its content must be text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tools are not supported"),
        ({"temperature": 3}, "temperature is 3; it goes from 0 to 2"),
        ({"temperature": "hot"}, "temperature must be of type float"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": True}, "max_tokens must be of type int"),
        ({"stop": ["a"] * 17}, "stop must be a text"),
        ({"stop": [""]}, "stop must be a text"),
        ({"n": 2}, "n is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"file": "/etc/passwd"}, "unrecognized request argument: file"),
        ({"stream": "yes"}, "stream must be of type bool"),
    ],
)
def test_what_a_body_may_not_ask_is_said(asked, values, said):
    status, body = asked("/v1/chat/completions", **({"messages": USER} | values))
    error = json.loads(body)["error"]
    assert status in (400, 404) and said in error["message"] and error["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def asked():
    with served(Parrot(context=100), body=10_000) as at:
        yield lambda *args, **values: ask(at, *args, **values)


def test_bodies_are_bounded_and_must_be_json(asked):
    assert asked(body=b"x" * 10_001)[0] == 413 and asked(body=b"{")[0] == 400 and asked(body=b"[]")[0] == 400
    assert asked(body=b"[" * 5000)[0] == 400
    half = '{"model": "me/parrot", "prompt": "\\ud800"}'  # of a pair: no text
    for body in (half.encode(), half.encode("utf-16"), half.encode().replace(b"\\ud800", b"\xed\xa0\x80")):
        status, said = asked(body=body)
        assert status == 400 and "is not valid JSON" in json.loads(said)["error"]["message"]
    assert asked(headers={"Content-Type": "text/plain"}, prompt="a")[0] == 415
    assert asked(headers={"Host": "evil.example"}, prompt="a")[0] == 400
    status, body = asked(prompt="a" * 100)
    assert status == 400 and json.loads(body)["error"]["code"] == "context_length_exceeded"
    assert asked("/v1/nothing")[0] == 404 and asked("/v1/models")[0] == 405
    # what changes nothing is passed over
    assert asked(prompt="abc", user="me", n=1, logit_bias={}, echo=False, temperature=None)[0] == 200


def test_a_base_model_sends_chats_to_completions():
    with served(Parrot(chats=False)) as at:
        status, body = ask(at, "/v1/chat/completions", messages=USER)
        assert status == 400 and "has no chat template" in json.loads(body)["error"]["message"]
        assert ask(at, "/v1/chat/completions", messages=USER, stream=True)[0] == 400


def test_one_answer_at_a_time_and_a_line_that_ends():
    speaker = Parrot(seconds=0.01)
    with served(speaker, waiting=2) as at:
        status = []
        asking = [
            threading.Thread(target=lambda: status.append(ask(at, prompt="a" * 30, max_tokens=30)[0])) for _ in range(5)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert sorted(status) == [200, 200, 200, 429, 429]
        assert ask(at, prompt="abc")[0] == 200 and speaker.spoken == 93


@contextmanager
def going_away(at, **values):
    """Ask, and go away without having heard."""
    body = json.dumps({"model": "me/parrot", **values}).encode()
    host, port = at.split(":")
    with socket.create_connection((host, int(port))) as link:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {at}\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_answered_no_further(stream):
    speaker = Parrot(seconds=0.005)
    with served(speaker) as at:
        with going_away(at, prompt="a" * 5000, max_tokens=5000, stream=stream):
            while speaker.spoken < 10:
                time.sleep(0.01)
        assert ask(at, prompt="abc", max_tokens=3)[0] == 200  # whose turn came
        assert speaker.spoken < 1000


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_leaves_the_line(stream):
    speaker = Parrot(seconds=0.005)
    service = Service(speaker, "me/parrot", Limits(waiting=1))
    with served(speaker, service=service) as at, going_away(at, prompt="a" * 5000, max_tokens=5000):
        while not speaker.spoken:
            time.sleep(0.01)
        with going_away(at, prompt="b", stream=stream):
            assert _until(lambda: service.turns._held == 2)
            assert ask(at, prompt="c")[0] == 429
        assert _until(lambda: service.turns._held == 1) and speaker.spoken < 2000


def _until(true):
    """Say whether something comes true within seconds."""
    end = time.monotonic() + 5
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_an_error_on_the_way_is_the_last_event(monkeypatch):
    class Breaks(Parrot):
        def pieces(self, ids, how):
            yield from list(super().pieces(ids, how))[:2]
            raise llmq.LlmqError("it broke")

    with served(Breaks()) as at:
        status, body = ask(at, prompt="abc")
        assert status == 500 and json.loads(body)["error"]["type"] == "server_error"
        _, body = ask(at, prompt="abc", stream=True)
        events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["message"] == "it broke"


def test_a_fault_is_told_here_and_not_to_the_client(caplog):
    class Fails(Parrot):
        def encode(self, text):
            raise KeyError("secret of llmq")

    with served(Fails()) as at:
        status, body = ask(at, prompt="abc")
        assert status == 500 and json.loads(body)["error"]["message"] == "the server failed"
        assert ask(at, prompt=[97])[0] == 200
    assert "KeyError: 'secret of llmq'" in caplog.text


def test_the_end_does_not_wait_for_a_long_answer(monkeypatch):
    monkeypatch.setattr(server, "_END_SECONDS", 1)
    start = time.monotonic()
    with served(Parrot(seconds=0.01)) as at:
        link = socket.create_connection(tuple(at.split(":")))
        body = json.dumps({"model": "me/parrot", "prompt": "a" * 9000, "max_tokens": 9000, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {at}\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert link.recv(100).startswith(b"HTTP/1.1 200")
    link.close()
    assert time.monotonic() - start < 20


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr("llmq.extras.find_spec", lambda name: None)
    with pytest.raises(llmq.LlmqError, match=r"starlette, which is not installed: pip install 'llmq-quant\[serve\]'"):
        cli.serve("no-model")


def test_limits_that_let_nothing_in_are_refused_before_the_model_is_opened():
    for given in ("max_waiting=-1", "max_body=0", "max_new_tokens=0"):
        name, _, value = given.partition("=")
        with pytest.raises(llmq.LlmqError, match=f"--{name.replace('_', '-')} is {value}; it must be at least"):
            cli.serve("no-model", **{name: int(value)})


def test_where_to_listen():
    with pytest.raises(llmq.LlmqError, match=r"--host 0.0.0.0 lets other machines ask: set a key by LLMQ_API_KEY"):
        server.listening("0.0.0.0", 0, None)  # noqa: S104
    server.listening("0.0.0.0", 0, KEY).close()  # noqa: S104
    for key in ("", " ", "é", "a\nb"):
        with pytest.raises(llmq.LlmqError, match="the API key must be of visible ASCII"):
            server.listening("127.0.0.1", 0, key)
    with server.listening("127.0.0.1", 0, None) as sock, pytest.raises(llmq.LlmqError, match="cannot listen at 127"):
        server.listening("127.0.0.1", sock.getsockname()[1], None)
    with pytest.raises(llmq.LlmqError, match="cannot listen"):
        server.listening("127.0.0.1", 99999, None)
