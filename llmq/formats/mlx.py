"""MLX: what mlx-lm loads on a Mac, and on Linux with `mlx[cpu]`: affine integers, MXFP4, MXFP8 and NVFP4.

mode        tensors of a linear                                          w[n, k], g = k // group
affine      weight  uint32 [N, K*b/32]   codes of a row, low bits first   scales[n, g] * code[n, k] + biases[n, g]
            scales, biases  float [N, G]                                 2, 3, 4, 5, 6, 8 bits; group 32, 64, 128
mxfp4       weight  uint32 [N, K/8]      E2M1, the even column lowest     2^(scales - 127) * value(code)
            scales  uint8  [N, K/32]
mxfp8       weight  uint32 [N, K/4]      E4M3                             the same
nvfp4       weight  uint32 [N, K/8]      E2M1                             E4M3(scales) * value(code)
            scales  uint8  [N, K/16]

An integer grid has biases = -(zero * scale), rounded to the dtype of the scales: exact where zero is a power of two,
as it is on every symmetric grid; else off by half a unit of the last digit of the bias ("minimum rounded"). MLX holds
scales of any sign. NVFP4's divisor has no place: a weight whose scales need one is refused.

config.json has `quantization`: {"group_size", "bits", "mode"} for most, and an entry by the module's name, of the same
three or false, for what differs; `quantization_config` is its copy. mlx-lm looks for rotary embedding under the keys
that transformers had before 5 (`rope_theta`, `rope_scaling`), which are written beside `rope_parameters`.
Source: mlx-lm 0.32 `utils.load_model`, mlx 0.32 `mx.quantize`; the tests hold both against `mx.dequantize` bit by bit.
Not here: what lies around the weights (_folder.py), grids (grids/).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmq.errors import printable
from llmq.format import Assignment, FloatModel, Wanted
from llmq.formats import _common, _minifloats, _reading
from llmq.formats._bits import pack_words, unpack_words
from llmq.formats._folder import Folder
from llmq.grids._biased import Biased
from llmq.grids._float import FloatGrid
from llmq.grids.int import Int
from llmq.grids.mxfp4 import Mxfp4
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.readers import Reader, table
from llmq.types import FloatParams, GgmlParams, LinearSpec, LlmqError, Params, QTensor, Scheme

_NAME = "mlx"
_BITS, _SIZES = (2, 3, 4, 5, 6, 8), (128, 64, 32)
_FLOATS: dict[str, type[FloatGrid]] = {"mxfp4": Mxfp4, "mxfp8": Mxfp8, "nvfp4": Nvfp4}
_NAMES = {"codes": "weight", "scale": "scales", "divisor": "scales", "input": "scales"}
_READERS = table(("MLX", True, "", "ran"))


@dataclass
class MLX(Folder):
    """The checkpoint format of mlx-lm.

    source: the `quantization` that was read, kept while it still says what each module becomes.
    """

    inputs = False
    quant_method: str = field(default=_NAME, init=False)
    source: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype: beside floats of another one mlx computes in float32."""
        return model_dtype

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what mlx does not compute with. Raises LlmqError."""
        _common.refuse_none(linears)
        for spec in linears:
            _mode(spec)
            grid = spec.scheme.weight
            if isinstance(grid, Int) and not (grid.sym or grid.minima):
                raise LlmqError(f"{spec.name}: --choices of asymmetric integers go not with mlx; leave asym out")
            if spec.scheme.activation is not None:
                raise LlmqError(f"{spec.name}: mlx holds no quantized activations; use --format compressed-tensors")
        _common.refuse_misfits(linears, self.misfit)
        return []

    def assign(self, model: FloatModel, wanted: Wanted) -> Assignment:
        """See `Folder.assign`; integers are solved for with the minima that the file will hold."""
        assigned = super().assign(model, wanted)
        return replace(assigned, schemes={n: _stored(s) for n, s in assigned.schemes.items()})

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return list(_READERS)

    def holding(self, spec: LinearSpec) -> LinearSpec:
        """See `Folder.holding`: groups of the largest of 128, 64 and 32 columns that divide the source's."""
        grid = spec.scheme.weight
        if isinstance(grid, Nvfp4):
            return replace(spec, scheme=Scheme(replace(grid, divisor=1.0)))
        if not isinstance(grid, Int):
            return replace(spec, scheme=Scheme(grid))
        columns = grid.granularity.columns(spec.K)
        size = next((s for s in _SIZES if columns % s == 0), None)
        if size is None:
            raise LlmqError(f"{spec.name}: {grid.granularity} is no multiple of 32, 64 or 128 columns, as mlx has them")
        return replace(spec, scheme=_stored(Scheme(replace(grid, group=size))))

    def doubtful(self, spec: LinearSpec) -> bool:
        """See `Folder.doubtful`: NVFP4 may have a divisor."""
        return isinstance(spec.scheme.weight, Nvfp4)

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of one linear."""
        grid, G = spec.scheme.weight, _common.groups(spec)
        words = torch.empty(spec.N, spec.K * grid.bits // 32, dtype=torch.uint32, device="meta")
        if isinstance(grid, FloatGrid):
            return {"weight": words, "scales": torch.empty(spec.N, G, dtype=torch.uint8, device="meta")}
        scales = torch.empty(spec.N, G, dtype=getattr(grid, "scale_dtype", torch.float16), device="meta")
        return {"weight": words, "scales": scales, "biases": scales}

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear. Raises LlmqError for activation order, and for scales with a divisor."""
        if q.g_idx is not None:
            raise LlmqError("mlx has no weights in activation order (g_idx); leave desc_act out")
        words = pack_words(q.codes, q.grid.bits).view(torch.uint32)
        if isinstance(q.params, FloatParams):
            return {"weight": words, "scales": _bits(q.params)}
        scale = q.params.scale.contiguous()
        if isinstance(q.params, Params):
            biases = (-q.params.zero.float() * scale.float()).to(scale.dtype)
        else:
            biases = GgmlParams.of(q.params).tensors()["offset"].contiguous()
        return {"weight": words, "scales": scale, "biases": biases}

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`; integers come back with the biases that are stored. Raises LlmqError that names the tensor."""
        found = _reading.checked(tensors, self.layout(spec), spec)
        grid = spec.scheme.weight
        if isinstance(grid, FloatGrid):
            divisor = torch.ones(1) if isinstance(grid, Nvfp4) else None
            q = _minifloats.restored(_bytes(found["weight"]), found["scales"], spec, grid, divisor)
            return _minifloats.sound(q, spec, _NAMES)
        codes = unpack_words(found["weight"].view(torch.int32), grid.bits, spec.K)
        for name in ("scales", "biases"):
            if not bool(found[name].isfinite().all()):
                raise LlmqError(f"{spec.name}.{name} holds NaN or Inf, {_reading.DAMAGED}")
        params = GgmlParams(found["scales"], found["biases"])
        return QTensor(codes, params, Biased(grid.bits, spec.K // params.scale.shape[1]))

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization`; one that was read is kept where it still holds."""
        said = {s.name: _mode(s) for s in linears}
        if self.source is not None and self._says(self.source, said, skipped):
            return dict(self.source)
        most = Counter(tuple(m.items()) for m in said.values()).most_common(1)[0][0]
        base = dict(most)
        return base | {name: mode for name, mode in said.items() if mode != base}

    def config_json(self, saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Folder.config_json`: the same under both keys, and rotary embedding as mlx-lm looks for it."""
        rope = saved.get("rope_parameters")
        old = _old_rope(rope) if isinstance(rope, dict) else {}
        return {**old, **saved, "quantization": config, "quantization_config": config}

    def embedding(self, name: str) -> Scheme | None:
        """See `Format.embedding`: mlx packs embeddings like linears."""
        return None if self.source is None else self.read(self.source)[1](name)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[MLX, Callable[[str], Scheme | None]]:
        """Return the format of a `quantization` and the scheme of each linear by its name.

        Raises LlmqError for a mode, bits or a group size that mlx does not have.
        """
        form = cls()
        form.source = {key: value for key, value in config.items() if key != "quant_method"}
        base = _scheme(config, _reading.CONFIG)
        own = {n: _own(n, value) for n, value in form.source.items() if isinstance(value, dict) or value is False}

        def scheme_of(name: str) -> Scheme | None:
            return own.get(name, base)

        return form, scheme_of

    def _says(self, config: Mapping[str, Any], said: Mapping[str, Any], skipped: Sequence[str]) -> bool:
        """Say whether a `quantization` that was read gives these linears, and no other, what they are."""
        _, scheme_of = self.read(config)
        return all(scheme_of(n) == _scheme(mode, n) for n, mode in said.items())


