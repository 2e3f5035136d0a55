"""Loads, stores and cp.async: what moves between registers, shared and global memory.

`ld.param` reads the launch's arguments. A load fills its vector's registers from consecutive addresses. `cp.async`
copies `cp-size` bytes, of which the last `cp-size - src-size` are zero; Triton asks for all or none.
Cache hints change no value: they are checked against the list below and then ignored.
Not here: bounds, sectors (memory.py), races and banks (shared.py), ldmatrix (warp.py).
"""

from __future__ import annotations

import re

import numpy as np

from .machine import Action, Builder, Machine, Mask
from .program import Instruction, PtxError, items
from .scalars import TYPES, UNSIGNED, Array, Scalar

CACHE_HINTS = {
    "ca", "cg", "cs", "cv", "wb", "wt", "nc",
    "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::no_allocate",
    "L2::evict_first", "L2::evict_last", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip


def _threads(machine: Machine, mask: Mask) -> Array:
    return np.arange(machine.count) if mask is None else np.flatnonzero(mask)


def _hints(ins: Instruction, text: str) -> None:
    unknown = set(filter(None, text.split("."))) - CACHE_HINTS
    if unknown:
        raise PtxError(f"{ins.where()}: unknown modifier {sorted(unknown)[0]}")


def _element(ins: Instruction, vector: str | None, name: str, registers: list[str]) -> tuple[Scalar, int]:
    """Return the type of one element and the bytes of all."""
    if len(registers) != int((vector or "v1")[1:]):
        raise PtxError(f"{ins.where()}: {len(registers)} registers for {vector or 'one element'}")
    return TYPES[name], len(registers) * TYPES[name].bits // 8


def load_param(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`ld.param.b32 %r1, [kernel_param_0]`: the argument, the same for every thread."""
    register, name = ins.operands[0], ins.operands[1].strip("[] ")
    if name not in machine.params:
        raise PtxError(f"{ins.where()}: no parameter {name!r}")
    bits = TYPES[match["type"]].bits
    value = np.array([machine.params[name] & ((1 << bits) - 1)], np.uint64).astype(UNSIGNED[bits])
    write = machine.target(ins, register)
    return lambda mask: write(value, mask)


def load(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`ld.global.v4.b32 {a, b, c, d}, [address]`, with cache hints and a policy operand where they stand."""
    _hints(ins, match["hints"])
    registers = items(ins.operands[0])
    scalar, size = _element(ins, match["vector"], match["type"], registers)
    shared = match["shared"] is not None
    address = machine.address(ins, ins.operands[1], 32 if shared else 64)
    writers = [machine.target(ins, r) for r in registers]

    def act(mask: Mask) -> None:
        threads = _threads(machine, mask)
        at = address()[threads]
        if shared:
            machine.shared.count("load", at, size, threads)
            moved = machine.shared.load(ins, at, size, threads)
        else:
            moved = machine.memory.load(ins, at, size, machine.cta[threads], machine.warp[threads])
        values = np.zeros((machine.count, size), np.uint8)
        values[threads] = moved
        elements: Array = values.view(scalar.dtype)
        for i, write in enumerate(writers):
            write(np.ascontiguousarray(elements[:, i]), mask)

    return act


def store(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`st.shared.v2.b32 [address], {a, b}`; a register wider than the element gives its low bits."""
    _hints(ins, match["hints"])
    registers = items(ins.operands[1])
    scalar, size = _element(ins, match["vector"], match["type"], registers)
    shared = match["shared"] is not None
    address = machine.address(ins, ins.operands[0], 32 if shared else 64)
    sources = [machine.source(ins, r, scalar) for r in registers]

    def act(mask: Mask) -> None:
        threads = _threads(machine, mask)
        at = address()[threads]
        elements = np.stack([np.broadcast_to(read(), (machine.count,))[threads] for read in sources], axis=1)
        values = elements.view(np.uint8).reshape(len(threads), size)
        if shared:
            machine.shared.count("store", at, size, threads)
            machine.shared.store(ins, at, values, threads)
        else:
            machine.memory.store(ins, at, values, machine.cta[threads], machine.warp[threads])

    return act


def copy_async(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cp.async.cg.shared.global [to], [from], 16, src_size`: global to shared memory past the registers."""
    _hints(ins, match["hints"])
    operands = [*ins.operands]
    if "L2::cache_hint" in match["hints"]:
        operands.pop()
    size = int(operands[2], 0)
    if size not in ((16,) if match["cache"] == "cg" else (4, 8, 16)):
        raise PtxError(f"{ins.where()}: cp-size {size} is not one this instruction has")
    to, origin = machine.address(ins, operands[0], 32), machine.address(ins, operands[1], 64)
    wanted = machine.source(ins, operands[3] if len(operands) > 3 else str(size), TYPES["u32"])

    def act(mask: Mask) -> None:
        threads = _threads(machine, mask)
        real = np.broadcast_to(wanted(), (machine.count,))[threads]
        if not np.isin(real, (0, size)).all():
            raise PtxError(f"{ins.where()}: src-size is neither 0 nor {size}")
        values = np.zeros((len(threads), size), np.uint8)
        copying = threads[real > 0]
        at = origin()[copying]
        values[real > 0] = machine.memory.load(ins, at, size, machine.cta[copying], machine.warp[copying])
        destination = to()[threads]
        machine.shared.count("cp.async", destination, size, threads)
        machine.shared.issue(ins, destination, values, threads)

    return act


def commit(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cp.async.commit_group`: close the thread's open group."""
    return lambda mask: machine.shared.commit(_threads(machine, mask))


def wait(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`cp.async.wait_group N`: all but the N youngest groups have landed; `wait_all`: everything has."""
    pending = None if match["all"] else int(ins.operands[0], 0)
    return lambda mask: machine.shared.wait(_threads(machine, mask), pending)


def create_policy(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`createpolicy.fractional...`: a cache policy; no value depends on it."""
    write = machine.target(ins, ins.operands[0])
    return lambda mask: write(np.zeros(1, np.uint64), mask)


_TYPE = r"(?P<type>[busf](?:8|16|32|64)|bf16)"
_HINTS = r"(?P<hints>(?:\.(?!v\d)[A-Za-z][\w:]*)*?)"

RULES: list[tuple[str, Builder]] = [
    (rf"ld\.param\.{_TYPE}", load_param),
    (rf"ld\.(?:(?P<shared>shared)(?:::cta)?|global){_HINTS}(?:\.(?P<vector>v[24]))?\.{_TYPE}", load),
    (rf"st\.(?:(?P<shared>shared)(?:::cta)?|global){_HINTS}(?:\.(?P<vector>v[24]))?\.{_TYPE}", store),
    (r"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global(?P<hints>(?:\.L2::\w+)*)", copy_async),
    (r"cp\.async\.commit_group", commit),
    (r"cp\.async\.wait_(?:group|(?P<all>all))", wait),
    (r"createpolicy\.fractional\.L2::evict_(?:first|last|normal)(?:\.L2::evict_\w+)?\.b64", create_policy),
]
