"""compressed-tensors' `config_groups`: which scheme the modules of a checkpoint have, read and written.

    {"group_0": {"targets": ["Linear", "re:.*up_proj$", "lm_head"], "format": "pack-quantized",
                 "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128},
                 "input_activations": null}, ...}

Not here: the tensors, and the rest of the config (compressed_tensors.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.errors import printable
from llmq.formats import _common, _reading
from llmq.granularity import PerRow
from llmq.grids.int import Int
from llmq.guard.reading import field
from llmq.types import Arguments, LinearSpec, LlmqError, RangedGrid, Scheme

_FLOATS = {  # what a format's name says of weights that are no integers
    "float-quantized": "FP8",
    "naive-quantized": "FP8",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp6-pack-quantized": "MXFP6",
    "mxfp8-quantized": "MXFP8",
}
_INTEGERS = "integers of 2 to 8 bits per group, channel or tensor, in the original column order"


@dataclass(frozen=True)
class Group:
    """A config group: its name and scheme, and the dict it came from, whose other keys (observer, ...) are kept."""

    name: str
    scheme: Scheme
    source: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """Return the dict that says the scheme, with the keys of the one it came from."""
        weights, inputs = args_of(self.scheme)
        if weights["strategy"] != "group":
            del weights["group_size"]  # None or -1, as the source has it
        known: dict[str, Any] = {"weights": _update(self.source["weights"], weights), "format": format_of(self.scheme)}
        if inputs is not None:
            known["input_activations"] = _update(self.source["input_activations"], inputs)
        return _update(self.source, known)


class Lookup:
    """The scheme of a linear by its name: ignored, exact target, `re:` target, "Linear", in this order.

    As compressed_tensors.utils.match.match_targets, names and patterns each in alphabetical order.
    """

    def __init__(self, groups: Sequence[Group], ignore: Sequence[str]) -> None:
        self.targets = {target: group.scheme for group in groups for target in group.source["targets"]}
        self.patterns = _patterns(sorted(self.targets))
        self.ignored = set(ignore)
        self.ignored_patterns = _patterns(ignore)

    def __call__(self, name: str) -> Scheme | None:
        if not self.ignored.isdisjoint((name, "Linear")) or self.ignored_patterns.first(name) is not None:
            return None
        if name in self.targets:
            return self.targets[name]
        return self.targets.get(self.patterns.first(name) or "Linear")


def _patterns(targets: Sequence[str]) -> _reading.Patterns:
    return _reading.Patterns({t: t.removeprefix("re:") for t in targets if t.startswith("re:")})


def _update(source: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return `source` with the values of `known` for the keys that it has."""
    return {k: known.get(k, v) for k, v in source.items()}


def format_of(scheme: Scheme) -> str:
    """Return the name of the way in which a linear of that scheme is stored."""
    return "pack-quantized" if scheme.activation is None else "int-quantized"


def args_of(scheme: Scheme) -> tuple[Arguments, Arguments | None]:
    """Return the arguments of the weights and of the input activations."""
    return dict(scheme.weight.args() or {}), None if scheme.activation is None else _input_args(scheme.activation)


def _input_args(grid: RangedGrid) -> Arguments:
    """Return the arguments of activations; a scale for each of their rows is one per token, found at run time."""
    args = grid.args() or {}
    return args | ({"strategy": "token", "dynamic": True} if args["strategy"] == PerRow.strategy else {})


def same_scheme(a: Scheme | None, b: Scheme) -> bool:
    """Return whether two linears have one scheme in the eyes of the file."""
    return a is not None and args_of(a) == args_of(b)