def _mode(spec: LinearSpec) -> dict[str, Any]:
    """Return what mlx calls the scheme of a linear. Raises LlmqError where it has no name."""
    grid = spec.scheme.weight
    if isinstance(grid, Nvfp4) and grid.divisor != 1.0:
        raise LlmqError(
            f"{spec.name}: mlx has no divisor beside nvfp4's scales, without which those of most models are lost; use "
            "--weights mxfp4 or int"
        )
    for mode, kind in _FLOATS.items():
        if isinstance(grid, kind):
            return {"group_size": grid.granularity.columns(spec.K), "bits": grid.bits, "mode": mode}
    if not isinstance(grid, Int | Biased):
        raise LlmqError(
            f"{spec.name}: mlx holds integers, mxfp4, mxfp8 and nvfp4, not {type(grid).__name__}; use --weights int"
        )
    size = grid.granularity.group_size
    if grid.bits not in _BITS or size not in _SIZES:
        remedy = "say --bits 8" if grid.bits not in _BITS else "say --group-size 64"
        raise LlmqError(
            f"{spec.name}: mlx holds 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128, not {grid.bits} bits "
            f"{grid.granularity}; {remedy}, or use --format compressed-tensors"
        )
    return {"group_size": size, "bits": grid.bits, "mode": "affine"}


