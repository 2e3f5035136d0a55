"""When an option of a recipe means something beside the others, and what to say where it does not.

Not here: the options (recipe.py), what each may be (options.py).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


class When(NamedTuple):
    """When an option means something: a test of the recipe that holds it, and what to say where the test fails."""

    true: Callable[[Any], Any]
    remedy: str


INTEGERS = When(lambda r: not r.gguf, "GGUF's types fix bits, groups, ranges and the head; choose by --type alone")
FLAGS = When(
    lambda r: r.weights is None, "--weights says what a weight becomes; say it there, as in int:bits=4:group=128:asym"
)
GGUF = When(lambda r: r.gguf, "it is for GGUF; say --format gguf")
FOLDERS = When(lambda r: not r.gguf, "in GGUF a matrix that a type does not fit falls back to another type by itself")
INPUTS = When(
    lambda r: r.inputs is None,
    "--inputs says what an input becomes; say it there, as in int:bits=8:group=channel or fp8:group=tensor:range=mse",
)
ACT = When(lambda r: r.act_bits, "it is for quantized activations; say --act-bits 8")
STATIC = When(lambda r: r.act_bits and r.act == "tensor", "it is for static scales; say --act-bits 8 --act tensor")
KV = When(lambda r: r.kv_bits, "it is for the key-value cache; say --kv-bits 8")
BITS = When(
    lambda r: r.target_bpw and not r.choices and not r.gguf,
    "it is for a budget of bits of integers; say --target-bpw, not --choices",
)
BUDGET = When(lambda r: r.target_bpw, "it is for a budget of bits; say --target-bpw")


def option(default: Any = None, *when: When) -> Any:
    """Declare an option of `Recipe`: None until it is given, then of its annotated type."""
    return dataclasses.field(default=None, metadata={"default": default, "when": when})
