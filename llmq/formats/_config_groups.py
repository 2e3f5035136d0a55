"""compressed-tensors' `config_groups`: which scheme the modules of a checkpoint have, read and written.

    {"group_0": {"targets": ["Linear", "re:.*up_proj$", "lm_head", "Embedding"], "format": "pack-quantized",
                 "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128},
                 "input_activations": null}, ...}

Embeddings are targeted by their class: vLLM gives those of many models no name.
Not here: what the arguments mean (_ct_arguments.py), the tensors, and the rest of the config (compressed_tensors.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.errors import printable
from llmq.formats import _common, _reading
from llmq.formats._ct_arguments import args_of, format_of, read_scheme, stored_as
from llmq.guard.reading import field
from llmq.types import LinearSpec, LlmqError, Scheme

LINEAR, EMBEDDING = "Linear", "Embedding"
"""The classes that a target may name."""


@dataclass(frozen=True)
class Group:
    """A config group: its name and scheme, and the dict it came from, whose other keys (observer, ...) are kept.

    format: how it is stored, in the name that it came with.
    """

    name: str
    scheme: Scheme
    source: Mapping[str, Any]
    format: str

    def config(self) -> dict[str, Any]:
        """Return the dict that says the scheme, with the keys of the one it came from."""
        weights, inputs = args_of(self.scheme)
        if weights["group_size"] is None:
            del weights["group_size"]  # None or -1, as the source has it
        known: dict[str, Any] = {"weights": _update(self.source["weights"], weights), "format": self.format}
        if inputs is not None:
            known["input_activations"] = _update(self.source["input_activations"], inputs)
        return _update(self.source, known)


class Lookup:
    """The scheme of a module by its name: ignored, exact target, `re:` target, its class, in this order.

    As compressed_tensors.utils.match.match_targets, names and patterns each in alphabetical order.
    """

    def __init__(self, groups: Sequence[Group], ignore: Sequence[str]) -> None:
        self.targets = {target: group.scheme for group in groups for target in group.source["targets"]}
        self.patterns = _patterns(sorted(self.targets))
        self.ignored = set(ignore)
        self.ignored_patterns = _patterns(ignore)

    def __call__(self, name: str, kind: str = LINEAR) -> Scheme | None:
        if not self.ignored.isdisjoint((name, kind)) or self.ignored_patterns.first(name) is not None:
            return None
        if name in self.targets:
            return self.targets[name]
        return self.targets.get(self.patterns.first(name) or kind)


def _patterns(targets: Sequence[str]) -> _reading.Patterns:
    return _reading.Patterns({t: t.removeprefix("re:") for t in targets if t.startswith("re:")})


def _update(source: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `source` with the values of `known` for the keys that it has."""
    return {k: known.get(k, v) for k, v in source.items()}


def new_groups(linears: Sequence[LinearSpec]) -> tuple[Group, ...]:
    """Return a group for each scheme, in the order they appear; where blocks have one alone, it targets every Linear.

    What lies outside the blocks is named, but for embeddings.
    """
    members: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        members.setdefault(str(args_of(spec.scheme)), []).append(spec)
    alone = sum(any(map(_in_block, specs)) for specs in members.values()) == 1
    groups: list[Group] = []
    for specs in members.values():
        weights, inputs = args_of(specs[0].scheme)
        targets = dict.fromkeys(_target(s, alone=alone) for s in specs)
        source = {"targets": list(targets), "weights": weights, "input_activations": inputs}
        source |= {"output_activations": None, "format": None}
        groups.append(Group(f"group_{len(groups)}", specs[0].scheme, source, format_of(specs[0].scheme)))
    return tuple(groups)


def _target(spec: LinearSpec, *, alone: bool) -> str:
    if spec.embedding:
        return EMBEDDING
    return LINEAR if alone and _in_block(spec) else spec.name


def _in_block(spec: LinearSpec) -> bool:
    return _common.block_path(spec.name) is not None


def read_group(name: str, group: Any, config: Mapping[str, Any]) -> Group:
    """Parse one config group. Raises LlmqError for what llmq does not read, naming it."""
    where = f"config_groups.{printable(name, 80)}"
    if not isinstance(group, dict) or not group.get("weights") or not group.get("targets"):
        raise LlmqError(f"quantization_config.{where} lacks targets or weight arguments; {_reading.REQUANTIZE}")
    for target in _reading.strings(group, "targets"):
        if target[:1].isupper() and target not in (LINEAR, EMBEDDING):
            said = f"targets {printable(target, 80)} modules; llmq reads Linear and Embedding ones"
            raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    if group.get("output_activations"):
        said = "quantizes outputs, which llmq does not read"
        raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    stored = _reading.optional(group, "format", str, _reading.optional(config, "format", str, ""))
    weights = field(group, "weights", dict, f"quantization_config.{where}")
    inputs = _reading.optional(group, "input_activations", dict, {})
    scheme = read_scheme(weights, inputs, stored, where)
    return Group(name, scheme, group, stored_as(stored, scheme))
