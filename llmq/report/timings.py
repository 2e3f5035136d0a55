"""Where the time of a run went, and the memory that it held: kept by a listener, in a file of its own beside OUT.

    {"llmq": "0.1.0", "seconds": 812.4, "first": 0, "blocks": {"0": 25.1, "1": 24.8, ...},
     "stages": {"forward": 410.2, "solve": 288.0, "write": 12.1, "verifying": 9.5, ...},
     "memory": [[0.8, 612000000], [3.1, 901000000], ...], "most": 2100000000}

Times are another run's own, so they are no part of the checkpoint, whose bytes repeat. The time between two events is
the earlier one's: of a step within a block its name, else what the part is called.
Not here: who tells the events (progress.py), how they are drawn (plots/).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq import __version__
from llmq.checkpoint.disk import write_text
from llmq.errors import LlmqError
from llmq.guard.reading import field as read_field
from llmq.guard.reading import json_object, number
from llmq.progress import Event, Listener

FILE = "timings.json"
_BLOCK = re.compile(r"block (\d+)")
_POINTS = 400  # of the memory's course, at most
_LIMIT = 10_000  # stages and blocks of a file that are read


@dataclass
class Timings(Listener):
    """The seconds of each stage and of each block, and the memory held over time.

    stages: seconds by name, in the order in which they were first met. blocks: seconds by number. memory: `[seconds,
    bytes]`, of which the last is the latest. most: bytes; device_most: of the GPUs, None without any.
    """

    stages: dict[str, float] = field(default_factory=dict)
    blocks: dict[int, float] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    most: int = 0
    device_most: int | None = None
    seconds: float = 0.0
    _stage: str = "starting"
    _block: int | None = None

    def hear(self, event: Event) -> None:
        """See `Listener.hear`."""
        passed, self.seconds = event.seconds - self.seconds, event.seconds
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + passed
        if self._block is not None:
            self.blocks[self._block] = self.blocks.get(self._block, 0.0) + passed
        if event.kind in ("begin", "step"):
            within = _BLOCK.fullmatch(event.what)
            self._block = int(within[1]) if within else None
            self._stage = (event.step or "load") if within else event.what.partition(":")[0]
        self._remember(event)

    def _remember(self, event: Event) -> None:
        """Keep the memory that is held now; where there are too many points, the larger of each two."""
        self.memory.append((round(event.seconds, 2), event.memory.now))
        self.most, self.device_most = event.memory.most, event.memory.device_most
        if len(self.memory) > 2 * _POINTS:
            pairs = zip(self.memory[::2], self.memory[1::2], strict=False)
            self.memory = [max(a, b, key=lambda point: point[1]) for a, b in pairs]

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds. first: the block that the run began with, 0 unless it went on from another."""
        return {
            "llmq": __version__,
            "seconds": round(self.seconds, 2),
            "first": min(self.blocks, default=0),
            "stages": {name: round(s, 3) for name, s in self.stages.items()},
            "blocks": {str(i): round(s, 3) for i, s in self.blocks.items()},
            "memory": self.memory,
            "most": self.most,
            **({} if self.device_most is None else {"device_most": self.device_most}),
        }

    def save(self, file: Path) -> None:
        """Write the file. Raises LlmqError where it cannot be written."""
        write_text(file, json.dumps(self.to_json(), indent=1) + "\n")


def read(file: Path) -> Timings | None:
    """Return what a file holds, None where there is none. Raises LlmqError for one that does not hold times."""
    if not file.is_file():
        return None
    found, where = json_object(file), str(file)
    stages, blocks = (read_field(found, key, dict, where) for key in ("stages", "blocks"))
    memory = read_field(found, "memory", list, where)
    totals = [found.get("seconds"), found.get("most"), found.get("device_most", 0)]
    named = all(re.fullmatch(r"\d{1,9}", i) for i in blocks)
    if not named or not _numbers([*stages.values(), *blocks.values(), *totals]):
        raise LlmqError(f"{where} does not hold seconds; remove it, or quantize again with --report")
    if not all(isinstance(p, list) and len(p) == 2 and _numbers(p) for p in memory):
        raise LlmqError(f"{where}: memory is no list of seconds and bytes; remove it, or quantize again with --report")
    most = read_field(found, "most", int, where)
    device = read_field(found, "device_most", int, where) if "device_most" in found else None
    whole = read_field(found, "seconds", float, where)
    return Timings(stages, {int(i): s for i, s in blocks.items()}, [(p[0], p[1]) for p in memory], most, device, whole)


def _numbers(values: Iterable[Any]) -> bool:
    """Say whether these are plain numbers, not too many."""
    found = list(values)
    return len(found) <= _LIMIT and all((x := number(v)) is not None and x >= 0 for v in found)
