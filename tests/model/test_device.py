"""Devices by their names, and what is said of others."""

import pytest
import torch

from llmq.errors import LlmqError
from llmq.model.device import device_of


@pytest.mark.parametrize("name", [None, "auto", "cpu", torch.device("cpu")])
def test_the_processor_is_there(name):
    assert device_of(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "gpu", "meta", "cuda:x", "xla", "hpu"])
def test_what_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(LlmqError, match=rf"device '{name}' .*; say cpu, cuda or auto"):
        device_of(name)
