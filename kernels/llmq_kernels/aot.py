"""Compile a kernel for a GPU that is not here: PTX and machine code from Triton's own compiler, no driver needed.

    compile_for(build, "sm_80") -> Compiled(ptx, binary, shared, num_warps, parameters, ...)

A Build is what a launch fixes: types of the arguments, compile-time constants, which arguments are multiples of 16 (an
address or a number), launch options. Compiled files go through Triton's own cache.

Not here: what the machine code is made of (facts.py), which kernels are compiled (cases.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmq_kernels.launch import OPTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Build:
    """A kernel and what a launch fixes of it.

    types: by argument, "*fp16", "*i32", "i32" ...; constants: the rest. unaligned: arguments not known to be multiples
    of 16. options: num_warps, num_stages.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    unaligned: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target.

    ptx: the text of the program ("" on AMD); binary: cubin or hsaco; asm: every stage by name.
    shared: bytes of shared memory per program. parameters: (name, type) in the order of the entry's parameters; Triton
    appends two scratch pointers, which these kernels do not use.
    """

    name: str
    target: str
    ptx: str
    binary: bytes
    asm: Mapping[str, Any]
    shared: int
    num_warps: int
    parameters: tuple[tuple[str, str], ...]


def compile_for(build: Build, target: str) -> Compiled:
    """Compile for one of TARGETS, whether or not such a device is present."""
    names = build.kernel.arg_names
    signature = {n: build.types.get(n, "constexpr") for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if _aligned(n, build)}
    source = ASTSource(build.kernel, signature, constexprs=dict(build.constants), attrs=attrs)
    kernel = triton.compile(source, target=TARGETS[target], options={**OPTIONS, **build.options})
    binary = kernel.asm["cubin"] if "cubin" in kernel.asm else kernel.asm["hsaco"]
    meta = kernel.metadata
    parameters = tuple((n, signature[n]) for n in names if signature[n] != "constexpr")
    asm = dict(kernel.asm)
    return Compiled(meta.name, target, asm.get("ptx", ""), binary, asm, meta.shared, meta.num_warps, parameters)


def _aligned(name: str, build: Build) -> bool:
    return name in build.types and name not in build.unaligned
