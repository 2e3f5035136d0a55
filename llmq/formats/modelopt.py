"""ModelOpt: small floats under the names of NVIDIA's Model Optimizer, for TensorRT-LLM and vLLM.

quant_algo                    tensors of a linear
FP8                           weight float8_e4m3fn [N, K]   weight_scale float32 []         input_scale float32 []
FP8_PER_CHANNEL_PER_TOKEN     weight float8_e4m3fn [N, K]   weight_scale float32 [N]
MXFP8                         weight float8_e4m3fn [N, K]   weight_scale uint8 [N, K/32]    2^(byte - 127)
NVFP4                         weight uint8 [N, K/2]         weight_scale float8_e4m3fn [N, K/16]
                              weight_scale_2 float32 []     input_scale float32 []
W4A16_NVFP4                   the same without input_scale
MIXED_PRECISION               as `quantized_layers` has it, module by module

They are the codes and scales of compressed-tensors (_ct_floats.py), but for what divides there and multiplies here:
weight_scale_2 = 1 / weight_global_scale and input_scale = 1 / input_global_scale, rounded to float32 once.

The config is in config.json, as NVIDIA's checkpoints have it, and in hf_quant_config.json, where TensorRT-LLM looks;
both list what stays float by name. Source: ModelOpt's `convert_hf_quant_config_format`, vLLM's `modelopt.py`,
TensorRT-LLM's `_torch/model_config.py`.
Not here: the bits (_minifloats.py), checkpoints decoded as they are read (checkpoint/decoding.py).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.formats import _common, _minifloats, _reading
from llmq.formats._ct_limits import on_gpus
from llmq.formats._folder import Folder
from llmq.grids.fp8 import Fp8
from llmq.grids.mxfp8 import Mxfp8
from llmq.grids.nvfp4 import Nvfp4
from llmq.minifloat import E4M3
from llmq.readers import Limit, Reader, readers, table, told
from llmq.types import FloatParams, LinearSpec, LlmqError, QTensor, Scheme

_NAME = "modelopt"
_MIXED = "MIXED_PRECISION"
_ALGOS = {
    "FP8": Scheme(Fp8("tensor"), Fp8("tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(Fp8("channel"), Fp8("channel")),
    "NVFP4": Scheme(Nvfp4(), Nvfp4()),
    "W4A16_NVFP4": Scheme(Nvfp4()),
    "MXFP8": Scheme(Mxfp8(), Mxfp8()),
}
_NAMES = {"codes": "weight", "scale": "weight_scale", "divisor": "weight_scale_2", "input": "input_scale"}
_READERS = table(
    ("transformers", False, "it has no reader of modelopt; --format compressed-tensors holds the same codes", "source"),
    ("vLLM", True, "", "source"),
    ("SGLang", True, "", "source"),
    ("TensorRT-LLM", True, "", "source"),
)


@dataclass
class ModelOpt(Folder):
    """The checkpoint format of NVIDIA's Model Optimizer.

    source: the config that was read, whose keys are kept while it still says what each module becomes.
    """

    quant_method: str = field(default=_NAME, init=False)
    source: Mapping[str, Any] | None = field(default=None, init=False, repr=False)

    copy: ClassVar[str] = "hf_quant_config.json"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float32, as the format has it."""
        return torch.float32

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse schemes that have no name here; return warnings about readers. Raises LlmqError."""
        _common.refuse_none(linears)
        for spec in linears:
            _algo(spec)
        _common.refuse_misfits(linears, self.misfit)
        return told(_limits(linears, skipped))

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        return readers(_READERS, _limits(linears, skipped))

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """See `Format.layout`."""
        grid, one = _minifloats.float_grid(spec, _NAME), torch.empty((), device="meta")
        codes, scales = _minifloats.layout(spec, grid)
        tensors = {"weight": codes, "weight_scale": _shaped(scales, spec)}
        if isinstance(grid, Nvfp4):
            tensors["weight_scale_2"] = one
        return tensors | ({"input_scale": one} if spec.scheme.static else {})

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """See `Format.pack`."""
        params = FloatParams.of(q.params)
        codes, scales = _minifloats.stored(q, spec)
        tensors = {"weight": codes, "weight_scale": _shaped(scales, spec)}
        if params.divisor is not None:
            tensors["weight_scale_2"] = (1 / params.divisor[0]).reshape(())
        return tensors | ({} if q.input is None else {"input_scale": q.input.scale.float().reshape(())})

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor."""
        found = _reading.checked(tensors, self.layout(spec), spec)
        grid = _minifloats.float_grid(spec, _NAME)
        whole = found["weight_scale_2"].float().reshape(1) if "weight_scale_2" in found else None
        divisor = None if whole is None else 1 / whole
        q = _minifloats.restored(found["weight"], found["weight_scale"], spec, grid, divisor)
        params = FloatParams.of(q.params)
        if whole is not None and params.stored is not None:
            q = replace(q, params=replace(params, scale=E4M3.decode(params.stored) * whole))
        if "input_scale" in found:
            one = found["input_scale"].reshape(1)
            fixed = FloatParams(one, divisor=1 / one) if isinstance(grid, Nvfp4) else FloatParams(one)
            q = replace(q, input=fixed)
        return _minifloats.sound(q, spec, _NAMES)

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`; one that was read is kept where it still holds."""
        if self.source is not None:
            _, scheme_of = self.read(self.source)
            if all(scheme_of(s.name) == s.scheme for s in linears) and not any(map(scheme_of, skipped)):
                return dict(self.source)
        members: dict[str, list[str]] = {}
        for spec in linears:
            members.setdefault(_algo(spec), []).append(spec.name)
        mixed = len(members) > 1
        groups = [_group(algo, sorted(names) if mixed else ["Linear"]) for algo, names in members.items()]
        layers = {name: {"quant_algo": algo, **_size(algo)} for algo, names in members.items() for name in names}
        return {
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            **({"quantized_layers": layers} if mixed else {}),
            "ignore": list(skipped),
            "quant_algo": _MIXED if mixed else next(iter(members)),
            "producer": {"name": _NAME, "version": "0.39.0"},
            "quant_method": _NAME,
        }

    def beside(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return hf_quant_config.json as TensorRT-LLM reads it."""
        algo = str(config["quant_algo"])
        said: dict[str, Any] = {"quant_algo": algo, "kv_cache_quant_algo": None, **_size(algo)}
        said |= {"exclude_modules": config["ignore"]}
        said |= {"quantized_layers": config["quantized_layers"]} if algo == _MIXED else {}
        return {"producer": config["producer"], "quantization": said}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[ModelOpt, Callable[[str], Scheme | None]]:
        """Return the format of a ModelOpt config, from config.json or hf_quant_config.json, and each linear's scheme.

        Raises LlmqError for an algorithm that llmq does not read.
        """
        form, inner = cls(), _reading.optional(config, "quantization", dict, dict(config))
        form.source = dict(config)
        algo = _reading.need(inner, "quant_algo", [*_ALGOS, _MIXED])
        layers = _reading.optional(inner, "quantized_layers", dict, {})
        each = {name: _reading.need(layers[name], "quant_algo", [*_ALGOS]) for name in layers} if algo == _MIXED else {}
        left = _reading.strings(inner, "exclude_modules" if "exclude_modules" in inner else "ignore")
        patterns = _reading.Patterns({name: fnmatch.translate(name) for name in left})

        def scheme_of(name: str) -> Scheme | None:
            if patterns.first(name) is not None:
                return None
            return _ALGOS.get(each.get(name, "") if algo == _MIXED else algo)

        return form, scheme_of


def _algo(spec: LinearSpec) -> str:
    """Return what ModelOpt calls the scheme of a linear. Raises LlmqError where it has no name."""
    found = next((algo for algo, scheme in _ALGOS.items() if scheme == spec.scheme), None)
    if found is None:
        raise LlmqError(
            f"{spec.name}: modelopt has no name for {type(spec.scheme.weight).__name__} weights "
            f"{spec.scheme.weight.granularity} with these inputs (it has {', '.join(_ALGOS)}); use "
            "--format compressed-tensors"
        )
    return found


def _shaped(scales: Tensor, spec: LinearSpec) -> Tensor:
    """Return the scales of fp8 without the dimension of their groups; those of other grids as they are."""
    if not isinstance(spec.scheme.weight, Fp8):
        return scales
    return scales.float().reshape(-1) if scales.numel() > 1 else scales.float().reshape(())


def _size(algo: str) -> dict[str, int]:
    size = _ALGOS[algo].weight.granularity.group_size if algo in _ALGOS else None
    return {} if size is None else {"group_size": size}


def _group(algo: str, targets: list[str]) -> dict[str, Any]:
    """Return a config group as ModelOpt writes one."""
    scheme = _ALGOS[algo]
    args: dict[str, Any] = {"dynamic": False, "num_bits": scheme.weight.bits, "type": "float", **_size(algo)}
    inputs = {} if scheme.activation is None else {"input_activations": args}
    channel = {"strategy": "channel"} if algo == "FP8_PER_CHANNEL_PER_TOKEN" else {}
    return inputs | {"weights": args | channel, "targets": targets}


def _limits(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
    algos = {_algo(s): s.scheme for s in linears}
    found = [*_common.fused_limits(linears, skipped)]
    for scheme in algos.values():
        found += on_gpus(scheme.weight, scheme.activation)
    if other := sorted(algos.keys() - {"FP8", "NVFP4"}):
        say = f"it is known to read FP8 and NVFP4 of modelopt, not {', '.join(other)}"
        found.append(Limit(say, notes=("SGLang",), told=False))
    return found
