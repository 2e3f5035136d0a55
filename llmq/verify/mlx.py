"""mlx-lm's linears, decoded bit by bit by numpy alone: what `quantization` says of each, and the weight it stands for.

    affine          weight uint32 [N, K*b/32], a row one string of bits, the lowest first; scales, biases float [N, G]
                    w = scale * code + bias
    mxfp4, nvfp4    weight uint32 [N, K/8]; scales uint8 [N, K/32], powers of two, or [N, K/16], E4M3
    mxfp8           weight uint32 [N, K/4]; scales uint8 [N, K/32]

Not here: small floats themselves (floats.py), which names have entries in other formats (packing.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmq.errors import LlmqError
from llmq.guard.reading import field
from llmq.verify.bits import fields
from llmq.verify.floats import Floats
from llmq.verify.report import Report

WHERE = "quantization"
Array = NDArray
_SMALL = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class Affine:
    """How a linear of integers is stored. group: columns that share a scale and a bias."""

    bits: int
    group: int
    whole = input = ""

    def __str__(self) -> str:
        return f"{self.bits}-bit mlx"

    def tensors(self, N: int, K: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return what is stored, by local name: dtype in safetensors' spelling ("float" for any such), and shape."""
        beside = ("float", (N, K // self.group))
        return {"weight": ("U32", (N, K * self.bits // 32)), "scales": beside, "biases": beside}

    def values(self, stored: Mapping[str, Tensor], name: str, report: Report) -> Array | None:
        """Return the weight, float32 `[N, K]`; None, and reported, where scales or biases are not finite."""
        scale, bias = (stored[local].float().numpy() for local in ("scales", "biases"))
        finite = bool(np.isfinite(scale).all() and np.isfinite(bias).all())
        if not report.expect(finite, f"{name}: not all scales and biases are finite"):
            return None
        codes = self._codes(stored).astype(np.float32).reshape(len(scale), scale.shape[1], -1)
        return (codes * scale[..., None] + bias[..., None]).reshape(len(scale), -1)

    def solved(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the checksums of a linear are taken of; the zero of a bias is what gives it, times the scale."""
        scale, bias = (stored[local].float() for local in ("scales", "biases"))
        zero = torch.where(scale == 0, 0, -bias / scale).round().to(torch.int32)
        return {"codes": torch.from_numpy(self._codes(stored)), "scale": stored["scales"], "zero": zero}

    def _codes(self, stored: Mapping[str, Tensor]) -> Array:
        words = stored["weight"].view(torch.int32).numpy()
        return fields(words, self.bits, words.shape[1] * 32 // self.bits)[0]


def of_mlx(config: Mapping[str, Any]) -> Callable[[str], Affine | Floats | None]:
    """Return how a `quantization` stores each linear, None for a float one. Raises LlmqError for an unknown mode."""
    base = _mode(config, WHERE)
    own = {n: None if v is False else _mode(v, f"{WHERE}.{n}") for n, v in config.items() if _is_own(v)}

    def of(name: str) -> Affine | Floats | None:
        return own.get(name, base)

    return of


def _is_own(value: Any) -> bool:
    return isinstance(value, dict) or value is False


def _mode(said: Mapping[str, Any], where: str) -> Affine | Floats:
    mode = said.get("mode") or "affine"
    if mode in _SMALL:
        _, size = _SMALL[mode]
        return Floats(mode, (1, size), "weight", scales="scales", words=True)
    bits, group = field(said, "bits", int, where), field(said, "group_size", int, where)
    if mode != "affine" or bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
        raise LlmqError(f"{where}: mode {mode!r}, {bits} bits, groups of {group}: verify decodes no such mlx weights")
    return Affine(bits, group)
