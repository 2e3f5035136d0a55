"""Processes that meet in a store where an earlier attempt was killed."""

from threading import Thread

import pytest
import torch.distributed as dist

from llmq.meeting import meet


@pytest.fixture
def attempt():
    """`attempt(store, ranks)`: start threads that meet; returns them and the parts that those found that have."""

    def start(store, ranks, size=3):
        found = {}
        threads = [Thread(target=lambda r=r: found.update({r: meet(store, r, size)}), daemon=True) for r in ranks]
        for thread in threads:
            thread.start()
        return threads, found

    return start


def ended(threads):
    for thread in threads:
        thread.join(30)
    return not any(t.is_alive() for t in threads)


def test_all_find_one_part_and_another_attempt_another(attempt):
    store = dist.HashStore()
    for n in range(2):
        threads, found = attempt(store, range(3))
        assert ended(threads)
        found[0].set("address", str(n))
        assert found[1].get("address") == found[2].get("address") == str(n).encode()
    assert not meet(store, 0, 1).check(["address"])


def test_nobody_goes_on_by_what_a_killed_process_left(attempt):
    store = dist.HashStore()
    threads, _ = attempt(store, range(3))
    assert ended(threads)
    early, found = attempt(store, [1, 2])  # all that they need was answered, to others
    early[0].join(0.3)
    assert not found and all(t.is_alive() for t in early)
    first, leading = attempt(store, [0])
    assert ended(early) and ended(first)
    leading[0].set("address", "here")
    assert found[1].get("address") == found[2].get("address") == b"here"


def test_the_first_process_waits_for_those_of_this_attempt(attempt):
    store = dist.HashStore()
    threads, _ = attempt(store, range(3))
    assert ended(threads)
    first, leading = attempt(store, [0])  # calls of the killed ones are there, and are answered for nothing
    first[0].join(0.3)
    assert not leading
    others, found = attempt(store, [1, 2])
    assert ended(first) and ended(others)
    leading[0].set("address", "here")
    assert found[1].get("address") == b"here"
