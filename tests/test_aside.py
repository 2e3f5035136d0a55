"""Work in a thread: one ahead, in order; its errors come where its result is asked for."""

import threading

import pytest
import torch

from llmq import aside
from llmq.aside import Ahead, ahead, behind

CPU = torch.device("cpu")


def test_the_next_is_made_while_one_is_in_use():
    begun = [threading.Event() for _ in range(4)]

    def make(n):
        begun[n].set()
        return n * n, threading.current_thread() is not threading.main_thread()

    used = []
    for value, in_thread in ahead(make, range(3)):
        assert in_thread == bool(used)
        used.append(value)
        if len(used) < 3:
            assert begun[len(used)].wait(10)
        assert not begun[min(len(used) + 1, 3)].is_set()  # never two ahead
    assert used == [0, 1, 4]
    assert list(ahead(make, [])) == []


def test_an_error_is_raised_where_its_result_is_asked_for():
    def make(n):
        if n == 1:
            raise OSError("gone")
        return n

    coming = ahead(make, range(3))
    assert next(coming) == 0
    with pytest.raises(OSError, match="gone"):
        next(coming)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_who_stops_early_waits_for_what_is_being_made_and_no_more():
    made = []
    coming = ahead(lambda n: made.append(n) or n, range(9))
    assert next(coming) == 0
    coming.close()
    assert made == [0, 1]


def test_another_number_than_the_announced_one_is_made_when_it_is_asked_for():
    made = Ahead(lambda n: n * 10)
    assert [made.get(3, 4), made.get(7, 8), made.get(8)] == [30, 70, 80]
    made.close()


def test_work_is_done_behind_in_order_and_all_of_it_on_leaving(monkeypatch):
    monkeypatch.setattr(aside, "pays", lambda device: True)
    go, done = threading.Event(), []
    with behind(CPU) as do:
        do(lambda: go.wait(10) and done.append("slow"))
        assert not done  # not waited for
        go.set()
        do(lambda: done.append("next"))
        assert done[0] == "slow"
    assert done == ["slow", "next"]


@pytest.mark.parametrize("when", ["at the next", "at the end"])
def test_an_error_behind_is_raised_at_the_next_work_or_at_the_end(when, monkeypatch):
    monkeypatch.setattr(aside, "pays", lambda device: True)
    reached = []

    def use():
        with behind(CPU) as do:
            do(lambda: 1 / 0)
            reached.append("behind it")
            if when == "at the next":
                do(lambda: reached.append("never"))

    with pytest.raises(ZeroDivisionError):
        use()
    assert reached == ["behind it"]


def test_on_the_cpu_work_is_done_at_once():
    done = []
    with behind(CPU) as do:
        do(lambda: done.append(threading.current_thread()))
        assert done == [threading.main_thread()]
