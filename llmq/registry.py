"""`"gptq:damp=0.01"` -> object. A folder is the registry: adding a method is adding a file.

    gptq:damp=0.01                           llmq/algorithms/gptq.py, the dataclass in it with damp=0.01
    int:bits=3:asym:range=[mse:norm=2.4]     llmq/grids/int.py; a bare `sym` or `asym` is sym=true or sym=false, and
                                             an option that is a range names one, in brackets if it has options too
    gguf:Q4_0                                a first value without a name is for the option that the class calls `bare`

`load("algorithms", "gptq:damp=0.01")` imports `llmq/algorithms/gptq.py`, takes the one public dataclass defined in it
and parses the options into its fields. One grammar serves the command line, recipes and `llmq list`. A dotted name
(`mypackage.module:option=1`) admits third-party files. Naming one runs it, so only the user may: it is looked at only
where the caller says so (`code=True`), and no text of a checkpoint gets there.

Not here: what an option may be (options.py), which texts are the user's (recipe.py).
"""

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

from llmq.errors import one_line, printable
from llmq.format import Format
from llmq.options import parse
from llmq.types import Grid, LlmqError, Range

_DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
_DUTIES: dict[str, type] = {
    "grids": Grid,
    "ranges": Range,
    "formats": Format,
}  # a step shows its kind by its base class
SHORT = {"formats": {"gptq_v2": "gptq:checkpoint_format=gptq_v2"}}
"""Names that stand for others with an option."""
_COLON = re.compile(r":(?![^\[\]]*\])")


def load(folder: str, text: str, *, code: bool = False) -> Any:
    """Return the object that `NAME[:key=value[:key=value...]]` names in `folder`; code: as for `find`.

    Raises LlmqError for an unknown name, option or value, naming what is possible.
    """
    name, *given = _words(folder, text)
    cls = find(folder, name, code=code)
    kinds = _options(cls)
    values = _values(_pairs(given, cls, kinds), kinds, f"{text!r}: {name}", code=code)
    with _blaming(repr(text)):
        return cls(**values)


def filled(obj: Any, options: Mapping[str, str], name: str) -> Any:
    """Return an object of a text with the options that the command line has beside it.

    name: what the text was, for messages. Raises LlmqError where both say one thing and disagree, and for an option
    that the object does not have.
    """
    kinds, values = _options(type(obj)), {}
    for key, text in options.items():
        if key not in kinds:
            raise LlmqError(f"{dashed(key)} means nothing here: {name} has no option {key!r}")
        values[key] = _value(dashed(key), text, kinds[key], code=True)
        said, default = getattr(obj, key), type(obj).__dataclass_fields__[key].default
        if said not in (default, values[key]):
            raise LlmqError(f"{dashed(key)} {text} and {name} disagree ({key}={said}); give one of them")
    with _blaming(name):
        return dataclasses.replace(obj, **values)


def dashed(name: str) -> str:
    """Return an option as the command line spells it."""
    return "--" + name.replace("_", "-")


def changed(obj: Any, options: Mapping[str, str], name: str) -> Any:
    """Return the object with the options that the user gives, texts by key.

    name: what holds them, for messages. Raises LlmqError for an option that there is not, and for an impossible value.
    """
    values = _values(options.items(), _options(type(obj)), name, code=True)
    with _blaming(name):
        return dataclasses.replace(obj, **values)


def _values(
    given: Iterable[tuple[str, str | None]], kinds: Mapping[str, Any], name: str, *, code: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in given:
        if text is None or key not in kinds:
            known = ", ".join(kinds) or "none"
            raise LlmqError(f"{name} has no option {key!r} (options, as key=value: {known})")
        if key in values:
            raise LlmqError(f"{name}: option {key} is given twice")
        values[key] = _value(f"{name}: option {key}", text, kinds[key], code=code)
    return values


def words(text: str) -> list[str]:
    """Return what colons part, the name first; those in brackets part nothing."""
    return _COLON.split(text.strip())


def taken(text: str, option: str) -> tuple[list[str], str]:
    """Return what a text gives an option, a first value without a name among it, and the text without that."""
    name, *given = words(text)
    said = [g for i, g in enumerate(given) if g.startswith(f"{option}=") or (i == 0 and "=" not in g)]
    return [g.removeprefix(f"{option}=").strip() for g in said], ":".join([name, *(g for g in given if g not in said)])


def _words(folder: str, text: str) -> list[str]:
    """Return the words of a text whose name may stand for another with an option."""
    name, *given = words(text)
    return [*words(SHORT.get(folder, {}).get(name, name)), *given]


def lacks(folder: str, text: str, option: str) -> bool:
    """Say whether what the user's text names takes an option that the text does not give."""
    name, *given = words(text)
    kinds = _options(find(folder, name, code=True))
    return option in kinds and all(_pair(g, kinds)[0] != option for g in given)


def _options(cls: type) -> dict[str, Any]:
    """Return what a text may give for a dataclass: its fields' annotations by name. Raises LlmqError as `load`."""
    with _blaming(cls.__module__):
        hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init and f.metadata.get("option", True)}


