"""Back-ends: what a quantized linear computes with, chosen once at load.

A back-end is one file of this folder with one class, a `Prepacked` weight. `refuses` says why it cannot run a linear,
or None where it can; `choose` takes the first that can, by `rank`, and the reference (../reference.py) where none can,
which is always right. On a GPU one line is logged for each reason why it is taken. A prepacked weight replaces the
tensors of the file and gives them back without loss (`restore`), so a model never holds both and `save_pretrained`
writes what was read.

| back-end | takes | how |
|---|---|---|
| triton_weight_only | 2 to 8 bits, weights only, a GPU | our kernels: decoded in registers, many rows in panels |
| triton_w8a8 | W8A8, symmetric activations, a GPU | our Triton kernels, int8 x int8 -> int32 |
| intloop | 2 to 8 bits, weights only | compiled integer dot products for few rows, panels decoded for many |
| int4pack | 4 bits, weights only | torch's int4 packed product for few rows, panels decoded to float32 for many |
| int_mm   | W8A8, a CPU with VNNI | int8 x int8 -> int32 by `torch._int_mm` |
| fbgemm   | W8A8, x86 without VNNI | fbgemm's uint8 x int8 product, kept exact by splitting the weight |
| int8pack | 8 bits, weights only | torch's int8 product for few rows, panels decoded to float32 for many |
| scaled_mm | FP8 weights and activations, a GPU | torch's FP8 x FP8 product, Triton kernels |
| triton_e2m1 | NVFP4, MXFP4, a GPU | our kernels: decoded in registers, many rows in panels |
| e4m3 | FP8, MXFP8, a GPU | decoded at every forward by torch |
| floatloop | FP8, NVFP4, MXFP4, MXFP8, a CPU | compiled products of packed codes for few rows, panels for many |

On AVX-512 torch's int4 and int8 products come before intloop. A back-end for another device is one more file here.
Not here: the layer itself (linear.py), bits on disk (formats/).
"""

import functools
import importlib
import logging
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmq.granularity import PerTensor
from llmq.types import AffineGrid, LinearSpec, Params, QTensor

log = logging.getLogger(__name__)

MANY_ROWS = {"AVX2": 32}
"""By CPU capability, the most rows of `x` for which torch's packed products beat decoding the weight to float32.

Fixed, not timed at load, so that a model computes the same bits every time. `scripts/bench_runtime.py --crossover`
prints the times of both sides (docs/runtime.md)."""
_MANY_ROWS = 64  # AVX-512 and others


