"""compressed-tensors' integers: packed along K, or an int8 each.

pack-quantized (weights only, or with float8 activations), b bits:
    weight_packed      int32 [N, ceil(K*b/32)]   row n: codes of k = 0, 1, ... from the lowest bit on, dense
    weight_scale       float [N, G]              [1] for one scale per tensor
    weight_shape       int64 [2]                 N, K
    weight_zero_point  int32 [ceil(N*b/32), G]   asymmetric: packed along N;  int8 [1], unpacked, per tensor
int-quantized (weights and int8 activations):
    weight             int8  [N, K]
    weight_scale       float [N, G] or [1]
    weight_zero_point  int8, shaped as the scale   asymmetric
    input_scale        float [1]                   static activations

The library's integers are signed: w = scale * (q - zero_point) with q = code - 2^(b-1), zero_point = zero - 2^(b-1).
Packing adds 2^(b-1) back, so what is packed are the unsigned codes and zeros themselves. The dense packing of widths
that do not divide 32 is that of compressed-tensors 0.19 and later (0.17 put ten 3-bit codes in a word), vLLM 0.32.
Not here: which modules are stored so (_config_groups.py), what runtimes take of it (_ct_limits.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.formats import _common, _reading
from llmq.formats._bits import pack_words, unpack_words, width
from llmq.types import AffineGrid, LinearSpec, LlmqError, Params, QTensor

_NAME = "compressed-tensors"


def refuse(spec: LinearSpec) -> None:
    """Raise LlmqError for what is no integer grid, and for activations of other widths."""
    _common.int_grid(spec, _NAME)
    activation = spec.scheme.activation
    if activation is not None and activation.bits != 8:
        raise LlmqError(f"{spec.name}: activations have 8 bits in compressed-tensors, not {activation.bits}")
    if activation is not None and spec.scheme.static and not isinstance(activation, AffineGrid):
        raise LlmqError(f"{spec.name}: float8 activations of integer weights have scales per token; say fp8")


def layout(spec: LinearSpec) -> dict[str, Tensor]:
    """Return the meta tensors of one linear. Raises LlmqError where the group does not divide K."""
    grid, N, K, G = _common.int_grid(spec, _NAME), spec.N, spec.K, _common.groups(spec)

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    per_scale = grid.granularity.shape(N, K)
    tensors = {"weight_scale": meta(*per_scale, dtype=grid.scale_dtype)}
    packed = _packed(spec)
    if packed:
        tensors["weight_packed"] = meta(N, width(K, grid.bits), dtype=torch.int32)
        tensors["weight_shape"] = meta(2, dtype=torch.int64)
    else:
        tensors["weight"] = meta(N, K, dtype=torch.int8)
    if spec.scheme.static:
        tensors["input_scale"] = meta(1, dtype=grid.scale_dtype)
    if not grid.sym and packed and len(per_scale) == 2:
        tensors["weight_zero_point"] = meta(width(N, grid.bits), G, dtype=torch.int32)
    elif not grid.sym:
        tensors["weight_zero_point"] = meta(*per_scale, dtype=torch.int8)
    return tensors


def pack(q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
    """Return the tensors of one linear, scales in the dtype they have."""
    grid, shape = _common.int_grid(spec, _NAME), spec.scheme.weight.granularity.shape(spec.N, spec.K)
    half, params = 2 ** (grid.bits - 1), Params.of(q.params)
    scale, zero = (p[: shape[0]].reshape(shape) for p in (params.scale, params.zero))
    packed = _packed(spec)
    tensors = {"weight_scale": scale.contiguous()}
    if packed:
        tensors["weight_packed"] = pack_words(q.codes, grid.bits)
        tensors["weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
    else:
        tensors["weight"] = (q.codes - half).view(torch.int8)  # modulo 256, which is two's complement
    if not grid.sym:
        tensors["weight_zero_point"] = (
            pack_words(zero.t().to(torch.uint8), grid.bits).t().contiguous()
            if packed and len(shape) == 2
            else (zero - half).to(torch.int8)
        )
    if q.input is not None:
        tensors["input_scale"] = q.input.scale
    return tensors


def unpack(found: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
    """Invert `pack`. Raises LlmqError that names the tensor which holds what no weight can have."""
    grid, by = _common.int_grid(spec, _NAME), spec.scheme.weight.granularity
    half = 2 ** (grid.bits - 1)
    scale = found["weight_scale"].reshape(by.rows(spec.N), -1)
    if "weight" in found:
        codes = found["weight"].view(torch.uint8) + half
    else:
        codes = unpack_words(found["weight_packed"], grid.bits, spec.K)
        shape = found["weight_shape"].tolist() if "weight_shape" in found else [spec.N, spec.K]
        if shape != [spec.N, spec.K]:
            raise LlmqError(f"{spec.name}.weight_shape is {shape}, not {[spec.N, spec.K]}")
    zero = found.get("weight_zero_point")
    if zero is None:
        zero = torch.full(scale.shape, half, dtype=torch.int32, device=scale.device)
    elif "weight" in found or len(by.shape(spec.N, spec.K)) == 1:
        zero = zero.to(torch.int32).reshape(scale.shape) + half
    else:
        zero = unpack_words(zero.t(), grid.bits, spec.N).t().to(torch.int32).contiguous()
    params = Params(scale, zero).map(lambda p: p.expand(spec.N, -1).contiguous())
    static = None
    if "input_scale" in found:
        input_scale = found["input_scale"].reshape(1)
        static = Params(input_scale, torch.full((1,), 128, dtype=torch.int32, device=scale.device))
    return _reading.sound(QTensor(codes, params, grid, None, static), spec, "weight_scale", "weight_zero_point")


def _packed(spec: LinearSpec) -> bool:
    return not isinstance(spec.scheme.activation, AffineGrid)
