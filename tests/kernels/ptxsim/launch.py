"""Triton kernels in the simulator: a stand-in for a jitted kernel that is launched with torch tensors on the CPU.

`SimulatedKernel` takes the place of a `@triton.jit` function: `kernel[grid](...)` works out what a launch fixes as
Triton's own launcher does (types; which arguments are multiples of 16 or equal to 1), compiles for sm_80, runs the PTX
and writes the results back into the tensors. So host code that launches kernels runs unchanged, on the same PTX.

bfloat16, which numpy lacks, travels as int16 bits. Not here: the simulator, which knows neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmq_kernels.aot import Build, Compiled, compile_for

from . import Run, simulate

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name, what was run, and what the simulator saw."""

    name: str
    grid: tuple[int, ...]
    compiled: Compiled
    run: Run


class SimulatedKernel:
    """A jitted kernel whose launches are simulated.

    launches: what was run, in order; several kernels may share one list. mutate: changes the PTX before it runs.
    """

    def __init__(
        self, kernel: Any, launches: list[Launched] | None = None, mutate: Callable[[str], str] = lambda ptx: ptx
    ) -> None:
        self.kernel, self.mutate = kernel, mutate
        self.launches: list[Launched] = [] if launches is None else launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self._launch(grid, args, named)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        options = {n: named.pop(n) for n in OPTIONS if n in named}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        build = build_of(self.kernel, given, options)
        compiled = compile_for(build, "sm_80")
        values = {name: given[name] for name, _ in compiled.parameters}
        flat = {name: flat_of(v) for name, v in values.items() if isinstance(v, Tensor)}
        arrays = _arrays(flat)
        run = simulate(self.mutate(compiled.ptx), grid, values | arrays, compiled.shared)
        for name, tensor in flat.items():
            tensor.copy_(torch.from_numpy(run.array(name)).view(tensor.dtype))
        self.launches.append(Launched(compiled.name, grid, compiled, run))


def build_of(kernel: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> Build:
    """Return what a launch with these arguments fixes, by the rules of Triton's launcher.

    None and (unless the kernel says otherwise) the integer 1 become constants.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    unaligned = []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            constants[name] = value
            continue
        types[name] = _type(value)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if not special or isinstance(value, float) or number % 16:
            unaligned.append(name)
    return Build(kernel, types, constants, tuple(unaligned), options)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def flat_of(tensor: Tensor) -> Tensor:
    """Return the memory from a tensor's first element to its last, as a tensor of one dimension that shares it."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.as_strided(tensor, (span if tensor.numel() else 0,), (1,))


def _arrays(flat: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the bits of tensors; the same memory given twice is one array, as kernels see one address."""
    found: dict[tuple[int, int], np.ndarray] = {}
    arrays = {}
    for name, tensor in flat.items():
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(begin < b and a < end and (a, b) != (begin, end) for a, b in found):
            raise TypeError(f"{name} overlaps another argument in part, which the simulator does not model")
        bits = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        arrays[name] = found.setdefault((begin, end), bits)
    return arrays
