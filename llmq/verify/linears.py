"""One packed linear: its tensors are there, shaped as they must be, and what they hold makes sense.

Not here: what the config says of it (packing.py), the bits (decode.py), what was recorded (record.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint import Source
from llmq.verify.decode import Array, Weight, decode
from llmq.verify.floats import Floats
from llmq.verify.mlx import Affine
from llmq.verify.packing import OPTIONAL, How, Packing
from llmq.verify.report import Report

_ANY_WIDTH = ("g_idx", "weight_shape")  # whose integers peers store in any width
_INTEGERS = ("I8", "I16", "I32", "I64", "U8")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Linear:
    """A decoded linear.

    scale: as stored, in the orientation `[N, G]` or `[1, 1]`. g_idx: the group of every column, int32 `[K]`, whether it
    is stored or plain. input: its static input scale.
    """

    name: str
    how: Packing
    weight: Weight
    scale: Tensor
    g_idx: Array
    input: Tensor | None = None


Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every tensor of a checkpoint, as `Source.headers` gives them."""


def read_linear(
    source: Source, headers: Headers, name: str, how: Packing, shape: tuple[int, int], report: Report
) -> Linear | None:
    """Return the linear at `name`, checked and decoded; None where it cannot be. What is wrong goes to the report."""
    report.count("packed linears")
    N, K = shape
    stored = _tensors(source, headers, name, how, shape, report)
    if stored is None:
        return None
    if not all([check_scale(f"{name}.{k}", t, report) for k, t in stored.items() if t.is_floating_point()]):
        return None
    arrays = {k: t.float().numpy() if t.is_floating_point() else t.numpy() for k, t in stored.items()}
    g_idx = arrays.pop("g_idx", None)
    if g_idx is not None and not _check_groups(f"{name}.g_idx", g_idx, how, K, report):
        return None
    runs = (np.arange(K) // (how.group or K)).astype("<i4")
    g_idx = runs if g_idx is None else g_idx.astype("<i4")
    if not np.array_equal(g_idx, runs) or K % how.groups(K):
        arrays["g_idx"] = g_idx
    if (said := arrays.get("weight_shape")) is not None:
        report.expect(said.tolist() == [N, K], f"{name}.weight_shape is {said.tolist()}, not {[N, K]}")
    weight = decode(arrays, how, N, K)
    report.expect(not weight.stray, f"{name}: {weight.stray} bits that belong to no code are set")
    _check_zeros(name, weight.zero, how, report)
    scale = stored["scales"].T if "scales" in stored else stored["weight_scale"]
    return Linear(name, how, weight, scale.reshape(weight.scale.shape), g_idx, stored.get("input_scale"))


def read_floats(
    source: Source, headers: Headers, name: str, how: Floats | Affine, shape: tuple[int, int], report: Report
) -> tuple[Array, dict[str, Tensor]] | None:
    """Return the weight at `name`, of small floats, and what of it was solved; None as `read_linear`."""
    report.count("packed linears")
    stored = _tensors(source, headers, name, how, shape, report)
    if stored is None or not all([check_scale(f"{name}.{k}", stored[k], report) for k in (how.whole, how.input) if k]):
        return None
    values = how.values(stored, name, report)
    return None if values is None else (values, how.solved(stored))


def check_scale(name: str, scale: Tensor, report: Report) -> bool:
    """Check that scales are finite, not zero and no accident of bits; return whether they are finite."""
    values = scale.float().abs()
    finite = torch.isfinite(values)
    if not report.expect(bool(finite.all()), f"{name}: {_share(~finite)} are NaN or Inf"):
        return False
    report.expect(bool(values.all()), f"{name}: {_share(values == 0)} are zero")
    if scale.dtype != torch.float16:  # its small numbers are real scales of small weights
        tiny = (values > 0) & (values < torch.finfo(torch.float32).tiny)
        report.expect(not tiny.any(), f"{name}: {_share(tiny)} are denormal numbers, which no scale is")
    return True


def _tensors(
    source: Source, headers: Headers, name: str, how: How, shape: tuple[int, int], report: Report
) -> dict[str, Tensor] | None:
    """Return a linear's tensors where all that it needs are there, of the right dtype and shape."""
    found: dict[str, Tensor] = {}
    good = True
    for local, (dtype, wanted) in how.tensors(*shape).items():
        full = f"{name}.{local}"
        if full not in headers:
            good &= report.expect(local in OPTIONAL, f"{full} is missing, but the config says the linear is {how}")
            continue
        kind, has = headers[full]
        same = kind in (FLOATS if dtype == "float" else _INTEGERS if local in _ANY_WIDTH else (dtype,))
        right = same and (has == wanted or ((local.startswith("input_") or wanted == (1,)) and has == ()))
        if report.expect(right, f"{full} is {kind} {list(has)}, not {dtype} {list(wanted)}, as {how} has it"):
            found[local] = source.get(full)
        else:
            good = False
    return found if good else None


def _check_groups(name: str, g_idx: Array, how: Packing, K: int, report: Report) -> bool:
    """Check the group of every column; return whether a decoder can follow them."""
    G = how.groups(K)
    if not report.expect(
        bool(((g_idx >= 0) & (g_idx < G)).all()), f"{name} names groups outside 0 .. {G - 1}: {_odd(g_idx, G)}"
    ):
        return False
    counts = np.bincount(g_idx, minlength=G)
    size = how.group or K
    even = np.array_equal(np.sort(counts)[::-1], [size] * (G - 1) + [K - size * (G - 1)])
    report.expect(even, f"{name} gives the groups {sorted({int(c) for c in counts})} columns, not {size}")
    if not how.desc_act:
        plain = np.array_equal(g_idx, np.arange(K) // size)
        report.expect(plain, f"{name} is no run of groups, but the config does not say desc_act, so readers ignore it")
    return True


def _check_zeros(name: str, zero: Array, how: Packing, report: Report) -> None:
    top, middle = 2**how.bits - 1, 2 ** (how.bits - 1)
    inside = (zero >= 0) & (zero <= top)
    report.expect(bool(inside.all()), f"{name}: {int((~inside).sum())} zeros lie outside 0 .. {top}")
    if how.sym:
        odd = int((zero != middle).sum())
        report.expect(not odd, f"{name}: the config says sym, but {odd} of {zero.size} zeros are not {middle}")


def _odd(g_idx: Array, G: int) -> list[int]:
    return [int(g) for g in np.unique(g_idx[(g_idx < 0) | (g_idx >= G)])[:3]]


def _share(which: Tensor) -> str:
    return f"{int(which.sum()):,} of {which.numel():,}"


def check_float(name: str, tensor: Tensor, report: Report, kind: str = "float tensors") -> bool:
    """Check that a float tensor, counted among its kind, is one, and finite; return whether."""
    report.count(kind)
    if not report.expect(tensor.is_floating_point(), f"{name} is {tensor.dtype}, and no float"):
        return False
    good = not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
    return report.expect(good, f"{name} holds NaN or Inf")