class Prepacked(nn.Module, ABC):
    """A weight in the layout that one back-end multiplies with. Its tensors are buffers outside the `state_dict`.

    Subclasses are made from a `QTensor` and a `LinearSpec` that `refuses` had nothing against.
    devices: the types of device it is for. rank: its place among the back-ends asked, the fastest first.
    """

    name: ClassVar[str]
    devices: ClassVar[frozenset[str]] = frozenset({"cpu"})
    rank: ClassVar[int] = 9

    @classmethod
    @abstractmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """Return why this back-end cannot run `spec` on `device`, None where it can."""

    @classmethod
    def holds(cls, q: QTensor) -> bool:
        """Return whether this back-end can hold the values of `q`, which a config need not tell."""
        return even_groups(q)

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__()
        self.N, self.K = q.codes.shape
        self.grid = q.grid

    def keep(self, **tensors: Tensor | None) -> None:
        """Hold tensors as buffers that move with the module but belong to no checkpoint."""
        for name, t in tensors.items():
            self.register_buffer(name, t, persistent=False)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., K]` to `[..., N]` in the dtype of `x`, without bias."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map `x` `[..., K]` to `[..., N]` in its dtype, with a bias `[N]` of any float dtype."""
        y: Tensor = self(x)
        return y if bias is None else y + bias.to(x.dtype)

    def leave(self) -> None:
        """Let go of what others hold of this weight: it is no longer that of a linear."""

    @abstractmethod
    def restore(self) -> QTensor:
        """Return the `QTensor` that this was made from, equal in every tensor and dtype."""


@functools.cache
def backends() -> tuple[type[Prepacked], ...]:
    """Return the back-ends, one of each file of this folder, in the order they are asked."""
    files = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"
    ]
    found = [
        c
        for module in files
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Prepacked) and c.__module__ == module.__name__
    ]
    return tuple(sorted(found, key=lambda b: (b.rank, b.name)))


def choose(spec: LinearSpec, q: QTensor) -> type[Prepacked] | None:
    """Return the first back-end that can run `spec` where `q` is, None for the reference (logged on a GPU)."""
    device = q.codes.device
    found = next((b for b in backends() if b.refuses(spec, device) is None and b.holds(q)), None)
    if found is None and device.type not in ("cpu", "meta"):
        _warn(device.type, why_reference(spec, device), spec.name)
    return found


def why_reference(spec: LinearSpec, device: torch.device) -> str:
    """Return in words why none of the back-ends for `device` takes `spec`."""
    asked = [b for b in backends() if device.type in b.devices]
    held = "its zeros or its groups are not what it can hold"
    return "; ".join(f"{b.name}: {b.refuses(spec, device) or held}" for b in asked) or f"none is for {device.type}"


_warned: set[tuple[str, str]] = set()


def _warn(device: str, reason: str, name: str) -> None:
    """Log, once for each reason, that linears go to the reference."""
    if (device, reason) not in _warned:
        _warned.add((device, reason))
        log.warning("%s and all like it run the reference on %s: %s", name, device, reason)


def one_op(schema: str, rows: Callable[..., int]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function one operator to `torch.compile`, which cannot look into it; elsewhere it is called as it is.

    schema: of its arguments, `x` first. rows: returns N from the others; the result is `[..., N]` in the dtype of `x`.
    """

    def decorate(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = product.__module__.rpartition(".")[2]
        op: Any = torch.library.custom_op(f"llmq::{name}_linear", product, mutates_args=(), schema=schema)
        op.register_fake(lambda x, *rest: x.new_empty(*x.shape[:-1], rows(*rest)))
        return lambda *args: op(*args) if torch.compiler.is_compiling() else product(*args)

    return decorate


def refuses_weight_only(spec: LinearSpec, device: torch.device, bits: int, divisor: int) -> str | None:
    """Return why a CPU's product of `bits`-bit weights cannot run a linear; `divisor` is to divide its groups."""
    grid = spec.scheme.weight
    size = grid.granularity.columns(spec.K)
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    evenly = isinstance(grid, AffineGrid) and not isinstance(grid.granularity, PerTensor)
    if not evenly or grid.bits != bits or spec.scheme.activation is not None:
        return f"it takes {bits}-bit weights with scales per group or channel and float activations"
    return f"{divisor} does not divide the {size} columns of a group" if size % divisor or spec.K % size else None


def by_group(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Return the codes with the columns of each group side by side, and their order; None where they lie so already."""
    if bool((q.group_K.diff() >= 0).all()):
        return q.codes, None
    order = q.group_K.argsort(stable=True)
    return q.codes[:, order], order


def even_groups(q: QTensor) -> bool:
    """Return whether all groups have the same number of columns: a peer's activation order need not see to it."""
    K, G = q.codes.shape[1], q.params.scale.shape[1]
    return q.g_idx is None or bool((torch.bincount(q.g_idx, minlength=G) * G == K).all())


def in_file_order(codes: Tensor, order: Tensor | None) -> Tensor:
    """Undo `by_group`."""
    return codes.contiguous() if order is None else torch.empty_like(codes).index_copy_(1, order, codes)


def centred(q: QTensor) -> bool:
    """Return whether every zero of an 8-bit weight and of its static input is 128, so that none has to be added."""
    zeros = [Params.of(q.params).zero, *([] if q.input is None else [Params.of(q.input).zero])]
    return all(bool((zero == 128).all()) for zero in zeros)


def avx512() -> bool:
    """Say whether torch uses this CPU's AVX-512."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def many_rows() -> int:
    """Return the most rows that go to a packed product on this CPU."""
    return MANY_ROWS.get(torch.backends.cpu.get_cpu_capability(), _MANY_ROWS)


def has_vnni() -> bool:
    """Say whether this CPU has int8 dot products (AVX512-VNNI or AVX-VNNI)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))
