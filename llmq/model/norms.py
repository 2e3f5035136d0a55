"""Norms by value: whether a module is an RMSNorm, and how it stores its gain, tried out on a few numbers.

Not here: norms that are tried in their place in a block (trial.py).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PROBE = 8  # channels of a norm that is tried out


def is_norm(module: nn.Module) -> bool:
    """Say whether a module has a gain for each channel and nothing more."""
    weights = dict(module.named_parameters())
    return weights.keys() == {"weight"} and weights["weight"].dim() == 1


def gain(norm: nn.Module, eps: float) -> float | None:
    """Return 0 for an RMSNorm that multiplies by its weight, 1 for one that does by 1 + weight, None for another.

    A norm of the same class is tried out, its own eps taken over: numbers so small that eps is seen, and large ones.
    """
    own: Any = type(norm)(_PROBE)
    for name in ("eps", "variance_epsilon"):
        if hasattr(norm, name):
            setattr(own, name, getattr(norm, name))
    with torch.no_grad():
        own.weight.copy_(torch.linspace(0.5, 2, _PROBE))
    for plus in (0.0, 1.0):
        if all(_is_norm_of(own, x, plus, eps) for x in _inputs(eps)):
            return plus
    return None


def _inputs(eps: float) -> Sequence[Tensor]:
    x = torch.linspace(-1, 2, _PROBE)
    return x, x * max(eps, 1e-12) ** 0.5


def _is_norm_of(norm: Any, x: Tensor, plus: float, eps: float) -> bool:
    """Say whether norm(x) is that of the formula; a gate, where a norm takes one, is left at the value x."""
    takes = len(inspect.signature(norm.forward).parameters)
    with torch.no_grad():
        found = norm(*[x] * takes)
        wanted = x * torch.rsqrt(x.square().mean() + eps) * (plus + norm.weight)
    return torch.allclose(found, wanted * nn.functional.silu(x) if takes > 1 else wanted, rtol=1e-4, atol=1e-7)
