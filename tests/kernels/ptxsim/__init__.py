"""A simulator of the PTX that Triton emits for sm_80: a test tool that runs compiled kernels on a machine with no GPU.

`simulate` runs every thread of every CTA in numpy and tells what a GPU would have computed, and what it would have
done: sectors of global memory asked for, shared-memory wavefronts, races between warps. It says nothing of time.

    program.py    text -> instructions            machine.py   threads, registers, branches, barriers
    scalars.py    types and rounding              memory.py    global memory, sectors
    integer.py    floating.py    convert.py       shared.py    shared memory, races, cp.async, banks
    transfer.py   ld, st, cp.async                warp.py      shfl, ldmatrix, mma

Each file of instructions ends with its RULES: patterns of whole opcodes. An opcode that no rule matches in full is an
error that names it and its line, before anything runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import convert, floating, integer, transfer, warp
from .machine import Action, Builder, Machine
from .memory import GlobalMemory, Traffic
from .program import Instruction, PtxError, parse
from .shared import Wavefronts

__all__ = ["PtxError", "Run", "Traffic", "Wavefronts", "simulate"]

RULES: list[tuple[re.Pattern[str], Builder]] = [
    (re.compile(pattern), builder)
    for module in (integer, floating, convert, transfer, warp)
    for pattern, builder in module.RULES
]
CONTROL = re.compile(r"bra(\.uni)?|bar\.sync|bar\.warp\.sync|ret|exit")
"""What machine.py does itself."""
NOTHING = re.compile(r"membar\.(cta|gl)|fence\.(acq_rel|sc)\.(cta|gpu)")
"""Fences: nothing to do, for here memory is always in program order; warps are ordered by barriers alone."""


@dataclass(frozen=True)
class Run:
    """What a launch left behind.

    faults: place and kind -> how many bytes (shared memory) or warp accesses (global); empty in a correct kernel.
    executed: opcode -> times issued for a group of threads.
    """

    memory: GlobalMemory
    faults: Counter[str]
    wavefronts: dict[str, Wavefronts]
    executed: Counter[str]

    def array(self, name: str) -> np.ndarray:
        """Return an argument's buffer as the kernel left it."""
        return self.memory.array(name)

    def traffic(self, name: str, kind: str = "load") -> Traffic:
        """Return what was moved from (`load`) or to (`store`) an argument's buffer."""
        return self.memory.traffic(name, kind)


def simulate(ptx: str, grid: tuple[int, ...], args: Mapping[str, np.ndarray | int | float], shared: int) -> Run:
    """Run the kernel of a PTX module.

    args: by any names, in the order of the kernel's parameters: an array for a pointer (copied; bfloat16 as uint16),
    else a number. Parameters past them (Triton adds two pointers for scratch memory) are null.
    shared: dynamic shared memory per CTA in bytes.
    Raises PtxError for what is not known, an access out of bounds or misaligned, a deadlock, an endless loop.
    """
    program = parse(ptx)
    if len(args) > len(program.params):
        raise PtxError(f"{len(args)} arguments for {len(program.params)} parameters")
    memory = GlobalMemory()
    values = [_bits(memory, n, v, t) for (n, v), t in zip(args.items(), program.params.values(), strict=False)]
    values += [0] * (len(program.params) - len(values))
    memory.freeze()
    x, y, z = (*grid, 1, 1)[:3]
    machine = Machine(program, (x, y, z), dict(zip(program.params, values, strict=True)), memory, shared)
    machine.run([_translate(ins, machine) for ins in program.instructions])
    waves = {kind: Wavefronts(**counts) for kind, counts in machine.shared.wavefronts.items()}
    return Run(memory, machine.shared.faults + memory.faults, waves, machine.executed)


def _bits(memory: GlobalMemory, name: str, value: np.ndarray | int | float, kind: str) -> int:
    """Return the bits of an argument; place arrays in memory."""
    if isinstance(value, np.ndarray):
        if kind not in ("u64", "b64"):
            raise PtxError(f"argument {name!r} is an array, its parameter is .{kind}")
        return memory.add(name, value)
    if kind in ("u64", "b64") and value > 0xFFFFFFFF:
        raise PtxError(f"argument {name!r}: pointers are given as arrays")
    if kind == "f32" or isinstance(value, float):
        return int(np.float32(value).view(np.uint32))
    return int(value)


def _translate(ins: Instruction, machine: Machine) -> Action:
    if CONTROL.fullmatch(ins.opcode):
        return _unreachable
    if NOTHING.fullmatch(ins.opcode):
        return lambda mask: None
    for pattern, builder in RULES:
        match = pattern.fullmatch(ins.opcode)
        if match is not None:
            return builder(ins, match, machine)
    raise PtxError(f"{ins.where()}: unknown instruction")


def _unreachable(mask: object) -> None:
    raise AssertionError("control flow is the machine's")
