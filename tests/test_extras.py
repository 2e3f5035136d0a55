"""A package that is not there is one line with the command that installs it."""

import pytest

from llmq import extras
from llmq.errors import LlmqError


def test_a_missing_package_is_named_with_the_command():
    extras.require(("json", "torch"), "onnx", "--to onnx is written")
    with pytest.raises(LlmqError) as caught:
        extras.require(("json", "no_such_package"), "onnx", "--to onnx is written")
    said = "by the package no_such_package, which is not installed: pip install 'llmq-quant[onnx]'"
    assert str(caught.value) == f"--to onnx is written {said}"
