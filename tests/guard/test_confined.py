"""A child that loops, eats memory, crashes or raises is one line; what it computes comes back."""

import ctypes
import os
import signal
import time

import psutil
import pytest

from llmq.errors import LlmqError
from llmq.guard import confined
from llmq.guard.confined import Confined, note


def outcome(function, value=None):
    with Confined(function, "reading it") as call:
        return call(value)


def test_values_go_there_and_back_and_the_child_keeps_its_state():
    seen = []
    with Confined(lambda x: seen.append(x) or [len(seen), x], "counting") as call:
        assert [call({"a": "\u20ac"}), call(None), call(1.5)] == [[1, {"a": "\u20ac"}], [2, None], [3, 1.5]]
    assert not seen, "the parent's own is untouched"


def crash(_):
    ctypes.string_at(0)


def late(_):
    note("file.jsonl, line 7")
    crash(None)


def refuse(_):
    raise LlmqError("line 3 is wrong")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda _: 9**9**9, "reading it takes more than 0 seconds"),
        (lambda _: "a" * 10**10, "reading it takes more than 1 GB of memory"),
        (crash, r"reading it breaks off \(SIGSEGV\)"),
        (late, r"file.jsonl, line 7 breaks off \(SIGSEGV\)"),
        (lambda _: os.abort(), "memory, or is damaged"),
        (lambda _: os._exit(3), r"breaks off \(status 3\)"),
        (lambda _: 1 / 0, r"reading it \(ZeroDivisionError: division by zero\) breaks off"),
        (refuse, "^line 3 is wrong$"),
    ],
)
def test_whatever_ends_the_child_is_one_line(monkeypatch, capfd, function, message):
    monkeypatch.setattr(confined, "SECONDS", 0)
    with pytest.raises(LlmqError, match=message):
        outcome(function)
    assert capfd.readouterr() == ("", ""), "nothing of the child reaches the terminal"


def test_time_is_counted_for_each_call_and_each_row_alone(monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 1)

    def burn(_):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass

    with Confined(burn, "burning") as call:
        for _ in range(4):
            call(None)
    with Confined(lambda _: [(note(f"row {i}"), burn(i)) for i in range(4)] and None, "burning") as call:
        call(None)  # rows within a call, too
    with pytest.raises(LlmqError, match="row 1 takes more than 1 seconds"):
        outcome(lambda _: [note("row 1"), *(burn(i) for i in range(4))])


def test_no_child_is_left_behind():
    others = psutil.Process().children()  # of other tests in this process
    with Confined(lambda _: os.getpid(), "a") as call:
        pid = call(None)
        os.kill(pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the child too, and the parent decides
        assert call(None) == pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(LlmqError), Confined(lambda _: os._exit(1), "a") as call:
        call(None)
    assert psutil.Process().children() == others
