"""What an option may be, by the annotation of its field: one reading for recipes and for `NAME:option=value`.

    bool, int, float, str         itself; true is no number, a float is finite, both up to `MOST`; no text is empty
    Annotated[int, Between(1, 8)]    a number within
    Literal["token", "tensor"]    one of these
    tuple[str, ...]               a list of texts
    A | B, A | None               either

Not here: which options there are (recipe.py, the fields of a step), which of them go together.
"""

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

from llmq.errors import LlmqError, printable

MOST = 10**6
"""How far from zero a number may lie where its annotation does not say: steps, rounds and rates are far below."""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B?", re.IGNORECASE)
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}


class Between(NamedTuple):
    """The numbers that an option takes, ends included."""

    least: float
    most: float

    def __str__(self) -> str:
        return f"from {self.least} to {self.most}"


def check(name: str, value: Any, kind: Any) -> None:
    """Raise LlmqError, naming the option and what it takes, where `value` is not of an annotated `kind`."""
    if not admits(kind, value):
        raise LlmqError(f"{name} takes {wanted(kind)}, not {_shown(value)}")


def parse(name: str, text: str, kind: Any) -> Any:
    """Return the value of an annotated `kind` that a text of the command line means. Raises LlmqError as `check`."""
    for value in _readings(text):
        if admits(kind, value):
            return value
    raise LlmqError(f"{name} takes {wanted(kind)}, not {_shown(text)}")


def spelled(value: Any) -> Any:
    """Return a value of an option with its paths, alone or in a list, as texts."""
    if isinstance(value, list | tuple):
        return tuple(map(spelled, value))
    return str(value) if isinstance(value, Path) else value


def memory_size(name: str, text: str) -> int:
    """Return the bytes that `6GiB`, `6GB` or `500MB` means. Raises LlmqError, naming the option, for anything else."""
    found = _SIZE.fullmatch(text.strip())
    size = (
        0 if found is None else float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)
    )
    if not 1 <= size < 2**60:
        raise LlmqError(f"{name} takes a size such as 6GiB, 6GB or 500MB, not {_shown(text)}")
    return int(size)


def admits(kind: Any, value: Any, within: Between | None = None) -> bool:
    """Say whether `value` is of an annotated `kind`, a number within bounds."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return admits(args[0], value, args[1])
    if origin in (typing.Union, UnionType):
        return any(admits(a, value, within) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(admits(args[0], v) for v in value)
    if type(value) not in ((int, float) if kind is float else (NoneType if kind is None else kind,)) or value == "":
        return False
    bounds = within or Between(-MOST, MOST)
    return not isinstance(value, int | float) or bounds.least <= value <= bounds.most  # no NaN is


def wanted(kind: Any) -> str:
    """Return what an annotated `kind` admits, in words: `a whole number from 2 to 8 or none`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{wanted(args[0])} {args[1]}"
    if origin in (typing.Union, UnionType):
        return " or ".join(wanted(a) for a in args)
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return "a list of texts"
    return _PLAIN.get(NoneType if kind is None else kind, str(kind))


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), 80)
    except ValueError:  # Python prints no int of thousands of digits
        return "a number of thousands of digits"


def _readings(text: str) -> Iterator[Any]:
    """Yield what a text can mean, the narrowest first."""
    word = text.lower()
    if word in ("none", ""):
        yield None
    if word in _WORDS:
        yield _WORDS[word]
    for number in (int, float):
        try:
            yield number(text)
        except ValueError:
            continue
    yield text
