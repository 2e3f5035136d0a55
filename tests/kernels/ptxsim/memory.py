"""Global memory: named buffers with guard gaps between them, and the sectors that every warp asks for.

DRAM and L2 move sectors of 32 bytes. One warp instruction asks for each sector that its lanes touch once, whichever
lanes they are; `Traffic.sectors` sums that over all requests, so a word asked for twice counts twice, as it does past
the L1 for `cp.async.cg`. `distinct` counts a sector once for the whole launch.

An access must lie in one buffer and be aligned to its size, as on a GPU; CTAs of one launch must not depend on each
other: reading what another CTA wrote, or overwriting it with another value, is recorded as a race.
Not here: shared memory (shared.py), the instructions that ask (transfer.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .program import Instruction, PtxError
from .scalars import Array

SECTOR = 32
ALIGNMENT = 256  # what the CUDA allocator gives at least
GUARD = 4096
FILL = 0xCD


@dataclass(frozen=True)
class Traffic:
    """What a launch moved between one buffer and the SMs, one direction.

    requests: warp instructions; sectors: of 32 bytes, summed over requests; distinct: sectors touched at least once;
    bytes: asked for by lanes, repeats included.
    """

    requests: int = 0
    sectors: int = 0
    distinct: int = 0
    bytes: int = 0


@dataclass
class _Buffer:
    name: str
    address: int
    given: Array


class GlobalMemory:
    """All buffers of a launch in one array of bytes."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []
        self.named: dict[str, _Buffer] = {}
        self.end = ALIGNMENT * 16
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.faults: Counter[str] = Counter()

    def add(self, name: str, values: Array) -> int:
        """Place a copy of an array; return its address. The same array given under two names is one buffer."""
        for buffer in self.buffers:
            if buffer.given is values:
                self.named[name] = buffer
                return buffer.address
        buffer = _Buffer(name, self.end, values)
        self.buffers.append(buffer)
        self.named[name] = buffer
        self.end = -(-(buffer.address + values.nbytes + GUARD) // ALIGNMENT) * ALIGNMENT
        return buffer.address

    def freeze(self) -> None:
        """Lay the buffers out; none can be added afterwards."""
        self.bytes = np.full(self.end, FILL, np.uint8)
        self.owner = np.full(self.end, -1, np.int32)  # the buffer of each byte
        self.writer = np.full(self.end, -1, np.int32)  # the CTA that wrote each byte
        self.touched = {kind: np.zeros(self.end // SECTOR + 1, bool) for kind in ("load", "store")}
        for i, b in enumerate(self.buffers):
            self.bytes[b.address : b.address + b.given.nbytes] = (
                np.ascontiguousarray(b.given).reshape(-1).view(np.uint8)
            )
            self.owner[b.address : b.address + b.given.nbytes] = i

    def array(self, name: str) -> Array:
        """Return what a buffer holds now, in the shape and dtype it was added with."""
        b = self.named[name]
        return self.bytes[b.address : b.address + b.given.nbytes].view(b.given.dtype).reshape(b.given.shape).copy()

    def traffic(self, name: str, kind: str = "load") -> Traffic:
        """Return what moved from (`load`) or to (`store`) a buffer."""
        b = self.named[name]
        first, last = b.address // SECTOR, (b.address + max(b.given.nbytes, 1) - 1) // SECTOR
        counts = self.counts.get((b.name, kind), Counter())
        return Traffic(distinct=int(self.touched[kind][first : last + 1].sum()), **counts)

    def load(self, ins: Instruction, address: Array, size: int, cta: Array, warp: Array) -> Array:
        """Return the bytes `[lanes, size]` that lanes ask for. Raises PtxError out of bounds."""
        at = self._checked(ins, "load", address, size, warp)
        writer = self.writer[at]
        if ((writer >= 0) & (writer != cta[:, None])).any():
            self.faults[f"{ins.where()}: reads what another CTA wrote"] += 1
        return self.bytes[at]

    def store(self, ins: Instruction, address: Array, values: Array, cta: Array, warp: Array) -> None:
        """Write bytes `[lanes, size]`. Raises PtxError out of bounds."""
        at = self._checked(ins, "store", address, values.shape[1], warp)
        writer = self.writer[at]
        if ((writer >= 0) & (writer != cta[:, None]) & (self.bytes[at] != values)).any():
            self.faults[f"{ins.where()}: overwrites another CTA's value"] += 1
        self.bytes[at] = values
        self.writer[at] = cta[:, None]
        if (self.bytes[at] != values).any():
            self.faults[f"{ins.where()}: two threads write different values to one address"] += 1

    def _checked(self, ins: Instruction, kind: str, address: Array, size: int, warp: Array) -> Array:
        """Return the index of every byte; check the bounds and count the request."""
        if (address % size).any():
            bad = int(address[address % size != 0][0])
            raise PtxError(f"{ins.where()}: global address {bad:#x} is not aligned to {size} bytes")
        inside = (address >= 0) & (address + size <= self.end)
        owner = self.owner[np.where(inside, address, 0)]
        last = self.owner[np.where(inside, address + size - 1, 0)]
        wrong = ~inside | (owner < 0) | (owner != last)
        if wrong.any():
            raise PtxError(f"{ins.where()}: global {kind} out of bounds, {self._nearest(int(address[wrong][0]))}")
        self._count(kind, address, size, warp, owner)
        return address[:, None] + np.arange(size)

    def _nearest(self, address: int) -> str:
        before = [b for b in self.buffers if b.address <= address]
        if not before:
            return f"address {address:#x} lies before every buffer"
        b = before[-1]
        return f"at byte {address - b.address} of {b.name!r}, which has {b.given.nbytes}"

    def _count(self, kind: str, address: Array, size: int, warp: Array, owner: Array) -> None:
        sector = address // SECTOR  # an aligned access of at most 16 bytes lies in one sector
        self.touched[kind][sector] = True
        request = owner.astype(np.int64) << 20 | warp
        requests = np.unique(request) >> 20
        sectors = np.unique(request << 32 | sector) >> 52
        for i in np.unique(owner):
            counts = self.counts.setdefault((self.buffers[i].name, kind), Counter())
            counts["requests"] += int((requests == i).sum())
            counts["sectors"] += int((sectors == i).sum())
            counts["bytes"] += int((owner == i).sum()) * size
