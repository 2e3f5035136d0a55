"""What a run has finished, on the disk: the same command, given again, goes on from there and ends in the same bytes.

    journal = Journal(room / "journal")
    journal.steps                            how many steps an earlier run has finished: 13
    journal.read("step-00012")               what the last of them left to be known, tensors and facts
    journal.once("squares", make)            what holds for the whole run: made now, or read
    journal.advance(tensors, facts, parts)   a step more is finished, with these part files

    journal/
        step-00012      what step 12 left to be known; once-squares and others by their names
        states/00013/   the hidden states that enter step 13 (batches.py); older ones as long as they may be needed
        now.json        how many steps are finished, renamed into place after all that they wrote. Counts as long as
                        the system runs on: what is written then survives the process, however that ends
        synced.json     the same, as of the last time that all of it was synced. Counts after a loss of power too

Hidden states are large: to sync them can take as long as a block. So they are synced when 50 times the time has passed
that it took the last time, which is a fiftieth of the run at most; steps between are done again after a loss of power.
Not here: what is kept (pipeline/), which run may go on in which folder (stage.py).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llmq.checkpoint import shards
from llmq.checkpoint.disk import renewed, sync, write_text, writing
from llmq.errors import LlmqError
from llmq.guard.reading import Entry, json_object, metadata, parse_json, tensor_entries

NOW, SYNCED = "now.json", "synced.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ONCE = "once-"
_APART = 50  # times the length of a sync before the next


class Kept(NamedTuple):
    """What was kept under a name: tensors, which are read when they are asked for, and facts, JSON."""

    tensors: Mapping[str, Entry]
    facts: dict[str, Any]


class Journal:
    """A run's journal in its folder. Raises LlmqError where the disk is full or a file is damaged.

    steps, parts: how many steps are finished, and how many part files they wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for torn in folder.glob("*.new"):
                torn.unlink()
        self._synced = _said(folder / SYNCED)
        self.steps, self.parts = _last(folder, self._synced)
        self._due = time.monotonic()
        self._drop_states(newer=True)

    @classmethod
    def followed(cls, folder: Path, steps: int) -> Journal:
        """Return the journal that another process of the run keeps, as it told: for reading where the run stands."""
        journal = cls.__new__(cls)
        journal.folder, journal.steps = folder, steps
        return journal

    @property
    def made(self) -> bool:
        """Whether something is kept that holds for the whole run and took long to make."""
        return any(self.folder.glob(f"{_ONCE}*"))

    @property
    def state(self) -> Path:
        """The folder of the hidden states that enter the next step."""
        return self._states / f"{self.steps:05d}"

    def keep(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, synced: bool = True) -> None:
        """Keep something under a name, in the place of what has it. synced: see `disk.renewed`."""
        file = self.folder / name
        own = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        with writing(file), renewed(file, synced=synced) as new:
            shards.write(new, own, {"facts": json.dumps(facts)})

    def read(self, name: str) -> Kept | None:
        """Return what is kept under a name, None where nothing is."""
        return self._read(name) if (self.folder / name).exists() else None

    def once(self, name: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]) -> Kept:
        """Return what is kept under a name, of what takes long to make; it is made where nothing is."""
        name = f"{_ONCE}{name}"
        if not (self.folder / name).exists():
            self.keep(name, *make())
        return self._read(name)

    def has(self, name: str) -> bool:
        """Say whether something was made once under this name."""
        return (self.folder / f"{_ONCE}{name}").exists()

    def step(self, i: int) -> Kept:
        """Return what a finished step left to be known."""
        return self._read(_step(i))

    def advance(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], parts: Sequence[Path]) -> Kept:
        """Finish a step; return what is kept of it.

        tensors, facts: what it leaves to be known. parts: the part files of all steps so far.
        """
        self.keep(_step(self.steps), tensors, facts, synced=False)
        self.steps, self.parts = self.steps + 1, len(parts)
        said = {"steps": self.steps, "parts": self.parts, "boot": _boot()}
        with writing(self.folder / NOW), renewed(self.folder / NOW, synced=False) as new:
            new.write_text(json.dumps(said))
        if time.monotonic() >= self._due:
            self._sync(said, parts)
        self._drop_states(newer=False)
        return self.step(self.steps - 1)

    def _read(self, name: str) -> Kept:
        file = self.folder / name
        return Kept(tensor_entries(file), parse_json(metadata(file)["facts"], str(file)))

    def _sync(self, said: Mapping[str, Any], parts: Sequence[Path]) -> None:
        """Have all that is finished count after a loss of power too."""
        began = time.monotonic()
        before, state = self._synced, self.state
        steps = [self.folder / _step(i) for i in range(before.get("steps", 0), self.steps)]
        states = [*state.iterdir(), state, self._states] if state.exists() else []
        with writing(self.folder):
            for path in (*parts[before.get("parts", 0) :], *steps, *states, self.folder, self.folder.parent):
                sync(path)
        write_text(self.folder / SYNCED, json.dumps(said))
        self._synced = dict(said)
        now = time.monotonic()
        self._due = now + _APART * (now - began)

    def _drop_states(self, *, newer: bool) -> None:
        """Remove the hidden states that no run will start from; newer: also what a killed run wrote behind them.

        In a run they are being written: it is a step ahead of what it finishes.
        """
        needed = {self.state.name, f"{self._synced.get('steps', 0):05d}"}
        for folder in self._states.iterdir() if self._states.exists() else ():
            if folder.name not in needed and (newer or folder.name < self.state.name):
                with writing(folder):
                    shutil.rmtree(folder)

    @property
    def _states(self) -> Path:
        return self.folder / "states"


def finished(folder: Path) -> int:
    """Return how many steps the journal in a folder tells of, none where there is none; it is not touched."""
    return _last(folder, _said(folder / SYNCED))[0]


def _step(i: int) -> str:
    return f"step-{i:05d}"


def _last(folder: Path, synced: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many steps are finished, and how many parts they have."""
    try:
        now = _said(folder / NOW)
    except LlmqError:  # never synced, so a loss of power may leave it empty
        now = {}
    last = now if now.get("boot") and now["boot"] == _boot() else synced
    return last.get("steps", 0), last.get("parts", 0)


def _said(file: Path) -> dict[str, Any]:
    return json_object(file) if file.exists() else {}


def _boot() -> str:
    """Return what tells this run of the system from the next one, nothing where it does not say."""
    return _BOOT.read_text().strip() if _BOOT.exists() else ""
