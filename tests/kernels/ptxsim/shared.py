"""Shared memory of every CTA: its bytes, who touched them since the last barrier, and the banks.

A barrier orders the warps of a CTA and nothing else does. So a byte that one warp wrote since the last barrier may not
be read or changed by another, and a byte that one warp read may not be changed by another. Per byte a bit mask says
which warps read and which wrote it since then; a barrier clears both. Lanes of a warp run in lock step: ordered.

`cp.async` writes at some unknown time between its issue and the wait of the thread that issued it. Until then the bytes
are *in flight*: nobody may touch them. The wait turns them into a write of that warp, which other warps see after the
next barrier. The bytes change at the wait, the latest legal time.

Banks: 32 of 4 bytes. A warp's 4-byte access is served at once, 8-byte accesses by half warps, 16-byte ones by quarters;
such a phase takes as many wavefronts as the most distinct words that it wants of one bank.
Not here: the instructions (transfer.py, warp.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .program import Instruction, PtxError
from .scalars import Array

SHARED_BASE = 1024  # the address of the first byte: 0 stays out of bounds
FILL = 0xEE
BANKS = 32
WARP = 32


@dataclass(frozen=True)
class Wavefronts:
    """Shared-memory cycles of one kind of access: `actual`, and `ideal` with no bank conflict."""

    actual: int = 0
    ideal: int = 0


@dataclass
class _Flight:
    """A cp.async on its way: the bytes of each thread that issued it, by the number of that thread's commit group."""

    ins: Instruction
    thread: Array
    group: Array
    at: Array
    values: Array


