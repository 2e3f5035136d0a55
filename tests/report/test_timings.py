"""Where the time of a run went, as a listener hears it."""

import pytest

from llmq.errors import LlmqError
from llmq.progress import Event, Memory
from llmq.report.timings import Timings, read


def event(what, seconds, step="", kind="begin", now=100):
    return Event(kind, what, 0, 2, step, (), seconds, None, Memory(now, 900))


def test_the_time_between_two_events_is_the_earlier_ones(tmp_path):
    times = Timings()
    for heard in (
        event("calibration text: /home/me/t.txt", 1.0),
        event("block 0", 3.0),
        event("block 0", 3.5, "forward", "step"),
        event("a warning", 4.0, kind="warning"),
        event("block 0", 5.5, "solve", "step"),
        event("block 1", 9.0),
        event("verifying", 10.0),
        event("verifying", 12.5),
    ):
        times.hear(heard)
    assert times.stages == {
        "starting": 1, "calibration text": 2, "load": 1.5, "forward": 2, "solve": 3.5, "verifying": 2.5
    }  # fmt: skip
    assert times.blocks == {0: 6.0, 1: 1.0} and times.seconds == 12.5 and times.most == 900
    times.save(tmp_path / "timings.json")
    again = read(tmp_path / "timings.json")
    assert again.to_json() == times.to_json() and again.to_json()["first"] == 0
    assert read(tmp_path / "none.json") is None


def test_the_course_of_memory_stays_short_and_keeps_its_peaks():
    times = Timings()
    for i in range(5000):
        times.hear(event("block 0", i / 10, "solve", "step", now=9000 if i == 777 else i % 7))
    assert 400 <= len(times.memory) <= 801 and max(n for _, n in times.memory) == 9000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"stages": {"solve": "long"}}, "does not hold seconds"),
        ({"blocks": {"first": 1.0}}, "does not hold seconds"),
        ({"memory": [[1, 2, 3]]}, "no list of seconds"),
        ({"memory": {}}, "memory"),
        ({"seconds": None}, "seconds"),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path, change, match):
    import json

    (tmp_path / "timings.json").write_text(json.dumps(Timings().to_json() | change))
    with pytest.raises(LlmqError, match=match):
        read(tmp_path / "timings.json")
