"""compressed-tensors' arguments: how a config group describes the grids of a scheme, and the `format` it is stored in.

    {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128, "dynamic": false}
    {"num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group", "group_size": 16, ...}

Of activations: strategy "token" and dynamic where scales are found at run time; "tensor" where calibration fixes one;
dynamic "local" where it fixes a divisor of them (NVFP4).
Not here: which modules have a scheme (_config_groups.py), the tensors (_ct_integers.py, _ct_floats.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmq.errors import printable
from llmq.formats import _reading
from llmq.granularity import PerRow
from llmq.grids._float import FloatGrid
from llmq.grids.fp8 import Fp8
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.types import AffineGrid, Arguments, LlmqError, RangedGrid, Scheme

_OF_FLOATS: dict[type, str] = {
    Fp8: "float-quantized",
    Nvfp4: "nvfp4-pack-quantized",
    Mxfp4: "mxfp4-pack-quantized",
    Mxfp8: "mxfp8-quantized",
}
_ONE_GRID: dict[str, Callable[[], FloatGrid]] = {
    "nvfp4-pack-quantized": Nvfp4,
    "mxfp4-pack-quantized": Mxfp4,
    "mxfp8-quantized": Mxfp8,
}
_SAME = {"naive-quantized": "float-quantized"}  # the library's name of the same bytes where weights alone are float8
_INTEGERS = "integers of 2 to 8 bits per group, channel or tensor, in the original column order"
_FLOATS = "FP8 per tensor, channel or block, NVFP4, MXFP4 and MXFP8"


def format_of(scheme: Scheme) -> str:
    """Return the name of the way in which a linear of that scheme is stored."""
    if isinstance(scheme.weight, FloatGrid):
        return _OF_FLOATS[type(scheme.weight)]
    return "int-quantized" if isinstance(scheme.activation, AffineGrid) else "pack-quantized"


def stored_as(name: str, scheme: Scheme) -> str:
    """Return `name`, a `format` of a file, where it says what `format_of` does of a scheme, else that."""
    own = format_of(scheme)
    return name if _SAME.get(name) == own else own


def args_of(scheme: Scheme) -> tuple[Arguments, Arguments | None]:
    """Return the arguments of the weights and of the input activations."""
    return dict(scheme.weight.args() or {}), None if scheme.activation is None else _input_args(scheme.activation)


def _input_args(grid: RangedGrid) -> Arguments:
    """Return the arguments of activations; a scale for each of their rows is one per token, found at run time."""
    args = grid.args() or {}
    if args["strategy"] == PerRow.strategy:
        return args | {"strategy": "token", "dynamic": True}
    if args["strategy"] == "tensor_group":
        return args | {"dynamic": "local"}
    return args | {"dynamic": not grid.static}


def same_scheme(a: Scheme | None, b: Scheme) -> bool:
    """Return whether two linears have one scheme in the eyes of the file."""
    return a is not None and args_of(a) == args_of(b)


def read_scheme(weights: Mapping[str, Any], inputs: Mapping[str, Any], stored: str, where: str) -> Scheme:
    """Return the scheme that arguments describe. stored: the `format`. where: the key of the group, for messages.

    Raises LlmqError, naming the argument, for what llmq does not read.
    """
    floats = weights.get("type") == "float"
    if floats and stored not in (*_SAME, *_OF_FLOATS.values()):
        said = f"holds float weights stored as {printable(repr(stored), 40)}; llmq reads"
        raise LlmqError(f"quantization_config.{where} {said} {_INTEGERS}, {_FLOATS}: {_reading.REQUANTIZE}")
    at = f"{where}.weights"
    weight = _read_floats(weights, stored, at) if floats else _read_integers(weights, at)
    scheme = Scheme(weight, _read_inputs(inputs, isinstance(weight, Mxfp8), f"{where}.input_activations"))
    _reading.need({"format": stored}, "format", (stored_as(stored, scheme),), f"{where} is stored in another way")
    return scheme


def _read_integers(args: Mapping[str, Any], where: str) -> Int:
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


def _read_floats(args: Mapping[str, Any], stored: str, where: str) -> FloatGrid:
    grid = _ONE_GRID[stored]() if stored in _ONE_GRID else Fp8(_group_of_fp8(args, where))
    possible = {key: (value,) for key, value in (grid.args() or {}).items() if value is not None}
    _only(args, possible | {"actorder": (False, "weight", "static")}, where, _FLOATS)
    return grid


def _group_of_fp8(args: Mapping[str, Any], where: str) -> int | str:
    """Return what shares a scale, as `Fp8` takes it."""
    strategy = args.get("strategy") or "tensor"
    _only({"strategy": strategy}, {"strategy": ("tensor", "channel", "block", "group")}, where, _FLOATS)
    if strategy == "group":
        return _reading.group_of(args)
    if strategy != "block":
        return str(strategy)
    block = _reading.optional(args, "block_structure", list, [], f"quantization_config.{where}")
    if len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        said = f"block_structure is {printable(repr(block), 80)}, not two sizes; correct it"
        raise LlmqError(f"quantization_config.{where}.{said}")
    return f"{block[0]}x{block[1]}"


def _read_inputs(args: Mapping[str, Any], mx: bool, where: str) -> RangedGrid | None:
    """Return the grid of activations, None where there are no arguments. mx: whether the weights are MXFP8."""
    if not args:
        return None
    dynamic = args.get("dynamic") is True
    if args.get("type") == "float":
        grid, reads = _float_inputs(args, mx), f"{_FLOATS} per token, per group of a token or per tensor static"
        possible = {key: (value,) for key, value in _input_args(grid).items() if value is not None}
    else:
        grid = Int(8, args.get("symmetric") is not False or not dynamic, "channel" if dynamic else "tensor")
        reads = "int8, per token dynamic or symmetric per tensor static"
        possible = _as_in(_input_args(grid), ("num_bits", "type", "dynamic", "symmetric", "strategy"))
    _only(args, possible, where, reads)
    return grid


def _float_inputs(args: Mapping[str, Any], mx: bool) -> RangedGrid:
    """Return the grid of small floats that is nearest to the arguments of activations."""
    strategy = args.get("strategy")
    if args.get("num_bits") == 4:
        return Nvfp4() if strategy == "tensor_group" else Mxfp4()
    if strategy == "group" and args.get("group_size") == 32 and (mx or args.get("scale_dtype") == "torch.uint8"):
        return Mxfp8()
    if strategy == "group":
        return Fp8(_reading.group_of(args))
    return Fp8("channel" if args.get("dynamic") is True else "tensor")


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
