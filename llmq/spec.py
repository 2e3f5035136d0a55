"""`"gptq:damp=0.01"` -> object. A folder is the registry: adding a method is adding a file.

`load("algorithms", "gptq:damp=0.01")` imports `llmq/algorithms/gptq.py`, takes the one public dataclass defined in it
and parses the options into its fields. One grammar serves the command line, recipes and `llmq list`. A dotted name
(`mypackage.module:option=1`) admits third-party files; such names come from the user only, never from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

from llmq.types import LlmqError

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def load(folder: str, text: str) -> Any:
    """Return the object that `NAME[:key=value[:key=value...]]` names in `folder`.

    Raises LlmqError for an unknown name, option or value, naming what is possible.
    """
    name, *options = text.strip().split(":")
    cls = find(folder, name)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for option in options:
        key, sep, value = option.partition("=")
        key = key.strip().replace("-", "_")
        if not sep or key not in fields:
            known = ", ".join(fields) or "none"
            raise LlmqError(f"{text!r}: {name} has no option {key!r} (options, as key=value: {known})")
        values[key] = _parse(value.strip(), types[key], f"{text!r}: option {key}")
    try:
        return cls(**values)
    except ValueError as e:
        raise LlmqError(f"{text!r}: {e}") from e


def find(folder: str, name: str) -> type:
    """Return the one public dataclass of `llmq/<folder>/<name>.py` or of a dotted third-party module."""
    module_name = name.replace("-", "_")
    if "." not in name:
        if module_name not in names(folder):
            near = difflib.get_close_matches(module_name, names(folder), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            there = ", ".join(names(folder))
            raise LlmqError(f"{name!r} is none of llmq's {folder} (there are: {there}){hint}")
        module_name = f"llmq.{folder}.{module_name}"
    elif importlib.util.find_spec(module_name.partition(".")[0]) is None:
        raise LlmqError(f"{name!r}: no such Python module; install it or correct the name")
    module = importlib.import_module(module_name)
    classes = [
        c
        for _, c in inspect.getmembers(module, dataclasses.is_dataclass)
        if isinstance(c, type) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    if len(classes) != 1:
        raise LlmqError(f"{module_name} must define exactly one public dataclass, it has {len(classes)}")
    return classes[0]


def names(folder: str) -> list[str]:
    """Return the names that `folder` holds."""
    package = importlib.import_module(f"llmq.{folder}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def describe(folder: str) -> Iterator[tuple[str, str]]:
    """Yield each name in `folder` with the first line of its file's docstring."""
    for name in names(folder):
        doc = importlib.import_module(f"llmq.{folder}.{name}").__doc__ or ""
        yield name, doc.strip().partition("\n")[0]


def options(folder: str, name: str) -> str:
    """Return the options of a name with their defaults, as they are written: `damp=0.01:act_order=True`."""
    fields = dataclasses.fields(find(folder, name))
    return ":".join(f"{f.name}={f.default}" for f in fields if f.init and f.default is not dataclasses.MISSING)


def dump(obj: Any) -> str:
    """Return the text that `load` would turn into `obj`, with the options that differ from their defaults."""
    name = type(obj).__module__.removeprefix("llmq.").partition(".")[2] or type(obj).__module__
    if not type(obj).__module__.startswith("llmq."):
        name = type(obj).__module__
    changed = [
        f"{f.name}={getattr(obj, f.name)}"
        for f in dataclasses.fields(obj)
        if f.init and getattr(obj, f.name) != f.default
    ]
    return ":".join([name, *changed])


def _parse(value: str, kind: Any, where: str) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    for k in kinds:
        try:
            if k is type(None) and value.lower() in ("none", ""):
                return None
            if k is bool and value.lower() in _WORDS:
                return _WORDS[value.lower()]
            if k in (int, float):
                return k(value)
            if k is str:
                return value
        except ValueError:
            continue
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    raise LlmqError(f"{where} wants {wanted}, not {value!r}")
