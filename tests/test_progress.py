"""What long work tells of itself, and to whom."""

import mmap

import pytest

from llmq import progress
from llmq.progress import Event, Listener, Memory, Work


class Heard(Listener):
    def __init__(self):
        self.events: list[Event] = []

    def hear(self, event):
        self.events.append(event)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_function_hears_where_the_work_is_and_a_listener_every_step():
    plain, heard = [], Heard()
    for listener in (lambda *told: plain.append(told), heard):
        work = Work.of(listener)
        assert Work.of(work) is work
        work(0, 2, "block 0")
        work.step("solve", ["q_proj", "k_proj"])
        work.say("warning", "few tokens")
        work(1, 2, "block 1")
    assert plain == [(0, 2, "block 0"), (1, 2, "block 1")]
    told = [(e.kind, e.what, e.done, e.step, e.names) for e in heard.events]
    at = ("solve", ("q_proj", "k_proj"))
    assert told == [
        ("begin", "block 0", 0, "", ()), ("step", "block 0", 0, *at), ("warning", "few tokens", 0, *at),
        ("begin", "block 1", 1, "", ()),
    ]  # fmt: skip


def test_nobody_who_listens_costs_nothing(monkeypatch):
    monkeypatch.setattr(Memory, "held", None)  # calling it would fail
    work = Work.of(None)
    work(0, 1, "block 0")
    work.step("solve")


def test_seconds_left_follow_from_the_parts_that_are_done(clock):
    heard = Heard()
    work = Work(heard)

    def at(seconds, *told):
        clock[0] = 100.0 + seconds
        work(*told) if told else work.step("solve")
        return heard.events[-1].left

    assert at(50, 0, 4, "block 0") is None and at(55) is None
    assert at(60, 1, 4, "block 1") == 30  # three more of 10 seconds each; what came before the phase is not counted
    assert at(64) == 26
    assert at(75) == 20  # block 1 takes longer than a block should; two more still come
    assert at(80, 2, 4, "block 2") == 30
    assert at(90, 3, 4, "block 3") == pytest.approx(40 / 3)
    assert at(95, 4, 4, "writing") == 0
    assert at(96, 0, 4, "first") is None and at(97, 0, 4, "second") is None  # phases too, though no more is done
    assert at(98, 1, 4, "second") == 3
    assert at(99, 0, 8, "verifying") is None  # another phase
    assert at(100, 3, 8, "verifying") == pytest.approx(5 / 3)
    assert heard.events[-1].seconds == 100


def test_work_that_goes_on_in_the_middle_counts_from_there(clock):
    heard = Heard()
    work = Work(heard)
    work(30, 32, "block 30")
    clock[0] += 10
    work(31, 32, "block 31")
    assert heard.events[-1].left == 10


def test_memory_now_and_at_most():
    before = Memory.held()
    with mmap.mmap(-1, 64 * 2**20) as pages:  # given back when it is closed, whatever the heap keeps
        pages.write(b"1" * len(pages))
        full = Memory.held()
    after = Memory.held()
    assert full.now > before.now + 50 * 2**20 and full.most >= full.now
    assert after.now < full.now - 50 * 2**20 and after.most > full.now - 2**21  # the kernel counts by the thread
    assert (full.device_now is None) == (full.device_most is None)
