"""One grammar of overrides for every format."""

import pytest

from llmq.overrides import parse
from llmq.types import LlmqError


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("down:bits=8,group-size=32", {"bits": "8", "group_size": "32"}),
        (r"blk\.(0|1)\.:type=Q6_K", {"type": "Q6_K"}),
        ("(?:q|k)_proj$: bits=8", {"bits": "8"}),
        ("(?:q|k)_proj$:range = percentile:p=99.9", {"range": "percentile:p=99.9"}),
        ("(?:q|k)_proj$:range=percentile:p=99.9, sym = no", {"range": "percentile:p=99.9", "sym": "no"}),
        ("bits=8", None),
        (":bits=8", None),
    ],
)
def test_the_first_colon_before_a_key_ends_the_expression(text, changes):
    found = parse(text)
    assert (found and found.changes) == changes
    if found:
        assert found.text == text and text.startswith(found.pattern.pattern + ":")
        assert ":" not in found.pattern.pattern.replace("(?:", "")


def test_an_expression_that_is_none_is_named():
    with pytest.raises(LlmqError, match=r"--override '\(:bits=8' is not a regular expression"):
        parse("(:bits=8")
