"""Work in a thread: one ahead, in order; its errors come where its result is asked for."""

import threading

import pytest

from llmq.aside import ahead


def test_the_next_is_made_while_one_is_in_use():
    begun = [threading.Event() for _ in range(4)]

    def make(n):
        begun[n].set()
        return n * n, threading.current_thread() is not threading.main_thread()

    used = []
    for value, aside in ahead(make, range(3)):
        assert aside
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
