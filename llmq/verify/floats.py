"""Linears of small floats, decoded bit by bit by numpy alone: what is stored of each, and the weight it stands for.

    fp8, mxfp8       codes a byte each, E4M3: sign, 4 bits of exponent (bias 7), 3 of mantissa; 127 and 255 are NaN
    nvfp4, mxfp4     codes half a byte each, E2M1, the even column in the low half: 0 .5 1 1.5 2 3 4 6, and below 0
    scales           fp8: floats; nvfp4: E4M3, over (or, of modelopt, times) one float32; mxfp4, mxfp8: 2^(byte - 127)

    w[n, k] = value(code[n, k]) * scale of its block

Source: OCP Microscaling Formats 1.0; compressed-tensors' and ModelOpt's descriptions of their files.
Not here: which linear is stored so (packing.py), integers (decode.py).
"""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import LlmqError
from llmq.guard.patterns import Limit, Pattern
from llmq.guard.reading import field
from llmq.verify.report import Report

WHERE = "quantization_config"
Array = NDArray
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_ONE_SIZE = {
    "nvfp4-pack-quantized": ("nvfp4", 16), "mxfp4-pack-quantized": ("mxfp4", 32), "mxfp8-quantized": ("mxfp8", 32)
}  # fmt: skip


def _e4m3() -> Array:
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -magnitude, magnitude).astype(np.float32)


_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
_E4M3 = _e4m3()


