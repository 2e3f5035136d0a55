"""Processes that do one run: what is said where they cannot connect. What they do together: tests/pipeline."""

import pytest
import torch

from llmq.errors import LlmqError
from llmq.team import ALONE, join


def test_a_single_process_is_a_team_of_one():
    assert join(torch.device("cpu")) is ALONE


def test_processes_that_cannot_connect_are_told_in_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LlmqError, match="2 processes of this run cannot connect .*MASTER_ADDR"):
        join(torch.device("cpu"))
