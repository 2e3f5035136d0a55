"""What the integer formats share in reading a peer's checkpoint: its config by type, its patterns, its tensors.

A file may lie. Fields are taken by their type, patterns get a time limit, and of the tensors all is checked that
changes a weight: shapes, dtypes, group ids, zeros and scales. What follows from the rest is not demanded.

Every refusal is one line that names the key or the tensor.
Not here: refusals before writing (_common.py), bytes (_bits.py), where a config lies (checkpoint/dialects.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmq.checkpoint.stored import checked as checked  # noqa: PLC0414, what formats read by
from llmq.errors import printable
from llmq.guard.patterns import Limit, Pattern
from llmq.guard.reading import field
from llmq.types import LinearSpec, LlmqError, Params, QTensor

CONFIG = "quantization_config"
DAMAGED = "which no weight can have: the checkpoint is damaged or was cast; download or quantize it again"
REQUANTIZE = "quantize the float model again"
_ALTER = ("bits", "group_size", "sym", "desc_act", "pack_dtype")  # what a rule of `dynamic` can change on disk
T = TypeVar("T")


class Patterns:
    """Regular expressions of a config, each by what it stands for, matched from the start of a name.

    They have one limit of time together (guard/patterns.py).
    """

    def __init__(self, patterns: Mapping[str, str]) -> None:
        limit = Limit()
        self._patterns = {key: Pattern(text, f"{CONFIG}: {key!r}", limit) for key, text in patterns.items()}

    def first(self, name: str) -> str | None:
        """Return the first key whose pattern matches. Raises LlmqError where that takes too long."""
        return next((key for key, pattern in self._patterns.items() if pattern.match(name)), None)


def optional(config: Mapping[str, Any], key: str, kind: type[T], default: T, where: str = CONFIG) -> T:
    """Return `config[key]`, `default` where it is missing or null. Raises LlmqError where it is of another type."""
    return default if config.get(key) is None else field(config, key, kind, where)


def strings(config: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of strings, empty where it is missing or null. Raises LlmqError for anything else."""
    found = optional(config, key, list, [])
    if not all(isinstance(x, str) for x in found):
        raise LlmqError(f"{CONFIG}.{key} must be a list of strings; correct it")
    return found


def need(config: Mapping[str, Any], key: str, possible: Sequence[Any], remedy: str = REQUANTIZE) -> Any:
    """Return `config[key]`. Raises LlmqError unless it is one of `possible`, and of its type (4.0 is no 4)."""
    value = config.get(key)
    if not any(type(value) is type(p) and value == p for p in possible):
        said = f"is {printable(repr(value), 80)}" if key in config else "is missing"
        expected = ", ".join(str(p) for p in possible)
        raise LlmqError(f"{CONFIG}.{key} {said}; llmq reads {expected}: {remedy}")
    return value


def group_of(config: Mapping[str, Any]) -> int | str:
    """Return `group_size`, "channel" for the -1 that says so on disk. Raises LlmqError for anything else."""
    size = config.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < -1 or size == 0:
        raise LlmqError(
            f"{CONFIG}.group_size is {printable(repr(size), 80)}; it must be positive, or -1 for per channel"
        )
    return "channel" if size == -1 else size


def rules_of(config: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return GPTQModel's `dynamic` rules: pattern to changes, `-:` before the patterns of what stays float.

    Raises LlmqError for a rule that changes a scheme; one that repeats the scheme is as good as none.
    """
    rules = optional(config, "dynamic", dict, {})
    for rule in (r for r in rules if not r.startswith("-:")):
        changes = optional(rules, rule, dict, {}, f"{CONFIG}.dynamic")
        if any(key in changes and changes[key] != config.get(key) for key in _ALTER):
            raise LlmqError(
                f"{CONFIG}.dynamic[{printable(rule, 80)!r}] gives some modules another scheme, which llmq does not "
                f"read from {method}; quantize again with --format compressed-tensors"
            )
    return dict(rules)


def rule_patterns(rules: Iterable[str]) -> Patterns:
    """Return the patterns of `dynamic`; the first that matches a name decides."""
    return Patterns({rule: rule.removeprefix("-:").removeprefix("+:") for rule in rules})


def sound(q: QTensor, spec: LinearSpec, scale: str, zero: str) -> QTensor:
    """Return `q`. Raises LlmqError, naming the tensor, where a scale is 0 or not finite or a zero is no code.

    scale, zero: the tensors' local names.
    """
    params = Params.of(q.params)
    scales, zeros = params.scale, params.zero
    for name, values, good in (
        (scale, scales, scales.isfinite() & (scales != 0)),
        (zero, zeros, (zeros >= 0) & (zeros < 2**q.grid.bits)),
    ):
        if not bool(good.all()):
            row, group = (~good).nonzero()[0].tolist()
            raise LlmqError(f"{spec.name}.{name}: row {row}, group {group} is {values[row, group].item()}, {DAMAGED}")
    if q.input is not None and not bool((q.input.scale.isfinite() & (q.input.scale > 0)).all()):
        raise LlmqError(
            f"{spec.name}.input_scale is {q.input.scale.tolist()}, no scale: the checkpoint is damaged or was cast; "
            "download or quantize it again"
        )
    return q


def group_ids(g_idx: Tensor, G: int, spec: LinearSpec) -> Tensor:
    """Return `g_idx` `[K]` as int32.

    Raises LlmqError where it names a group that is not there (0 to G - 1 are), or a group has not `group_size` columns
    (the last one: what is left).
    """
    damaged = "the checkpoint is damaged; download or quantize it again"
    bad = ((g_idx < 0) | (g_idx >= G)).nonzero()
    if len(bad):
        column = int(bad[0])
        said = f"column {column} is in group {int(g_idx[column])}, of groups 0 to {G - 1}"
        raise LlmqError(f"{spec.name}.g_idx: {said}: {damaged}")
    size = spec.scheme.weight.granularity.columns(spec.K)
    columns = torch.bincount(g_idx, minlength=G).tolist()
    for group, n in enumerate(columns):
        whole = size if group < G - 1 else spec.K - size * (G - 1)
        if n != whole:
            raise LlmqError(f"{spec.name}.g_idx: group {group} has {n} columns, not {whole}: {damaged}")
    return g_idx.to(torch.int32)