def _stored(scheme: Scheme) -> Scheme:
    grid = scheme.weight
    return replace(scheme, weight=replace(grid, minima=True)) if isinstance(grid, Int) else scheme


def _own(name: str, value: Any) -> Scheme | None:
    return None if value is False else _scheme(value, f"{_reading.CONFIG}.{printable(name, 80)}")


def _scheme(said: Mapping[str, Any], where: str) -> Scheme:
    """Return the scheme that group_size, bits and mode describe. Raises LlmqError, naming the key, for another."""
    mode = _reading.optional(said, "mode", str, "affine", where)
    if mode in _FLOATS:
        return Scheme(Nvfp4(divisor=1.0) if mode == "nvfp4" else _FLOATS[mode]())
    size, bits = said.get("group_size"), said.get("bits")
    if mode != "affine" or size not in _SIZES or bits not in _BITS or isinstance(bits, bool):
        what = printable(f"mode {mode!r}, bits {bits!r}, group_size {size!r}", 120)
        raise LlmqError(f"{where}: {what}: llmq reads mlx's affine, mxfp4, mxfp8 and nvfp4, as mlx 0.32 has them")
    return Scheme(Biased(bits, size))


def _bits(params: FloatParams) -> Tensor:
    """Return the scales of small floats as they are stored. Raises LlmqError where they are divided by something."""
    if params.divisor is not None and bool((params.divisor != 1).any()):
        said = f"{float(params.divisor.flatten()[0]):g}"
        raise LlmqError(f"mlx has no divisor beside nvfp4's scales, and theirs is {said}")
    if params.stored is None:
        raise LlmqError("mlx holds small floats by scales of 8 bits")
    return params.stored.contiguous()


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


def _old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary embedding under the names of transformers 4."""
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"]} | ({} if plain else {"rope_scaling": scaling})
