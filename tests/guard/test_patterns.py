"""A stranger's regular expression: read as Python's own engine reads it, never for long."""

import re
import time

import pytest

from llmq.guard import patterns
from llmq.guard.patterns import Limit, Pattern
from llmq.types import LlmqError

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.11.self_attn.q_proj", "lm_head", ""]
SANE = ["up", r"layers\.(\d|1\d)\.", "^lm_head$", "", r"^(?!.*(mlp|head)).*$", r"(?<=\.)q_proj", r".*\.(q|k)_proj"]


@pytest.mark.parametrize("text", SANE)
def test_sane_patterns_mean_what_pythons_own_do(text):
    pattern = Pattern(text, "x")
    assert [pattern.search(n) for n in NAMES] == [bool(re.search(text, n)) for n in NAMES]
    assert [pattern.match(n) for n in NAMES] == [bool(re.match(text, n)) for n in NAMES]


@pytest.mark.filterwarnings("error")  # nor is anything else said
@pytest.mark.parametrize(
    "text",
    [r"(?R)", r"(?e)(?:foo){e<=30}", "(", "a{1,4294967296}", "(" * 5000, "(?:" * 400 + "a" + ")*" * 400, "[[a-"],
    ids=range(7),
)
def test_what_is_no_pattern_of_python_is_refused(text):
    with pytest.raises(LlmqError, match=r"^--skip x is not a regular expression") as e:
        Pattern(text, "--skip x")
    assert len(str(e.value)) < 500


def test_a_pattern_that_is_too_long_is_refused():
    with pytest.raises(LlmqError, match="has 200,000 characters"):
        Pattern("a" * 200_000, "x")


@pytest.mark.parametrize("text", [r"(?:x|xx)+[^x]", r"^(?:(\w)|(\w\w)|(\w{3}))*[^\w]"])
def test_no_pattern_takes_long_and_asking_again_takes_no_longer(text, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    pattern, start = Pattern(text, "--skip x"), time.thread_time()
    for _ in range(10):
        for find in (pattern.match, pattern.search):
            with pytest.raises(LlmqError, match=r"^--skip x takes more than 0 second on xxx"):
                find("x" * 60)
    assert time.thread_time() - start < 2


def test_patterns_with_one_limit_share_it(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.2)
    limit, start = Limit(), time.thread_time()
    slow = [Pattern(rf"(?:x|xx)+[^x]{i}", "x", limit) for i in range(200)]  # milliseconds each
    with pytest.raises(LlmqError, match="takes more than"):
        for pattern in slow:
            pattern.match("x" * 20)
    assert time.thread_time() - start < 2
    limit.left = 1e-9  # used up by a match that ended in time
    with pytest.raises(LlmqError, match="takes more than"):
        slow[0].match("x" * 20)
    assert limit.left > 0


def test_a_long_list_of_sane_patterns_has_no_limit(monkeypatch):
    ticks = iter(range(10**6))  # a slow machine: 0.05 ms pass between two looks at the clock
    monkeypatch.setattr(patterns.time, "thread_time", lambda: 5e-5 * next(ticks))
    limit = Limit()
    many = [Pattern(rf"model\.layers\.{i}\.", "x", limit) for i in range(500)]
    found = [[i for i, p in enumerate(many) if p.match(f"model.layers.{n}.mlp")] for n in range(0, 500, 7)]
    assert found == [[n] for n in range(0, 500, 7)]
    assert limit.left == Limit().left