class SharedMemory:
    """The shared memory of all CTAs, side by side in one array."""

    def __init__(self, ctas: int, size: int, warps: int) -> None:
        self.size, self.warps = size, warps
        self.bytes = np.full(ctas * size, FILL, np.uint8)
        self.written = np.zeros(ctas * size, bool)
        self.readers = np.zeros(ctas * size, np.uint32)
        self.writers = np.zeros(ctas * size, np.uint32)
        self.in_flight = np.zeros(ctas * size, np.uint8)
        self.flights: list[_Flight] = []
        self.committed = np.zeros(ctas * warps * WARP, np.int64)
        self.faults: Counter[str] = Counter()
        self.wavefronts: dict[str, Counter[str]] = {}

    def _index(self, ins: Instruction, address: Array, size: int, thread: Array) -> Array:
        """Return the index of every byte `[threads, size]`. Raises PtxError out of bounds or misaligned."""
        offset = address - SHARED_BASE
        wrong = (offset < 0) | (offset + size > self.size) | (address % size != 0)
        if wrong.any():
            raise PtxError(
                f"{ins.where()}: shared access of {size} bytes at byte {int(offset[wrong][0])} is out of bounds or "
                f"misaligned; the CTA has {self.size}"
            )
        cta = thread // (self.warps * WARP)
        return (cta * self.size + offset)[:, None] + np.arange(size)

    def _bit(self, thread: Array) -> Array:
        return (np.uint32(1) << (thread // WARP % self.warps).astype(np.uint32))[:, None]

    def _mark(self, marks: Array, at: Array, thread: Array) -> None:
        """Set each thread's warp in the masks of its bytes; one warp at a time, for a byte may be named twice."""
        warp = thread // WARP % self.warps
        for w in range(self.warps):
            marks[at[warp == w]] |= np.uint32(1 << w)

    def _fault(self, ins: Instruction, what: str, found: Array) -> None:
        if found.any():
            self.faults[f"{ins.where()}: {what}"] += int(found.sum())

    def load(self, ins: Instruction, address: Array, size: int, thread: Array) -> Array:
        """Return bytes `[threads, size]`; record a race where another warp's write is not yet ordered."""
        at = self._index(ins, address, size, thread)
        self._fault(ins, "reads shared bytes that a cp.async may still write", self.in_flight[at] > 0)
        self._fault(ins, "reads shared bytes that another warp wrote, no barrier between", self._foreign(at, thread))
        self._fault(ins, "reads shared bytes that nothing wrote", ~self.written[at] & (self.in_flight[at] == 0))
        self._mark(self.readers, at, thread)
        return self.bytes[at]

    def _foreign(self, at: Array, thread: Array) -> Array:
        return (self.writers[at] & ~self._bit(thread)) != 0

    def _check_write(self, ins: Instruction, at: Array, thread: Array, changed: Array) -> None:
        """Record races of a write; two warps may write the same value, for then their order cannot be seen."""
        read = (self.readers[at] & ~self._bit(thread)) != 0
        self._fault(ins, "overwrites shared bytes that another warp reads, no barrier between", read)
        both = self._foreign(at, thread) & changed
        self._fault(ins, "overwrites shared bytes that another warp wrote, no barrier between", both)
        self._fault(ins, "overwrites shared bytes that a cp.async may still write", self.in_flight[at] > 0)

    def store(self, ins: Instruction, address: Array, values: Array, thread: Array) -> None:
        """Write bytes `[threads, size]`."""
        at = self._index(ins, address, values.shape[1], thread)
        self._check_write(ins, at, thread, self.bytes[at] != values)
        self.bytes[at] = values
        self._fault(ins, "two threads write different values to one shared byte", self.bytes[at] != values)
        self.written[at] = True
        self._mark(self.writers, at, thread)

    # cp.async

    def issue(self, ins: Instruction, address: Array, values: Array, thread: Array) -> None:
        """Start asynchronous writes; they land at the wait of the thread that issued them."""
        at = self._index(ins, address, values.shape[1], thread)
        self._check_write(ins, at, thread, np.ones(at.shape, bool))
        np.add.at(self.in_flight, at.reshape(-1), np.uint8(1))
        self._fault(ins, "two cp.async write one shared byte", self.in_flight[at] > 1)
        self.flights.append(_Flight(ins, thread, self.committed[thread], at, values))

    def commit(self, thread: Array) -> None:
        """Close the open group of each thread."""
        self.committed[thread] += 1

    def wait(self, thread: Array, pending: int | None) -> None:
        """Land all but the `pending` youngest groups of each thread; None lands the open group too."""
        limit = np.full(len(self.committed), -1, np.int64)
        limit[thread] = self.committed[thread] - 1 - pending if pending is not None else np.iinfo(np.int64).max
        still = []
        for f in self.flights:
            lands = f.group <= limit[f.thread]
            if lands.any():
                at, owner = f.at[lands], f.thread[lands]
                self.bytes[at] = f.values[lands]
                self.written[at] = True
                np.subtract.at(self.in_flight, at.reshape(-1), np.uint8(1))
                self._mark(self.writers, at, owner)
            if not lands.all():
                stay = ~lands
                still.append(_Flight(f.ins, f.thread[stay], f.group[stay], f.at[stay], f.values[stay]))
        self.flights = still

    def barrier(self, ctas: Array) -> None:
        """Order everything the warps of these CTAs did so far before what they do next."""
        for marks in (self.readers, self.writers) if self.size else ():
            marks.reshape(-1, self.size)[ctas] = 0

    # banks

    def count(self, kind: str, address: Array, size: int, thread: Array) -> None:
        """Count the wavefronts of one access of `size` bytes by each of these threads."""
        lanes = WARP if size <= 4 else WARP * 4 // size
        self.count_phases(kind, address, size, thread // lanes)

    def count_phases(self, kind: str, address: Array, size: int, phase: Array) -> None:
        """Count the wavefronts of accesses grouped by the phase that serves them."""
        if not len(address):
            return
        words = (address[:, None] // 4 + np.arange(max(size // 4, 1))).reshape(-1)
        phases = np.repeat(phase, max(size // 4, 1))
        distinct = np.unique(phases.astype(np.int64) << 32 | words)
        place = (distinct >> 32) * BANKS + distinct % BANKS
        banks, wanted = np.unique(place, return_counts=True)
        starts = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
        counts = self.wavefronts.setdefault(kind, Counter())
        counts["actual"] += int(np.maximum.reduceat(wanted, starts).sum())
        counts["ideal"] += len(starts)