def new_groups(linears: Sequence[LinearSpec]) -> tuple[Group, ...]:
    """Return a group for each scheme, in the order they appear; the only one targets every Linear, and the head."""
    members: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        members.setdefault(str(args_of(spec.scheme)), []).append(spec)
    groups: list[Group] = []
    for specs in members.values():
        weights, inputs = args_of(specs[0].scheme)
        outside = [s.name for s in specs if _common.block_path(s.name) is None]
        targets = ["Linear", *outside] if len(members) == 1 else [s.name for s in specs]
        source = {"targets": targets, "weights": weights, "input_activations": inputs}
        source |= {"output_activations": None, "format": None}
        groups.append(Group(f"group_{len(groups)}", specs[0].scheme, source))
    return tuple(groups)


def read_group(name: str, group: Any, config: Mapping[str, Any]) -> Group:
    """Parse one config group. Raises LlmqError for what llmq does not read, naming it."""
    where = f"config_groups.{printable(name, 80)}"
    if not isinstance(group, dict) or not group.get("weights") or not group.get("targets"):
        raise LlmqError(f"quantization_config.{where} lacks targets or weight arguments; {_reading.REQUANTIZE}")
    for target in _reading.strings(group, "targets"):
        if target[:1].isupper() and target != "Linear":
            said = f"targets {printable(target, 80)} modules; llmq reads Linear ones"
            raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    if group.get("output_activations"):
        said = "quantizes outputs, which llmq does not read"
        raise LlmqError(f"quantization_config.{where} {said}; {_reading.REQUANTIZE}")
    stored = _reading.optional(group, "format", str, _reading.optional(config, "format", str, ""))
    weights = field(group, "weights", dict, f"quantization_config.{where}")
    if weights.get("type") == "float":
        said = f"holds {_FLOATS.get(stored, 'float')} weights ({printable(stored, 40)}), which vLLM runs; llmq reads"
        raise LlmqError(f"quantization_config.{where} {said} {_INTEGERS}: {_reading.REQUANTIZE}")
    inputs = _reading.optional(group, "input_activations", dict, {})
    scheme = Scheme(_read_weights(weights, f"{where}.weights"), _read_inputs(inputs, f"{where}.input_activations"))
    _reading.need({"format": stored}, "format", (format_of(scheme),), f"{where} is stored in another way")
    return Group(name, scheme, group)


def _read_weights(args: Mapping[str, Any], where: str) -> Int:
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    _only(args, {"symmetric": (True, False), "num_bits": tuple(range(2, 9))}, where, _INTEGERS)
    _only({"strategy": strategy}, {"strategy": ("tensor", "channel", "group")}, where, _INTEGERS)
    group = _reading.group_of(args) if strategy == "group" else strategy
    grid = Int(_reading.optional(args, "num_bits", int, 8), _reading.optional(args, "symmetric", bool, True), group)
    # another actorder would come with a weight_g_idx
    possible = _as_in(grid.args(), ("type", "dynamic")) | {"actorder": (False, "weight", "static")}
    _only(args, possible, where, _INTEGERS)
    return grid


def _read_inputs(args: Mapping[str, Any], where: str) -> Int | None:
    if not args:
        return None
    dynamic = args.get("dynamic") is True
    grid = Int(8, args.get("symmetric") is not False or not dynamic, "channel" if dynamic else "tensor")
    possible = _as_in(_input_args(grid), ("num_bits", "type", "dynamic", "symmetric", "strategy"))
    _only(args, possible, where, "int8, per token dynamic or symmetric per tensor static")
    return grid


def _as_in(args: Arguments, keys: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return what some arguments of a grid may be, once it is read: what the grid says of them."""
    return {key: (args[key],) for key in keys}


def _only(args: Mapping[str, Any], possible: Mapping[str, Sequence[Any]], where: str, reads: str) -> None:
    """Raise LlmqError for an argument that is given and none of those possible (nor of their type: 4.0 is no 4)."""
    for key, values in possible.items():
        given = args.get(key)
        if given is not None and not any(type(given) is type(v) and given == v for v in values):
            said = f"{where}.{key} is {printable(repr(given), 80)}; llmq reads {reads}"
            raise LlmqError(f"quantization_config.{said}: {_reading.REQUANTIZE}")