def _pairs(given: Sequence[str], cls: type, kinds: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Return options as keys and values; a first one that is a bare value is for the option that `cls.bare` names."""
    pairs = [_pair(option, kinds) for option in given]
    bare = getattr(cls, "bare", None)
    if bare and pairs and pairs[0][1] is None:
        pairs[0] = (bare, given[0].strip())
    return pairs


def _pair(option: str, kinds: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return an option as key and value; a boolean may stand alone, to be true, or false with an `a` before it."""
    key, sep, value = option.partition("=")
    key = key.strip().replace("-", "_")
    for bare, meant in ((key, "true"), (key.removeprefix("a"), "false")):
        if not sep and kinds.get(bare) is bool:
            return bare, meant
    return key, value.strip() if sep else None


def _value(name: str, text: str, kind: Any, *, code: bool) -> Any:
    """Return what a text means for an annotated kind; where that is a range or the like, it names one."""
    for folder, duty in _DUTIES.items():
        if duty in (kind, *typing.get_args(kind)) and text != "none":
            return load(folder, text.removeprefix("[").removesuffix("]"), code=code)
    return parse(name, text, kind)


def find(folder: str, name: str, *, code: bool = False) -> type:
    """Return the one public dataclass of `llmq/<folder>/<name>.py`.

    code: a dotted name is the user's own, and imported as a third-party module. Raises LlmqError for any other name.
    """
    if code and is_code(name):
        return _third_party(folder, name)
    module_name = name.replace("-", "_")
    if module_name not in names(folder):
        near = difflib.get_close_matches(module_name[:40], names(folder), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        there = ", ".join(names(folder))
        raise LlmqError(f"{printable(repr(name), 80)} is none of llmq's {folder} (there are: {there}){hint}")
    return _public_dataclass(importlib.import_module(f"llmq.{folder}.{module_name}"))


def is_code(text: str) -> bool:
    """Say whether `NAME[:key=value...]` names a module outside llmq, to be imported."""
    return "." in text.partition(":")[0]


def _third_party(folder: str, name: str) -> type:
    """Return the class of a dotted module. Raises LlmqError for whatever goes wrong in it, in one line."""
    if not _DOTTED.fullmatch(name) or name.startswith("llmq."):
        raise LlmqError(
            f"{printable(repr(name), 80)} is no third-party module; llmq's own {folder} are named without dots"
        )
    with _blaming(f"{name!r} cannot be imported"):
        cls = _public_dataclass(importlib.import_module(name))
    duty = _DUTIES.get(folder, object)
    named = (*vars(duty), *inspect.get_annotations(duty))
    if lacking := [n for n in named if not n.startswith("_") and not hasattr(cls, n)]:
        raise LlmqError(f"{name!r} is none of the {folder}: {cls.__name__} has no {', '.join(lacking)}")
    return cls


def _public_dataclass(module: ModuleType) -> type:
    classes = [
        c
        for _, c in inspect.getmembers(module, dataclasses.is_dataclass)
        if isinstance(c, type) and c.__module__ == module.__name__ and not c.__name__.startswith("_")
    ]
    if len(classes) != 1:
        raise LlmqError(f"{module.__name__} must define exactly one public dataclass, it has {len(classes)}")
    return classes[0]


class _blaming:  # noqa: N801  (used as a statement: `with _blaming(...)`)
    """Turn whatever a step raises while it is imported or made into one LlmqError; a third party may raise anything."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(e, Exception | SystemExit) and not isinstance(e, LlmqError):
            said = one_line(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {one_line(e)}"
            raise LlmqError(f"{self.what}: {said}") from e


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
    fields = {f.name: f.default for f in dataclasses.fields(find(folder, name))}
    kinds = _options(find(folder, name))
    return ":".join(f"{key}={fields[key]}" for key in kinds if fields[key] is not dataclasses.MISSING)


def dump(obj: Any) -> str:
    """Return the text that `load` would turn into `obj`, with the options that differ from their defaults."""
    name = type(obj).__module__.removeprefix("llmq.").partition(".")[2] or type(obj).__module__
    if not type(obj).__module__.startswith("llmq."):
        name = type(obj).__module__
    given = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if getattr(obj, f.name) != f.default}
    said = {key: f"[{dump(v)}]" if dataclasses.is_dataclass(v) else str(v) for key, v in given.items()}
    return ":".join([name, *(f"{key}={said[key]}" for key in _options(type(obj)) if key in said)])
