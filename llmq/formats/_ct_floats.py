"""compressed-tensors' small floats.

float-quantized (fp8):                    weight         float8_e4m3fn [N, K]
    for a row, a tensor, a block          weight_scale   float [N, 1], [1], [ceil(N/n), K/k]
    static activations                    input_scale    float [1]
mxfp8-quantized:                          weight         float8_e4m3fn [N, K]
                                          weight_scale   uint8 [N, K/32]           2^(byte - 127)
mxfp4-pack-quantized:                     weight_packed  uint8 [N, K/2]            the even column in the low half
                                          weight_scale   uint8 [N, K/32]
nvfp4-pack-quantized:                     weight_packed  uint8 [N, K/2]
                                          weight_scale   float8_e4m3fn [N, K/16]
                                          weight_global_scale  float32 [1]         divides the others
    activations                           input_global_scale   float32 [1]         divides theirs, found at run time

Source: compressed-tensors 0.20 (`NVFP4PackedCompressor`, `MXFP4PackedCompressor`, `MXFP8QuantizationCompressor`,
`FloatQuantizationCompressor`), which the tests hold it against byte for byte.
Not here: the tensors under other names (_minifloats.py), which modules are stored so (_config_groups.py).
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llmq.formats import _minifloats
from llmq.grids._float import FloatGrid
from llmq.grids.fp8 import Fp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor, RangedGrid

_NAME = "compressed-tensors"
_INPUT = {Fp8: "input_scale", Nvfp4: "input_global_scale"}


def refuse(spec: LinearSpec) -> None:
    """Raise LlmqError for activations that are no small floats."""
    activation = spec.scheme.activation
    if activation is not None and not isinstance(activation, FloatGrid):
        raise LlmqError(f"{spec.name}: {_NAME} holds no integer activations of float weights; say --inputs fp8")


def layout(spec: LinearSpec) -> dict[str, Tensor]:
    """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
    grid = _minifloats.float_grid(spec, _NAME)
    codes, scales = _minifloats.layout(spec, grid)
    tensors = {_codes(grid): codes, "weight_scale": scales}
    if isinstance(grid, Nvfp4):
        tensors["weight_global_scale"] = _minifloats.one()
    activation = spec.scheme.activation
    if spec.scheme.static and activation is not None:
        dtype = {"dtype": activation.scale_dtype} if isinstance(activation, Fp8) else {}
        tensors[_input(activation)] = _minifloats.one(**dtype)
    return tensors


def pack(q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Return the tensors of one linear, scales in the dtype they have."""
    grid, params = _minifloats.float_grid(spec, _NAME), FloatParams.of(q.params)
    codes, scales = _minifloats.stored(q, spec)
    tensors = {_codes(grid): codes, "weight_scale": scales}
    if params.divisor is not None:
        tensors["weight_global_scale"] = params.divisor[0].contiguous()
    activation = spec.scheme.activation
    if q.input is not None and activation is not None:
        fixed = FloatParams.of(q.input)
        tensors[_input(activation)] = fixed.scale if fixed.divisor is None else fixed.divisor
    return tensors


def unpack(found: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
    """Invert `pack`. Raises LlmqError that names the tensor which holds what no weight can have."""
    grid, activation = _minifloats.float_grid(spec, _NAME), spec.scheme.activation
    divisor = found["weight_global_scale"].reshape(1) if "weight_global_scale" in found else None
    q = _minifloats.restored(found[_codes(grid)], found["weight_scale"], spec, grid, divisor)
    names = {"codes": _codes(grid), "scale": "weight_scale", "divisor": "weight_global_scale"}
    if activation is not None and (name := _input(activation)) in found:
        one = found[name].reshape(1)
        fixed = FloatParams(one) if isinstance(activation, Fp8) else FloatParams(1 / one, divisor=one)
        q, names["input"] = replace(q, input=fixed), name
    return _minifloats.sound(q, spec, names)


def _codes(grid: FloatGrid) -> str:
    return "weight_packed" if grid.bits == 4 else "weight"


def _input(activation: RangedGrid) -> str:
    return _INPUT.get(type(activation), "")
