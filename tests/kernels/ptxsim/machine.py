"""The threads of a launch: registers as arrays over all threads of all CTAs, and who runs next.

An instruction is translated once to a closure and then executed for many threads by one numpy expression. Threads that
stand at the same instruction form a group; the group at the lowest address runs, until it branches, waits, ends, or
reaches another group, and they merge. Branches may therefore diverge between CTAs, warps and lanes. One group running
ahead of another is one of the orders that a GPU may choose; what another order could change is a race, and races are
found by who touched what since the last barrier (shared.py), not by which order happened here.

Registers that a thread never wrote hold POISON, not zero: a result that depends on them is wrong here too.
Not here: what instructions mean (integer, floating, convert, transfer, warp), memory (memory.py, shared.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from .memory import GlobalMemory
from .program import Instruction, Program, PtxError
from .scalars import UNSIGNED, Array, Scalar
from .shared import SHARED_BASE, SharedMemory

Mask = Array | None
"""Which threads execute: a boolean per thread, None for all."""
Action = Callable[[Mask], None]
Source = Callable[[], Array]
Builder = Callable[[Instruction, "re.Match[str]", "Machine"], Action]

WARP = 32
POISON = 0xCDCDCDCDCDCDCDCD
STEP_LIMIT = 2_000_000


class Machine:
    """The state of one launch.

    count: threads of all CTAs, CTA-major; cta, warp: of each thread (`warp` is numbered over the launch).
    """

    def __init__(
        self, program: Program, grid: tuple[int, int, int], params: dict[str, int], memory: GlobalMemory, shared: int
    ) -> None:
        if program.threads % WARP:
            raise PtxError(f"{program.threads} threads per CTA are not whole warps")
        ctas = grid[0] * grid[1] * grid[2]
        self.program, self.grid, self.params, self.memory = program, grid, params, memory
        self.count = ctas * program.threads
        self.cta = np.repeat(np.arange(ctas), program.threads)
        self.warp = np.arange(self.count) // WARP
        self.shared = SharedMemory(ctas, shared, program.threads // WARP)
        self.registers: dict[str, Array] = {}
        self.executed: Counter[str] = Counter()
        self.steps = 0
        self.special = self._special()

    def _special(self) -> dict[str, Array]:
        tid = np.tile(np.arange(self.program.threads, dtype=np.uint32), len(self.cta) // self.program.threads)
        cta = self.cta.astype(np.uint32)
        x, y, z = (np.uint32(n) for n in self.grid)
        zero = np.zeros(self.count, np.uint32)
        return {
            "%tid.x": tid,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ntid.x": zero + np.uint32(self.program.threads),
            "%laneid": tid % np.uint32(WARP),
            "%ctaid.x": cta % x,
            "%ctaid.y": cta // x % y,
            "%ctaid.z": cta // (x * y),
            "%nctaid.x": zero + x,
            "%nctaid.y": zero + y,
            "%nctaid.z": zero + z,
            "global_smem": zero + np.uint32(SHARED_BASE),
        }

    # Operands. Translation asks for a reader or a writer once; execution calls it.

    def source(self, ins: Instruction, operand: str, scalar: Scalar) -> Source:
        """Return a reader of an operand as values of `scalar`: `[threads]`, or `[1]` for a constant.

        A register wider than the type gives its low bits. Raises PtxError for what is not declared.
        """
        if operand in self.special:
            constant: Array = self.special[operand].astype(UNSIGNED[scalar.bits]).view(scalar.dtype)
            return lambda: constant
        width = self.program.width(operand)
        if width is None:
            literal = np.array([self._literal(ins, operand, scalar)], UNSIGNED.get(scalar.bits, np.bool_))
            value: Array = literal.view(scalar.dtype)
            return lambda: value
        if width < scalar.bits or (width == 1) != (scalar.kind == "pred"):
            raise PtxError(f"{ins.where()}: {operand} has {width} bits, the instruction reads {scalar.bits}")
        registers, dtype = self.registers, scalar.dtype
        if width == scalar.bits:
            return lambda: self._read(ins, operand).view(dtype)
        unsigned = UNSIGNED[scalar.bits]
        return lambda: registers[operand].astype(unsigned).view(dtype)

    def _read(self, ins: Instruction, register: str) -> Array:
        try:
            return self.registers[register]
        except KeyError:
            raise PtxError(f"{ins.where()}: {register} is read before anything was written to it") from None

    def _literal(self, ins: Instruction, text: str, scalar: Scalar) -> int:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text) and scalar.bits == 32:
            return int(text[2:], 16)
        if re.fullmatch(r"-?\d+\.\d+", text) and scalar.kind == "f" and scalar.bits == 32:
            return int(np.float32(text).view(np.uint32))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) and scalar.kind != "f":
            return int(text.rstrip("U"), 0) & ((1 << scalar.bits) - 1)
        raise PtxError(f"{ins.where()}: {text!r} is no declared register and no constant of this type")

    def target(self, ins: Instruction, register: str) -> Callable[[Array, Mask], None]:
        """Return a writer to a register: values narrower than it are extended by their own sign.

        Threads outside the mask keep what they had. `_` swallows the value.
        """
        if register == "_":
            return lambda values, mask: None
        width = self.program.width(register)
        if width is None:
            raise PtxError(f"{ins.where()}: {register!r} is no declared register")
        dtype = UNSIGNED.get(width, np.bool_)

        def write(values: Array, mask: Mask) -> None:
            if values.dtype.itemsize * 8 != width and width > 1:
                wide = np.int64 if values.dtype.kind == "i" else np.uint64
                values = values.astype(wide).astype(dtype)
            bits = values.view(dtype)
            if len(bits) != self.count:
                bits = np.broadcast_to(bits, (self.count,))
            if mask is not None:
                old = self.registers.get(register)
                bits = np.where(mask, bits, self._poison(dtype) if old is None else old)
            self.registers[register] = bits

        return write

    @staticmethod
    def _poison(dtype: type) -> Array:
        return np.array(POISON & ((1 << (np.dtype(dtype).itemsize * 8)) - 1)).astype(dtype)

    def address(self, ins: Instruction, operand: str, bits: int) -> Source:
        """Return a reader of `[register + offset]` as int64 byte addresses."""
        match = re.fullmatch(r"\[\s*([%\w@$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if match is None:
            raise PtxError(f"{ins.where()}: cannot read the address {operand!r}")
        base, offset = self.source(ins, match.group(1), Scalar("u", bits)), int(match.group(2) or 0)
        return lambda: np.broadcast_to(base().astype(np.int64) + offset, (self.count,))

    def whole_warps(self, ins: Instruction, mask: Mask) -> Array:
        """Return the indices of the warps that execute. Raises PtxError where a warp does so only in part."""
        if mask is None:
            return np.arange(self.count // WARP)
        lanes = mask.reshape(-1, WARP)
        some = lanes.any(1)
        if (some != lanes.all(1)).any():
            raise PtxError(f"{ins.where()}: executed by a part of a warp, it needs all 32 lanes")
        return np.flatnonzero(some)

    # Execution.

    def run(self, actions: list[Action]) -> None:
        """Run every thread to its end. Raises PtxError for a deadlock, an endless loop, or what an action raises."""
        schedule = _Schedule(self)
        with np.errstate(all="ignore"):
            while schedule.groups:
                at = min(schedule.groups)
                if at >= len(actions):
                    raise PtxError("threads ran past the end of the kernel")
                self._run_group(schedule, at, actions)
        schedule.check_all_ended()

    def _run_group(self, schedule: _Schedule, at: int, actions: list[Action]) -> None:
        """Run the lowest group until it branches, waits, ends or reaches another."""
        threads = schedule.groups.pop(at)
        stop = min(schedule.groups, default=len(actions))
        everyone = None if threads.all() else threads
        while at < stop:
            ins = self.program.instructions[at]
            self.executed[ins.opcode] += 1
            self.steps += 1
            if self.steps > STEP_LIMIT:
                raise PtxError(f"{ins.where()}: more than {STEP_LIMIT} steps, the kernel does not end")
            mask = everyone
            if ins.guard is not None:
                guard = self._read(ins, ins.guard)
                mask = threads & (~guard if ins.negated else guard)
            control = ins.opcode.partition(".")[0]
            if control in schedule.control:
                schedule.control[control](ins, at, threads, threads if mask is None else mask)
                return
            actions[at](mask)
            at += 1
        schedule.add(at, threads)


class _Schedule:
    """Where the threads stand: groups by address, and those that wait at a barrier."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.groups: dict[int, Array] = {0: np.ones(machine.count, bool)}
        self.waiting = np.zeros(machine.count, bool)
        self.resume = np.zeros(machine.count, np.int64)
        self.control = {"bra": self._branch, "bar": self._barrier, "ret": self._end, "exit": self._end}

    def add(self, at: int, threads: Array) -> None:
        if threads.any():
            self.groups[at] = self.groups[at] | threads if at in self.groups else threads

    def _branch(self, ins: Instruction, at: int, threads: Array, taken: Array) -> None:
        label = ins.operands[-1]
        if ins.opcode not in ("bra", "bra.uni") or label not in self.machine.program.labels:
            raise PtxError(f"{ins.where()} {label}: unknown branch")
        self.add(self.machine.program.labels[label], taken)
        self.add(at + 1, threads & ~taken)

    def _end(self, ins: Instruction, at: int, threads: Array, ended: Array) -> None:
        self.add(at + 1, threads & ~ended)

    def _barrier(self, ins: Instruction, at: int, threads: Array, arrived: Array) -> None:
        machine = self.machine
        if ins.opcode == "bar.warp.sync":
            machine.whole_warps(ins, arrived)
            self.add(at + 1, threads)
            return
        if ins.opcode != "bar.sync" or ins.operands != ("0",):
            raise PtxError(f"{ins.where()} {', '.join(ins.operands)}: only `bar.sync 0` is known")
        machine.whole_warps(ins, arrived)
        self.waiting |= arrived
        self.resume[arrived] = at + 1
        self.add(at + 1, threads & ~arrived)
        full = np.asarray(self.waiting.reshape(-1, machine.program.threads).all(axis=1))
        if full.any():
            machine.shared.barrier(np.flatnonzero(full))
            free = full[machine.cta]
            for place in np.unique(self.resume[free]):
                self.add(int(place), free & (self.resume == place))
            self.waiting &= ~free

    def check_all_ended(self) -> None:
        if self.waiting.any():
            thread = int(np.flatnonzero(self.waiting)[0])
            ins = self.machine.program.instructions[int(self.resume[thread]) - 1]
            raise PtxError(f"{ins.where()}: deadlock, not every thread of CTA {self.machine.cta[thread]} comes here")