@dataclass(frozen=True)
class Floats:
    """How a linear of small floats is stored.

    kind: "fp8", "nvfp4", "mxfp4" or "mxfp8". block: rows and columns that share a scale, 0 for all of them.
    codes: the local name of the codes. whole: of one float for all scales, "" without. times: whether the scales are
    multiplied by it, not divided, and those of rows are `[N]`, as modelopt has it. input: of what is fixed of the
    input, "" without. scales: of the scales. words: whether codes lie in words of 32 bits, and E4M3 scales in bytes.
    """

    kind: str
    block: tuple[int, int]
    codes: str
    whole: str = ""
    times: bool = False
    input: str = ""
    scales: str = "weight_scale"
    words: bool = False

    def __str__(self) -> str:
        return self.kind

    def tensors(self, N: int, K: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return what is stored, by local name: dtype in safetensors' spelling ("float" for any such), and shape."""
        n, k = self.block
        halves = self.kind.endswith("fp4")
        scale = (1,) if self.block == (0, 0) else (-(-N // (n or N)), -(-K // (k or K)))
        scale = (N,) if self.times and self.block == (1, 0) else scale
        kind = "U8" if self.words else {"fp8": "float", "nvfp4": "F8_E4M3"}.get(self.kind, "U8")
        codes = ("U8", (N, K // 2)) if halves else ("F8_E4M3", (N, K))
        if self.words:
            codes = ("U32", (N, K // (8 if halves else 4)))
        found: dict[str, tuple[str, tuple[int, ...]]] = {self.codes: codes, self.scales: (kind, scale)}
        found |= {name: ("float", (1,)) for name in (self.whole, self.input) if name}
        return found

    def values(self, stored: Mapping[str, Tensor], name: str, report: Report) -> Array | None:
        """Return the weight, float32 `[N, K]`, -0 as 0; None, and reported, where one of its numbers is none."""
        codes = (_E2M1 if self.kind.endswith("fp4") else _E4M3)[self._bits(stored)]
        scale = self._scale(stored)
        good = report.expect(bool(np.isfinite(codes).all()), f"{name}.{self.codes} holds NaN")
        finite = bool((np.isfinite(scale) & (scale > 0)).all())
        if not (report.expect(finite, f"{name}.{self.scales}: not all scales are finite and above 0") and good):
            return None
        N, K = codes.shape
        n, k = (size or whole for size, whole in zip(self.block, (N, K), strict=True))
        return codes * scale.repeat(n, axis=0)[:N].repeat(k, axis=1)[:, :K] + 0

    def solved(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the checksums of a linear are taken of; not a divisor that is stored as its inverse."""
        scales = stored[self.scales]
        scales = scales if self.kind == "fp8" else scales.view(torch.uint8)
        found = {"codes": torch.from_numpy(self._bits(stored)), "scale": scales}
        if self.whole and not self.times:
            found["divisor"] = stored[self.whole].reshape(1)
        fixed = self.input_scale(stored)
        return found if fixed is None else found | {"input": fixed}

    def _bits(self, stored: Mapping[str, Tensor]) -> Array:
        raw = stored[self.codes].view(torch.uint8).numpy()
        if not self.kind.endswith("fp4"):
            return raw
        return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)

    def input_scale(self, stored: Mapping[str, Tensor]) -> Tensor | None:
        """Return what values of the input are multiplied by at last, as it was solved; None where nothing is fixed."""
        if not self.input:
            return None
        one = stored[self.input].reshape(1)
        return 1 / one if "global" in self.input else one

    def _scale(self, stored: Mapping[str, Tensor]) -> Array:
        scales = stored[self.scales]
        if self.kind == "fp8":
            return scales.float().numpy().reshape(scales.shape if scales.dim() == 2 else (-1, 1))
        raw = scales.view(torch.uint8).numpy()
        if self.kind != "nvfp4":
            return _E8M0[raw]
        if not self.whole:
            return _E4M3[raw]
        whole = stored[self.whole].numpy().reshape(1)
        return _E4M3[raw] * whole if self.times else _E4M3[raw] / whole


def of_group(form: Any, weights: Mapping[str, Any], inputs: Mapping[str, Any], where: str) -> Floats:
    """Return how a config group of compressed-tensors stores its linears. Raises LlmqError where none is decoded here.

    form: its `format`. weights, inputs: the arguments of both.
    """
    fixes = bool(inputs) and inputs.get("dynamic") is not True  # false of a scale, "local" of what divides scales
    if form in _ONE_SIZE:
        kind, size = _ONE_SIZE[form]
        codes, whole = ("weight_packed" if kind.endswith("fp4") else "weight"), "weight_global_scale"
        fixed = "input_global_scale" if kind == "nvfp4" and fixes else ""
        return Floats(kind, (1, size), codes, whole if kind == "nvfp4" else "", input=fixed)
    if form not in ("float-quantized", "naive-quantized"):
        raise LlmqError(f"{where} is stored as {form!r}, of which verify decodes no floats")
    return Floats("fp8", _block(weights, where), "weight", input="input_scale" if fixes else "")


def of_modelopt(config: Mapping[str, Any]) -> Callable[[str], Floats | None]:
    """Return how a ModelOpt config stores each linear, None for a float one. Raises LlmqError as `of_group`."""
    said = field(config, "quantization", dict, WHERE) if "quantization" in config else config
    algo, left = said.get("quant_algo"), said.get("exclude_modules") or said.get("ignore") or []
    layers = field(said, "quantized_layers", dict, WHERE) if algo == "MIXED_PRECISION" else None
    if not isinstance(left, list) or not all(isinstance(n, str) for n in left):
        raise LlmqError(f"{WHERE}: {left!r} should be names of modules")
    limit = Limit()
    patterns = [Pattern(fnmatch.translate(n), f"{WHERE}: {n!r}", limit) for n in left]
    known = {str(a): _of_algo(a) for a in ([algo] if layers is None else [_algo_of(layers, n) for n in layers])}

    def of(name: str) -> Floats | None:
        if any(p.match(name) for p in patterns) or (layers is not None and name not in layers):
            return None
        return known[str(algo if layers is None else layers[name]["quant_algo"])]

    return of


def _algo_of(layers: Mapping[str, Any], name: str) -> Any:
    return field(layers, name, dict, f"{WHERE}.quantized_layers").get("quant_algo")


def _of_algo(algo: Any) -> Floats:
    known = {
        "FP8": Floats("fp8", (0, 0), "weight", times=True, input="input_scale"),
        "FP8_PER_CHANNEL_PER_TOKEN": Floats("fp8", (1, 0), "weight", times=True),
        "NVFP4": Floats("nvfp4", (1, 16), "weight", "weight_scale_2", times=True, input="input_scale"),
        "W4A16_NVFP4": Floats("nvfp4", (1, 16), "weight", "weight_scale_2", times=True),
        "MXFP8": Floats("mxfp8", (1, 32), "weight", times=True),
    }
    if algo not in known:
        raise LlmqError(f"{WHERE}.quant_algo is {algo!r}; verify decodes {', '.join(known)}")
    return known[algo]


def _block(weights: Mapping[str, Any], where: str) -> tuple[int, int]:
    strategy = weights.get("strategy") or "tensor"
    if strategy == "block":
        block = field(weights, "block_structure", list, where)
        if len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return block[0], block[1]
    if strategy == "group":
        return 1, field(weights, "group_size", int, where)
    if strategy not in ("tensor", "channel"):
        raise LlmqError(f"{where}.weights.strategy is {strategy!r}; verify knows tensor, channel, block and group")
    return (0, 0) if strategy == "tensor" else (1, 0)
