"""What the 32 lanes of a warp do together: shuffle, redux, ldmatrix, mma.

Fragments (PTX ISA, "Matrix fragments for mma.m16n8k*"): lane = 4 * row8 + quad, row8 0..7, quad 0..3. With p elements
in a register (p = 1 for tf32, 2 for 16-bit, 4 for 8-bit) and k = 8 * p columns of A:

    A register r, element e: row  row8 + 8 * (r % 2),  column  p * quad + e + (k / 2) * (r // 2)
    B register r, element e: row  p * quad + e + (k / 2) * r,  column  row8
    C register r:            row  row8 + 8 * (r // 2),  column  2 * quad + r % 2

A product is summed in float64 and rounded once to float32, which no order of summation on a GPU can better.
Not here: shared-memory races and banks (shared.py).
"""

from __future__ import annotations

import re

import numpy as np

from .machine import WARP, Action, Builder, Machine, Mask
from .program import Instruction, PtxError, items
from .scalars import TYPES, Array, widen

LANE = np.arange(WARP)


def shuffle(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`shfl.sync.bfly.b32 d, a, b, c, -1`: take a's value from another lane (PTX ISA, shfl.sync, its pseudocode)."""
    if ins.operands[4] not in ("-1", "0xffffffff", "0xFFFFFFFF"):
        raise PtxError(f"{ins.where()}: only shuffles of the whole warp are known")
    registers = ins.operands[0].split("|")
    write = machine.target(ins, registers[0])
    write_valid = machine.target(ins, registers[1]) if len(registers) > 1 else None
    value, offset, clamp = (machine.source(ins, o, TYPES["u32"]) for o in ins.operands[1:4])
    lane = np.tile(LANE, machine.count // WARP)

    def act(mask: Mask) -> None:
        machine.whole_warps(ins, mask)
        step, c = offset().astype(np.int64) & 31, clamp().astype(np.int64)
        segment, low = (c >> 8) & 31, c & 31
        first = lane & segment
        last = first | (low & ~segment)
        origin = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": first | (step & ~segment),
        }[match["mode"]]
        valid = origin >= last if match["mode"] == "up" else origin <= last
        origin = np.where(valid, origin, lane)
        source = np.arange(machine.count) - lane + origin
        write(np.broadcast_to(value(), (machine.count,))[source], mask)
        if write_valid is not None:
            write_valid(np.broadcast_to(valid, (machine.count,)), mask)

    return act


def reduce(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`redux.sync.add.s32 d, a, -1`: the sum over the warp, which wraps, or its least or largest, for every lane."""
    write = machine.target(ins, ins.operands[0])
    value = machine.source(ins, ins.operands[1], TYPES[match["type"]])
    lanes = machine.source(ins, ins.operands[2], TYPES["u32"])
    over = {"add": np.add, "min": np.minimum, "max": np.maximum}[match["op"]]

    def act(mask: Mask) -> None:
        machine.whole_warps(ins, mask)
        if (lanes() != 0xFFFFFFFF).any():
            raise PtxError(f"{ins.where()}: only reductions of the whole warp are known")
        a = np.broadcast_to(value(), (machine.count,))
        write(over.reduce(a.reshape(-1, WARP), 1, dtype=a.dtype).repeat(WARP), mask)

    return act


def load_matrix(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`ldmatrix...x4.b16 {a, b, c, d}, [row]`: 8x8 matrices of 16-bit elements; lanes 8i..8i+7 hold matrix i's rows."""
    count = int(match["count"])
    registers = items(ins.operands[0])
    if len(registers) != count:
        raise PtxError(f"{ins.where()}: {len(registers)} registers for {count} matrices")
    address = machine.address(ins, ins.operands[1], 32)
    writers = [machine.target(ins, r) for r in registers]

    def act(mask: Mask) -> None:
        warps = machine.whole_warps(ins, mask)
        lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        rows = address()[lanes]
        machine.shared.count_phases("ldmatrix", rows, 16, lanes // 8)
        moved = machine.shared.load(ins, rows, 16, lanes).view(np.uint16)
        matrices = moved.reshape(len(warps), count, 8, 8)
        if match["trans"]:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        for i, write in enumerate(writers):
            values = np.zeros((machine.count // WARP, WARP), np.uint32)
            values[warps] = pairs[:, i]
            write(values.reshape(-1), mask)

    return act


def _bits(machine: Machine, ins: Instruction, operand: str, count: int) -> list:
    registers = items(operand)
    if len(registers) != count:
        raise PtxError(f"{ins.where()}: {len(registers)} registers where the shape has {count}")
    return [machine.source(ins, r, TYPES["b32"]) for r in registers]


def _elements(bits: list[Array], kind: str, threads: int) -> Array:
    """Return `[threads, registers, elements]` of a fragment as float64."""
    stacked = np.stack([np.broadcast_to(b, (threads,)) for b in bits], axis=1)
    if kind == "tf32":  # the tensor core reads sign, exponent and the 10 upper bits of the fraction
        return (stacked & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    scalar = TYPES[kind]
    split: Array = stacked.view(scalar.dtype).reshape(*stacked.shape, 32 // scalar.bits)
    return widen(split, scalar)


# Axes below: warp, row8, quad, then the register number split into r // 2 and r % 2, then the element.


def _a_matrix(a: Array) -> Array:
    p = a.shape[-1]
    return a.reshape(-1, 8, 4, 2, 2, p).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * p)


def _b_matrix(b: Array) -> Array:
    p = b.shape[-1]
    return b.reshape(-1, 8, 4, 2, p).transpose(0, 3, 2, 4, 1).reshape(-1, 8 * p, 8)


def _c_matrix(c: Array) -> Array:
    return c.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)


def _lanes(D: Array) -> Array:
    """Undo `_c_matrix`: `[threads, 4]`."""
    return D.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def multiply(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 D, A, B, C`: D = A B + C for each warp."""
    kind, k = match["a"], int(match["k"])
    per = {"tf32": 1, "f16": 2, "bf16": 2, "s8": 4}[kind]
    integer = per == 4
    if match["a"] != match["b"] or k != 8 * per or match["d"] != match["c"] or (match["d"] == "s32") != integer:
        raise PtxError(f"{ins.where()}: not an mma that is known")
    if match["sat"] and not integer:
        raise PtxError(f"{ins.where()}: .satfinite is for integers")
    out = [machine.target(ins, r) for r in items(ins.operands[0])]
    a_bits, b_bits, c_bits = (_bits(machine, ins, o, n) for o, n in zip(ins.operands[1:], (4, 2, 4), strict=True))
    accumulator = TYPES[match["d"]]

    def act(mask: Mask) -> None:
        machine.whole_warps(ins, mask)
        a, b = (_elements([s() for s in bits], kind, machine.count) for bits in (a_bits, b_bits))
        c: Array = np.stack([np.broadcast_to(s(), (machine.count,)) for s in c_bits], axis=-1).view(accumulator.dtype)
        D: Array = _a_matrix(a) @ _b_matrix(b) + _c_matrix(c)
        if integer:
            D = np.clip(D, -(2**31), 2**31 - 1) if match["sat"] else (D.astype(np.int64) & 0xFFFFFFFF)
            D = D.astype(np.int64).astype(np.uint32).view(np.int32)
        lanes = _lanes(D.astype(accumulator.dtype))
        for r, write in enumerate(out):
            write(np.ascontiguousarray(lanes[:, r]), mask)

    return act


RULES: list[tuple[str, Builder]] = [
    (r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32", shuffle),
    (r"redux\.sync\.(?P<op>add|min|max)\.(?P<type>[su]32)", reduce),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?:\.(?P<trans>trans))?\.shared(?:::cta)?\.b16", load_matrix),
    (
        r"mma\.sync\.aligned\.m16n8k(?P<k>\d+)\.row\.col(?:\.(?P<sat>satfinite))?"
        r"\.(?P<d>f32|s32)\.(?P<a>f16|bf16|tf32|s8)\.(?P<b>f16|bf16|tf32|s8)\.(?P<c>f32|s32)",
        multiply,
    ),
]
