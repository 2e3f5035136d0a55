"""Hand-written PTX around a few statements: what the simulator's own tests run.

`per_thread` gives each of up to 1024 threads one value of every input and stores one result.
"""

from __future__ import annotations

import numpy as np
from ptxsim import Run, simulate

REGISTERS = """
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
"""


def module(body: str, params: int, threads: int) -> str:
    """Return a kernel `k` with pointers `p0`, `p1`, ... and a body; `%r0` holds the thread's number in the CTA."""
    declared = ",\n".join(f"    .param .u64 .ptr .global .align 1 p{i}" for i in range(params))
    return f"""
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{declared}
)
.reqntid {threads}
{{
{REGISTERS}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""


def kernel(body: str, *arrays: np.ndarray, threads: int = 32, ctas: int = 1, shared: int = 0) -> Run:
    """Run a body on arrays named p0, p1, ...; their addresses are in `%rd0`, `%rd1`, ..."""
    pointers = "".join(f"    ld.param.b64 %rd{i}, [p{i}];\n" for i in range(len(arrays)))
    ptx = module(pointers + body, len(arrays), threads)
    return simulate(ptx, (ctas,), {f"p{i}": a for i, a in enumerate(arrays)}, shared)


def per_thread(statement: str, *inputs: np.ndarray, out: type) -> np.ndarray:
    """Run `statement` in one thread per element; inputs are in `a`, `b`, `c`, the result in `d`, registers that fit."""
    body, arrays = "", [np.ascontiguousarray(i) for i in inputs]
    names = "abcd"
    for i, array in enumerate([*arrays, np.zeros(len(arrays[0]), out)]):
        bits = array.itemsize * 8
        name = names[i] if i < len(arrays) else "d"
        body += f"    .reg .b{max(bits, 16)} {name};\n"
        body += f"    mad.wide.u32 %rd{10 + i}, %r0, {array.itemsize}, %rd{i};\n"
        if i < len(arrays):
            body += f"    ld.global.b{bits} {name}, [%rd{10 + i}];\n"
    bits = np.dtype(out).itemsize * 8
    body += f"    {statement}\n    st.global.b{bits} [%rd{10 + len(arrays)}], d;\n"
    run = kernel(body, *arrays, np.zeros(len(arrays[0]), out), threads=len(arrays[0]))
    return run.array(f"p{len(arrays)}")


EDGES = [0, 1, 2, 31, 32, 33, 63, 64, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def integers(dtype: type, seed: int, count: int = 128) -> np.ndarray:
    """Random bit patterns, edges first and in every pairing of small and large magnitude."""
    bits = np.dtype(dtype).itemsize * 8
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 1 << 64, count, dtype=np.uint64)
    values >>= draw.integers(0, 64, count, dtype=np.uint64)
    edges = np.roll(np.array(EDGES, np.uint64), seed)
    values[: len(edges)] = edges
    return (values & np.uint64((1 << bits) - 1)).astype(f"u{bits // 8}").view(dtype)
