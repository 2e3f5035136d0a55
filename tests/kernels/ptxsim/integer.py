"""Integer, bit and predicate instructions, per thread: add to lop3, compare and select, mov.

Arithmetic wraps at the type's width. Semantics follow the PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift
Instructions" and "Comparison and Selection Instructions".
Not here: floating point (floating.py), conversions (convert.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .machine import Action, Builder, Machine, Mask, Source
from .program import Instruction, PtxError, items
from .scalars import SIGNED, TYPES, UNSIGNED, Array, Scalar, widen

Operation = Callable[..., Array]


def elementwise(ins: Instruction, machine: Machine, scalars: list[Scalar], f: Operation) -> Action:
    """Return an action that writes `f(operands...)` to operand 0; `scalars` are the types of the operands after it."""
    if len(ins.operands) != len(scalars) + 1:
        raise PtxError(f"{ins.where()}: {len(ins.operands)} operands, {len(scalars) + 1} expected")
    write = machine.target(ins, ins.operands[0])
    sources: list[Source] = [machine.source(ins, o, s) for o, s in zip(ins.operands[1:], scalars, strict=True)]
    return lambda mask: write(f(*(read() for read in sources)), mask)


def _wide(values: Array) -> Array:
    return values.astype(np.int64 if values.dtype.kind == "i" else np.uint64)


def _high(a: Array, b: Array) -> Array:
    return (_wide(a) * _wide(b) >> (a.itemsize * 8)).astype(a.dtype)


def _quotient(a: Array, b: Array) -> Array:
    """Divide towards zero; by zero all bits are set, as GPUs do."""
    if a.dtype.kind == "u":
        return np.where(b == 0, a.dtype.type(~a.dtype.type(0)), a // np.where(b == 0, 1, b).astype(b.dtype))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    down = a // safe
    up = (down < 0) & (down * safe != a)
    return np.where(b == 0, a.dtype.type(-1), down + up.astype(a.dtype)).astype(a.dtype)


BINARY: dict[str, Operation] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": _high,
    "mul.wide": lambda a, b: _double(a) * _double(b),
    "div": _quotient,
    "rem": lambda a, b: np.where(b == 0, a, a - _quotient(a, b) * b),
    "min": np.minimum,
    "max": np.maximum,
}
LOGIC: dict[str, Operation] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARE: dict[str, Operation] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _double(values: Array) -> Array:
    table = SIGNED if values.dtype.kind == "i" else UNSIGNED
    return values.astype(table[values.itemsize * 16])


def binary(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`add.s32 d, a, b`; `mul.wide.s32` doubles the width, `mul.hi` keeps the upper half."""
    scalar = TYPES[match["type"]]
    if (match["op"] == "mul.hi" and scalar.bits == 64) or (match["op"] == "mul.wide" and scalar.bits == 64):
        raise PtxError(f"{ins.where()}: not known at 64 bits")
    return elementwise(ins, machine, [scalar, scalar], BINARY[match["op"]])


