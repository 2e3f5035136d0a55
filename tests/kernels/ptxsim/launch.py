"""From a Triton kernel to a simulated launch with torch tensors: compile for sm_80 without a GPU, run, read back.

bfloat16, which numpy lacks, travels as int16 bits. Not here: the simulator, which knows neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import Run, simulate

SM80 = GPUTarget("cuda", 80, 32)


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX, its dynamic shared memory in bytes, and the names of its run-time parameters in order."""

    ptx: str
    shared: int
    names: tuple[str, ...]


def compile_sm80(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], aligned: tuple[str, ...], **options: Any
) -> Compiled:
    """Compile for sm_80.

    signature: type of every run-time parameter (`*fp16`, `i32`); constants: the constexpr ones; aligned: pointers and
    integers that 16 divides; options: `num_warps`, `num_stages`.
    """
    kinds = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=dict(constants), attrs=attributes)
    built = triton.compile(source, target=SM80, options={"enable_fp_fusion": True, **options})
    return Compiled(built.asm["ptx"], built.metadata.shared, tuple(n for n in kinds if n not in constants))


@dataclass(frozen=True)
class Launch:
    """A finished run, and the tensors as the kernel left them."""

    run: Run
    tensors: dict[str, Tensor]


def launch(compiled: Compiled, grid: tuple[int, ...], args: Mapping[str, Any]) -> Launch:
    """Simulate a launch; `args` are tensors and numbers by parameter name. The tensors given are left alone."""
    if set(args) != set(compiled.names):
        raise TypeError(f"arguments {sorted(args)}, the kernel takes {sorted(compiled.names)}")
    given = {n: args[n] for n in compiled.names}
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    run = simulate(compiled.ptx, grid, {n: _array(v) for n, v in given.items()}, compiled.shared)
    after = {n: torch.from_numpy(run.array(n)).view(t.dtype) for n, t in tensors.items()}
    return Launch(run, after)


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    raw = value.contiguous()
    return (raw.view(torch.int16) if raw.dtype == torch.bfloat16 else raw).numpy()
