"""Launches counted, not made: on a CPU, the GPU's back-ends with every Triton kernel replaced by a counter.

What they compute is then whatever was in memory; what is left is all that Python and torch do around the kernels.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode

from llmq.runtime.backends.scaled_mm import ScaledMM
from llmq.runtime.backends.triton_e2m1 import TritonE2M1
from llmq.runtime.backends.triton_w8a8 import TritonW8A8
from llmq.runtime.backends.triton_weight_only import TritonWeightOnly
from llmq_kernels import (
    activation,
    attention,
    e2m1,
    fp8,
    grouped,
    grouped_int8,
    int8,
    kv,
    product,
    routing,
    tune,
    weight_only,
)

BACKENDS = (TritonWeightOnly, TritonE2M1, TritonW8A8, ScaledMM)
KERNELS = {
    weight_only: ("weight_only_kernel",),
    product: ("sum_splits_kernel",),
    importlib.import_module("llmq_kernels.decode"): ("decode_kernel",),
    grouped: ("grouped_kernel",),
    grouped_int8: ("grouped_int8_kernel",),
    routing: ("plan_kernel",),
    e2m1: ("e2m1_kernel", "decode_kernel"),
    activation: ("quantize_kernel",),
    int8: ("int8_kernel", "sum_int32_kernel"),
    fp8: ("sum_int32_kernel",),
    kv: ("append_kernel",),
    attention: ("attend_kernel", "merge_kernel"),
}
INSIDE = {"weight_only_linear": weight_only._op, "e2m1_linear": e2m1._op, "int8_linear": int8._op,
          "int8_product": int8._product_op, "grouped_int8": grouped_int8._op,
          "grouped_weight_only": grouped._op, "grouped_e2m1": grouped._e2m1_op, "expert_plan": routing._op}  # fmt: skip
"""What our operators do."""
FREE = {"empty", "new_empty", "empty_strided", "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "detach",
        "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "as_strided", "split", "split_with_sizes",
        "unbind", "sym_size", "is_pinned", "lift_fresh"}  # fmt: skip
"""Operators that launch nothing."""


class _Kernel:
    """A kernel whose launches are counted."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: Any) -> _Kernel:
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        self.counts[self.name] += 1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Let the back-ends for GPUs take CPU tensors and count launches, by kernel, in place of making them."""
    counts: Counter[str] = Counter()
    patches = [patch.object(m, name, _Kernel(name, counts)) for m, names in KERNELS.items() for name in names]
    patches += [patch.object(m, "runs_on", lambda x: True) for m in (product, int8, fp8, grouped_int8, routing)]
    patches += [patch.object(b, "devices", frozenset({"cpu"})) for b in BACKENDS]
    tune.forget()
    for each in patches:
        each.start()
    try:
        yield counts
    finally:
        for each in reversed(patches):
            each.stop()
        tune.forget()


class TorchLaunches(TorchDispatchMode):
    """Counts, by name, the operators of torch that launch something, those inside our own operators too."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in INSIDE:
            with self:
                return INSIDE[name](*args, **(kwargs or {}))
        if name not in FREE:
            self.counts[f"torch {name}"] += 1
        return func(*args, **(kwargs or {}))