def multiply_add(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`mad.lo.s32 d, a, b, c`; the sum of `mad.wide` has twice the width."""
    scalar = TYPES[match["type"]]
    total = Scalar(scalar.kind, scalar.bits * 2) if match["half"] == "wide" else scalar
    if total.bits > 64:
        raise PtxError(f"{ins.where()}: not known at 64 bits")
    f = BINARY[f"mul.{match['half']}"]
    return elementwise(ins, machine, [scalar, scalar, total], lambda a, b, c: f(a, b) + c)


def unary(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`neg`, `abs` of signed integers; the most negative value stays itself."""
    f = {"neg": lambda a: -a, "abs": lambda a: np.where(a < 0, -a, a)}[match["op"]]
    return elementwise(ins, machine, [TYPES[match["type"]]], f)


def logic(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`and.b32`, `or.pred`, ..."""
    scalar = TYPES[match["type"]]
    return elementwise(ins, machine, [scalar, scalar], LOGIC[match["op"]])


def complement(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`not.b32 d, a`."""
    return elementwise(ins, machine, [TYPES[match["type"]]], lambda a: ~a)


def shift(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`shl.b32`, `shr.u32`, `shr.s32`: amounts of the width and more shift everything out."""
    scalar = TYPES[match["type"]]
    if match["op"] == "shl" and scalar.kind == "s":
        raise PtxError(f"{ins.where()}: shl has no signed form")

    def f(a: Array, n: Array) -> Array:
        amount = np.minimum(n, scalar.bits - 1).astype(a.dtype)
        moved = a << amount if match["op"] == "shl" else a >> amount
        return moved if scalar.kind == "s" else np.where(n >= scalar.bits, a.dtype.type(0), moved)

    return elementwise(ins, machine, [scalar, TYPES["u32"]], f)


def funnel_shift(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`shf.l.wrap.b32 d, lo, hi, n`: 32 bits of the 64-bit word hi:lo, shifted."""

    def f(low: Array, high: Array, n: Array) -> Array:
        word = high.astype(np.uint64) << np.uint64(32) | low
        amount = (n & np.uint32(31) if match["clamp"] == "wrap" else np.minimum(n, 32)).astype(np.uint64)
        moved = word << amount >> np.uint64(32) if match["way"] == "l" else word >> amount
        return moved.astype(np.uint32)

    return elementwise(ins, machine, [TYPES["u32"]] * 3, f)


def extract(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`bfe.u32 d, a, position, length`: a bit field, extended by its top bit where signed."""
    scalar = TYPES[match["type"]]

    def f(a: Array, position: Array, length: Array) -> Array:
        p, n = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
        word = a.astype(np.int64)  # sign-extended where signed, so that bits past 31 repeat the sign
        field = word >> np.minimum(p, 63) & ((np.int64(1) << np.minimum(n, 62)) - 1)
        if scalar.kind == "s":
            top = word >> np.clip(p + n - 1, 0, 31) & 1
            field = np.where((n < 32) & (top == 1), field | -(np.int64(1) << np.minimum(n, 62)), field)
        return np.where(n == 0, 0, field).astype(scalar.dtype)

    return elementwise(ins, machine, [scalar, TYPES["u32"], TYPES["u32"]], f)


def insert(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`bfi.b32 f, a, b, position, length`: b with a's low bits put at the position."""

    def f(a: Array, b: Array, position: Array, length: Array) -> Array:
        p, n = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
        low, count = np.minimum(p, 32), np.minimum(n, 32)
        field = ((np.uint64(1) << count) - np.uint64(1)) << low
        mixed = (b.astype(np.uint64) & ~field) | (a.astype(np.uint64) << low & field)
        return mixed.astype(np.uint32)

    return elementwise(ins, machine, [TYPES["u32"]] * 4, f)


def lookup(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`lop3.b32 d, a, b, c, table`: bit by bit, the table's bit number 4a + 2b + c."""
    try:
        table = int(ins.operands[4], 0)
    except (IndexError, ValueError) as e:
        raise PtxError(f"{ins.where()}: the table is no constant") from e

    def f(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    short = Instruction(ins.opcode, ins.operands[:4], ins.guard, ins.negated, ins.line, ins.source)
    return elementwise(short, machine, [TYPES["u32"]] * 3, f)


def permute(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`prmt.b32 d, a, b, selector`: four bytes of b:a by nibble; bit 3 of a nibble repeats the byte's sign instead."""

    def f(a: Array, b: Array, selector: Array) -> Array:
        both = b.astype(np.uint64) << np.uint64(32) | a
        out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return out.astype(np.uint32)

    return elementwise(ins, machine, [TYPES["u32"]] * 3, f)


def count_bits(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`popc.b32`, `clz.b32`: a count, always in a 32-bit register."""
    scalar = TYPES[match["type"]]

    def leading(a: Array) -> Array:
        n = np.zeros(a.shape, np.uint32)
        for bit in range(scalar.bits):
            n += (a >> a.dtype.type(bit) == 0).astype(np.uint32)
        return n

    f = leading if match["op"] == "clz" else lambda a: np.bitwise_count(a).astype(np.uint32)
    return elementwise(ins, machine, [scalar], f)


def compare(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`setp.lt.s32 p, a, b`; `setp.lt.and.s32 p, a, b, q` combines with q. Floats: `u` forms are true for NaN."""
    scalar, name = TYPES[match["type"]], match["op"]
    if scalar.kind == "b" and name not in ("eq", "ne"):
        raise PtxError(f"{ins.where()}: bits have no order")
    if name in UNSIGNED_COMPARE:
        if scalar.kind != "u":
            raise PtxError(f"{ins.where()}: {name} is for unsigned integers")
        name = UNSIGNED_COMPARE[name]
    unordered = scalar.is_float and name.endswith("u")
    if name.removesuffix("u") not in COMPARE or (name.endswith("u") and not scalar.is_float):
        raise PtxError(f"{ins.where()}: unknown comparison")
    test = COMPARE[name.removesuffix("u")]

    def f(a: Array, b: Array, *rest: Array) -> Array:
        if scalar.is_float:
            a, b = widen(a, scalar), widen(b, scalar)
            nan = np.isnan(a) | np.isnan(b)
            result = test(a, b) | nan if unordered else test(a, b) & ~nan
        else:
            result = test(a, b)
        return LOGIC[match["combine"]](result, rest[0]) if rest else result

    rest = [TYPES["pred"]] if match["combine"] else []
    return elementwise(ins, machine, [scalar, scalar, *rest], f)


def select(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`selp.b32 d, a, b, p`: a where p."""
    scalar = Scalar("b", TYPES[match["type"]].bits)  # only bits move, and `selp.f32` takes 0f constants too
    return elementwise(ins, machine, [scalar, scalar, TYPES["pred"]], _choose)


def _choose(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def move(ins: Instruction, match: re.Match[str], machine: Machine) -> Action:
    """`mov.b32 d, a`; `mov.b32 {lo, hi}, a` takes a register apart, `mov.b32 d, {lo, hi}` puts it together."""
    scalar = TYPES[match["type"]]
    if scalar.is_float:
        scalar = Scalar("b", scalar.bits)
    if len(ins.operands) != 2:
        raise PtxError(f"{ins.where()}: {len(ins.operands)} operands")
    to, origin = ins.operands
    if to.startswith("{"):
        writers = [machine.target(ins, r) for r in items(to)]
        part = UNSIGNED[scalar.bits // len(writers)]
        read = machine.source(ins, origin, scalar)

        def unpack(mask: Mask) -> None:
            parts = np.ascontiguousarray(read()).view(part).reshape(-1, len(writers))
            for i, write in enumerate(writers):
                write(np.ascontiguousarray(parts[:, i]), mask)

        return unpack
    if origin.startswith("{"):
        registers = items(origin)
        sources = [machine.source(ins, r, Scalar("b", scalar.bits // len(registers))) for r in registers]
        join = machine.target(ins, to)

        def pack(mask: Mask) -> None:
            parts = np.stack(np.broadcast_arrays(*(read() for read in sources)), axis=-1)
            join(np.ascontiguousarray(parts).view(scalar.dtype).reshape(-1), mask)

        return pack
    return elementwise(ins, machine, [scalar], lambda a: a)


_INT = r"(?P<type>[su](?:16|32|64))"
_BITS = r"(?P<type>b(?:16|32|64)|pred)"

RULES: list[tuple[str, Builder]] = [
    (rf"(?P<op>add|sub|mul\.lo|mul\.hi|mul\.wide|div|rem|min|max)\.{_INT}", binary),
    (rf"mad\.(?P<half>lo|hi|wide)\.{_INT}", multiply_add),
    (r"(?P<op>neg|abs)\.(?P<type>s(?:16|32|64))", unary),
    (rf"(?P<op>and|or|xor)\.{_BITS}", logic),
    (rf"not\.{_BITS}", complement),
    (r"(?P<op>shl|shr)\.(?P<type>[bsu](?:16|32|64))", shift),
    (r"shf\.(?P<way>l|r)\.(?P<clamp>wrap|clamp)\.b32", funnel_shift),
    (r"bfe\.(?P<type>[su]32)", extract),
    (r"bfi\.b32", insert),
    (r"lop3\.b32", lookup),
    (r"prmt\.b32", permute),
    (r"(?P<op>popc|clz)\.(?P<type>b(?:32|64))", count_bits),
    (
        r"setp\.(?P<op>[a-z]+?)(?:\.(?P<combine>and|or|xor))?(?:\.ftz)?\.(?P<type>[bsu](?:16|32|64)|f16|f32|bf16)",
        compare,
    ),
    (r"selp\.(?P<type>[bsu](?:16|32|64)|f32|f16)", select),
    (r"mov\.(?P<type>[bsu](?:16|32|64)|f32|f16|pred)", move),
]
