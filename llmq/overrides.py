r"""What a recipe says of some matrices alone: `REGEX:key=value[,key=value...]`.

    down_proj$:bits=8,group_size=32          names as transformers has them, options of the grid of the rest
    mlp:weights=nvfp4,inputs=nvfp4           whole grids in place of those of the rest; inputs=none is float
    blk\.0\.ffn_down:type=Q6_K               names as ggml has them, the one key of GGUF

A value may hold colons and equals signs of its own (`range=percentile:p=99.9`).
Not here: what a key means and which there are; each format says so of its grids.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmq.guard.patterns import Pattern

_GRAMMAR = re.compile(r"(?P<regex>.+?):(?P<changes> *[a-z][a-z_-]* *=.*)")


@dataclass(frozen=True)
class Override:
    """One override: its text, the expression that says whom it reaches, and what it changes, texts by key."""

    text: str
    pattern: Pattern
    changes: Mapping[str, str]


def parse(text: str) -> Override | None:
    """Return what an override says, None where it does not read. Raises LlmqError for a REGEX that is none."""
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        return None
    changes = [change.partition("=") for change in found["changes"].split(",")]
    pattern = Pattern(found["regex"], f"--override {text!r}")
    return Override(text, pattern, {k.strip().replace("-", "_"): v.strip() for k, _, v in changes})
