"""How long work goes on, as it tells whoever listens: where it is, how long it still takes, which memory it holds.

    work = Work.of(listener)
    work(3, 32, "block 3")                   # 3 of 32 are done; this comes next
    work.step("solve", ["mlp.up_proj"])      # what is done there
    work.say("warning", "...")               # what a user should know

A listener hears each as an `Event`. A plain function of (done, total, what) will do; it hears the first kind alone.
Seconds left are those of the phase that is on (blocks, windows), told by the time that its parts took so far.
Not here: how it is shown, a bar or a log for machines (commands/).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and what comes next."""


@dataclass(frozen=True)
class Memory:
    """Bytes that this process holds: in RAM now, at most so far, and the same of its CUDA devices, None without any."""

    now: int
    most: int
    device_now: int | None = None
    device_most: int | None = None

    @classmethod
    def held(cls) -> Memory:
        """Return what is held at this moment."""
        now = psutil.Process().memory_info().rss
        most = max(now, _high_water())
        if not torch.cuda.is_initialized():
            return cls(now, most)
        devices = range(torch.cuda.device_count())
        at_most = sum(torch.cuda.max_memory_reserved(i) for i in devices)
        return cls(now, most, sum(torch.cuda.memory_reserved(i) for i in devices), at_most)


def _high_water() -> int:
    """Return the most that this process held; what its parent held before `exec` does not count, as in getrusage."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


@dataclass(frozen=True)
class Event:
    """Something that long work tells.

    kind: "begin" (a phase or a part of it), "step" (within a part), "plan", "warning" or "trouble".
    what: the part, "block 3"; of a plan, a warning or trouble, the message. done, total: parts done, and in all.
    step, names: what is done within the part, "solve", and to which linears.
    seconds: since the work began. left: seconds that the rest of the phase should take, None where none is over yet.
    """

    kind: str
    what: str
    done: int
    total: int
    step: str
    names: tuple[str, ...]
    seconds: float
    left: float | None
    memory: Memory


class Listener(ABC):
    """Hears of long work."""

    @abstractmethod
    def hear(self, event: Event) -> None:
        """Take notice of an event. What it raises ends the work."""


class Work:
    """Long work, as it tells a listener how it goes on; without one it tells nothing, at no cost.

    It may be given where a plain `Progress` is wanted.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._began = time.monotonic()
        self._pace = _Pace(self._began)
        self._what, self._step, self._names = "", "", tuple[str, ...]()

    @classmethod
    def of(cls, listener: Listener | Progress | None) -> Work:
        """Return the work that tells this listener; one that is work already goes on."""
        if isinstance(listener, Work):
            return listener
        return cls(listener if listener is None or isinstance(listener, Listener) else _Plain(listener))

    def also(self, listener: Listener) -> Work:
        """Return work that tells this listener beside the one that it tells."""
        return Work(_Both(self._listener, listener) if self._listener is not None else listener)

    @property
    def heard(self) -> bool:
        """Whether a listener hears more than how many parts are done."""
        return self._listener is not None and not isinstance(self._listener, _Plain)

    def __call__(self, done: int, total: int, what: str) -> None:
        """Say how many of how many parts are done, and what comes next."""
        self._pace.move(done, total, time.monotonic())
        self._what, self._step, self._names = what, "", ()
        self._tell("begin", what)

    def step(self, step: str, names: Sequence[str] = ()) -> None:
        """Say what is done now within the part, and to which linears."""
        self._step, self._names = step, tuple(names)
        self._tell("step", self._what)

    def say(self, kind: str, message: str) -> None:
        """Say what a user should know: a "plan", a "warning" or "trouble"."""
        self._tell(kind, message)

    def _tell(self, kind: str, what: str) -> None:
        if self._listener is None:
            return
        now, pace = time.monotonic(), self._pace
        where = (what, pace.done, pace.total, self._step, self._names)
        self._listener.hear(Event(kind, *where, now - self._began, pace.left(now), Memory.held()))


class _Both(Listener):
    """Two listeners as one."""

    def __init__(self, first: Listener, second: Listener) -> None:
        self._listeners = first, second

    def hear(self, event: Event) -> None:
        """Tell both."""
        for listener in self._listeners:
            listener.hear(event)


class _Plain(Listener):
    """A function of (done, total, what) as a listener."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def hear(self, event: Event) -> None:
        """Hand on where the work is."""
        if event.kind == "begin":
            self._progress(event.done, event.total, event.what)


class _Pace:
    """How fast a phase goes. Each time that no more is done than before, or of another total, a phase begins."""

    def __init__(self, now: float) -> None:
        self.done = self.total = self._first = 0
        self._began = self._moved = now

    def move(self, done: int, total: int, now: float) -> None:
        if total != self.total or done <= self.done:
            self._first, self._began = done, now
        self.done, self.total, self._moved = done, total, now

    def left(self, now: float) -> float | None:
        """Return the seconds to the end of the phase; the part that is on takes no less than it has taken."""
        over = self.done - self._first
        if over == 0:
            return 0.0 if self.done == self.total else None
        each = (self._moved - self._began) / over
        return max((self.total - self.done) * each - (now - self._moved), (self.total - self.done - 1) * each, 0.0)
