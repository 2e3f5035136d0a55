"""Autotune choices: what is measured, what is kept, what is on disk."""

import json
from dataclasses import asdict

import pytest
import torch

from llmq_kernels import tune
from llmq_kernels.errors import KernelError

A, B = tune.Config(16, 64, 1, 4, 3), tune.Config(16, 128, 2, 4, 4, 128)
DEVICE = torch.device("cuda")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Give a device that is not there a name, and configurations a speed; count what is measured."""
    measured = []

    def time(run, config):
        measured.append(config)
        return {A: 2.0, B: 1.0}[config]

    monkeypatch.setattr(tune, "_time", time)
    monkeypatch.setattr(tune, "_slug", lambda device: "some-gpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = tune.cache_folder()
    tune.cache_folder(tmp_path)
    yield measured
    tune.measuring(True)
    tune.cache_folder(before)


def choose(key=(1,)):
    return tune.choose("op", DEVICE, key, lambda: [A, B], lambda c: None)


def test_the_fastest_is_chosen_once_and_found_on_disk_by_the_next_process(clock, tmp_path):
    assert choose() == B
    assert choose() == B
    tune.cache_folder(tmp_path)  # forgets what is in memory
    assert choose() == B
    assert clock == [A, B]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["op 1"]["registers"] == 128


def test_what_was_chosen_is_looked_up_and_nothing_else(clock, monkeypatch):
    choose()
    monkeypatch.setattr(tune, "_slug", None)
    assert tune.choose("op", DEVICE, (1,), None, None) == B


def test_the_first_candidate_of_a_capture_is_not_kept(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == A
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == B


def test_two_processes_keep_each_other_s_choices(clock, tmp_path):
    choose((1,))
    tune._known.clear()
    (file,) = tmp_path.iterdir()
    theirs = json.loads(file.read_text())
    file.write_text(json.dumps(theirs | {"op 2": asdict(A)}))
    choose((3,))
    assert choose((2,)) == A
    assert set(json.loads(file.read_text())) == {"op 1", "op 2", "op 3"}


def test_what_is_no_candidate_any_more_is_measured_again(clock, tmp_path):
    choose()
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"op 1": asdict(A) | {"BM": 32}}))
    tune.cache_folder(tmp_path)
    assert choose() == B
    assert json.loads(file.read_text())["op 1"] == asdict(B)


def test_nothing_is_measured_when_told_so_or_in_a_graph_capture(clock, monkeypatch, tmp_path):
    tune.measuring(False)
    assert choose() == A
    tune.measuring(True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == A
    assert not clock
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_said_and_replaced(clock, tmp_path, caplog):
    choose()
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    tune.cache_folder(tmp_path)
    assert choose() == B
    assert "no autotune choices" in caplog.text
    assert json.loads(file.read_text())


def test_a_configuration_that_does_not_fit_the_device_is_passed_over(clock, monkeypatch):
    monkeypatch.setattr(tune, "_time", lambda run, config: None if config == B else 1.0)
    assert choose() == A


def test_a_device_that_takes_no_configuration_is_named(clock, monkeypatch):
    monkeypatch.setattr(tune, "_time", lambda run, config: None)
    with pytest.raises(KernelError, match="some-gpu has too little shared memory for any configuration of op 1"):
        choose()


@pytest.mark.parametrize(("M", "bucket"), [(1, 1), (3, 4), (16, 16), (17, 32), (100_000, 2048)])
def test_buckets_of_tokens(M, bucket):
    assert tune.bucket(M) == bucket
