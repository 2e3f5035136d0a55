"""A checkpoint written: part by part, joined into shards, moved into place when whole.

A run goes through these, in this order; a kill between any two leaves OUT as it was, or new, and never in between:

    enter    refuse what cannot be; make the stage beside OUT (stage.py), or take the one this very command left
    go_back  in one that it left unfinished: to the parts that count (journal.py)
    add      a part file for each block as it is finished
    join     the parts into shards of bounded size, by copying bytes: never more than a buffer in memory
    text     config and records beside them; then whoever verifies reads `stage`, which holds what OUT will
    seal     sync all of it, mark the stage whole: from here on the work cannot be lost, and the parts go
    commit   exchange `stage` and OUT in one step; remove what OUT was

After an error or an interrupt what is finished stays where it would be missed, and the error says where; else nothing
stays.
Not here: what the tensors mean (formats), reading a checkpoint (source.py), what OUT may be (place.py).
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmq.checkpoint import disk, place, shards
from llmq.checkpoint.digest import digest
from llmq.checkpoint.disk import writing
from llmq.checkpoint.source import ADAPTER, side_files
from llmq.checkpoint.stage import Stage, look, stages
from llmq.errors import LlmqError, printable
from llmq.guard.reading import DTYPES, Entry, metadata, tensor_entries

SHARD_BYTES = 5 * 10**9
_REPLACED = (
    "config.json", ADAPTER, "*.index.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    place.RECORD, place.DEQUANTIZED, *place.AFTERWARDS,
)  # fmt: skip
log = logging.getLogger(__name__)


class Sink:
    """OUT while it is being made; a context manager.

    reads: folders and files that the run reads, by what to call them ("SRC"): OUT must not touch them. run: what makes
    the result what it is (recipe, source), by which the same command is known again. beside: further files that go to
    places of their own at the commit, by their staged name. again: whether what an unfinished run of the same command
    left is not taken up but made anew.
    Raises LlmqError for all that can be refused before any work.
    """

    def __init__(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        reads: Mapping[str, Path] | None = None,
        run: Mapping[str, Any] | None = None,
        beside: Mapping[str, Path] | None = None,
        again: bool = False,
    ) -> None:
        self.reads = dict(reads or {})
        self.out, self.overwrite = place.place(out, self.reads), overwrite
        self._run = None if run is None else json.loads(json.dumps(run))
        self._beside = dict(beside or {})
        self.digests: dict[str, str] = {}  # sha256 of every tensor, by name, taken from memory
        self._parts: dict[Path, list[Entry]] = {}
        self._made: list[Path] = []
        self._sealed = self._done = False
        self._again = again
        self.promise: Callable[[], str] = str
        """Says, for an error, what becomes of what is finished; nothing where nobody would miss it."""
        self.goes_on = False
        """Whether an earlier run of this very command left the stage unfinished."""
        self.earlier: dict[str, Any] | None = None
        """The result of this very command, which an earlier run left whole: only `commit` is missing."""
        self.left = self._earlier(act=False)
        """The stage that an earlier run of this very command left, for looking at; it is not locked."""
        if not self.left or self.left.state(self.target) == "unfinished":
            self.check()
            for target in self._beside.values():
                place.check_file(target, "--imatrix-out", b"GGUF", overwrite=overwrite)
                if target.resolve() == self.out:
                    raise LlmqError(f"--imatrix-out {target} is OUT itself; name another file")

    def __enter__(self) -> Self:
        with writing(self.out):
            self._made = [p for p in self.out.parents if not p.exists()]
            if self._made:
                self.out.parent.mkdir(parents=True, exist_ok=True)
        found = self._earlier(act=True)
        self._stage = found or Stage.make(self.out, self._run or {}, overwrite=self.overwrite)
        self.stage = self._stage.new
        if found and found.state(self.target) == "unfinished":
            self.goes_on, self.promise = True, lambda: "the same command goes on"
            log.warning("an earlier run of this very command left %s, unfinished; it is taken up", found)
            for unlike in found.take():
                log.warning("%s: begun with %s: roundings may differ from those of one run", found.folder, unlike)
        elif found:
            self.earlier, self._sealed = found.result(), True
            log.warning("an earlier run of this very command left %s; its result is put in place", found)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if self._done:
            return
        if self._sealed and self._stage.state(self.target) == "committed":  # an interrupt came after the last rename
            note = f"{self.out} is written and whole"
            self._clean(self._stage)
        elif self._sealed:
            note = f"the finished result stays in {self._stage}; the same command puts it in place"
            self._stage.close()
        elif error is not None and (promise := self.promise()):
            note = f"what was finished stays in {self._stage}; {promise}"
            self._stage.close()
        else:
            note = ""
            self._stage.remove()
            with suppress(OSError):  # someone else uses it by now
                for folder in self._made:
                    folder.rmdir()
        if error is not None and note:
            error.add_note(note)

    @property
    def room(self) -> Path:
        """A folder on OUT's disk for what is not to be in OUT; it goes when the run ends."""
        return self._stage.folder

    @property
    def whole(self) -> Path:
        """What a reader of OUT would open, while it is still staged."""
        return self.stage

    def check(self) -> None:
        """Raise LlmqError unless OUT can be written, or replaced where that is asked for."""
        source = self.reads.get("SRC")
        copied = {f.name for f in side_files(source)} if source is not None else set[str]()
        place.check_folder(self.out, copied, overwrite=self.overwrite)

    def target(self, name: str) -> Path:
        """Return where a staged file will lie."""
        return self.out / name

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one part: the tensors of a block, contiguous, on any device."""
        part = self._part(len(self._parts))
        own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        digests = {name: digest(tensor) for name, tensor in own.items()}
        with writing(part):
            self._parts[part] = shards.write(part, own, {"sha256": json.dumps(digests)})
        self.digests |= digests

    @property
    def parts(self) -> Sequence[Path]:
        """The files of the parts so far."""
        return list(self._parts)

    def go_back(self, parts: int) -> None:
        """Take so many parts of an earlier run as added, and remove those behind them."""
        files = [self._part(i) for i in range(parts)]
        for file in {*self.room.glob("part-*")} - {*files}:
            file.unlink()
        self._parts = {part: list(tensor_entries(part).values()) for part in files}
        self.digests = {n: d for part in files for n, d in json.loads(metadata(part)["sha256"]).items()}

    def _part(self, i: int) -> Path:
        return self.room / f"part-{i:05d}"

    def replace(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Put tensors in the place of those of the same name in the joined shards, in the dtype that they have there.

        In place: no byte of the stage counts before all of it is whole.
        """
        entries = {n: e for f in self.stage.glob("*.safetensors") for n, e in tensor_entries(f).items()}
        for name, tensor in tensors:
            entry = entries[name]
            own = tensor.detach().cpu().to(DTYPES[entry.dtype]).contiguous()
            with writing(entry.file), entry.file.open("r+b") as f:
                f.seek(entry.start)
                f.write(own.reshape(-1).view(torch.uint8).numpy().data)
            self.digests[name] = digest(own)

    def require(self, need: int) -> None:
        """Raise LlmqError where the disk has less than `need` bytes free, what is staged already among them."""
        place.require(self.out, need - self._stage.size())

    def text(self, name: str, content: str) -> None:
        """Write a text file."""
        with writing(self.stage / name):
            (self.stage / name).write_text(content, encoding="utf-8")

    def json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.text(name, json.dumps(values, indent=2) + "\n")

    def copy_files(self, source: Path) -> None:
        """Copy tokenizer, chat template, generation and preprocessor files: all that is not weights or config."""
        for file in side_files(source):
            target = self.stage / file.relative_to(source)
            if not any(file.match(p) for p in _REPLACED):
                with writing(target):
                    if not target.parent.is_dir():
                        target.parent.mkdir()
                    shutil.copyfile(file, target)

    def files(self) -> list[Path]:
        """Return the staged files that OUT will hold."""
        return sorted(p for p in self.stage.rglob("*") if p.is_file())

    def staged(self) -> list[Entry]:
        """Return where each staged tensor lies, in the order they were added."""
        return [entry for part in self._parts.values() for entry in part]

    def join(self, shard_bytes: int = SHARD_BYTES) -> int:
        """Join the parts into shards (and an index where there are several). Returns the bytes of all tensors."""
        tensors = self.staged()
        filled = list(_fill(tensors, shard_bytes))
        width, weight_map = len(filled), {}
        for i, shard in enumerate(filled):
            name = "model.safetensors" if width == 1 else f"model-{i + 1:05d}-of-{width:05d}.safetensors"
            with writing(self.stage / name):
                shards.join(self.stage / name, shard)
            weight_map.update({t.name: name for t in shard})
        total = sum(t.nbytes for t in tensors)
        if width > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.json("model.safetensors.index.json", index)
        return total

    def staged_beside(self, name: str) -> Path:
        """Return where to write the further file of that name."""
        return self.room / f"beside-{name}"

    def seal(self, result: Mapping[str, Any]) -> None:
        """Sync what was staged and mark it whole, after all checks. result: what `earlier` will say, JSON."""
        self._stage.mark(result, self.stale)
        self._sealed = True

    def commit(self) -> None:
        """Move what was staged to its place. Raises LlmqError where that fails; OUT is then as it was."""
        if not self._sealed:
            self.seal({})
        if self._stage.state(self.target) != "committed":
            self.check()  # what is there may have changed since
            with writing(self.out):
                for name, target in self._beside.items():
                    if self.staged_beside(name).exists():
                        disk.put_file(self.staged_beside(name), target)
                        disk.sync(target.parent)
                self.put(sorted(self._stage.files()))
        self._done = True
        self._clean(self._stage)

    def put(self, names: list[str]) -> None:
        """Give what is staged its name, in one step where the system can. names: of the files in it."""
        disk.put_folder(self.stage, self.out, self._stage.old)

    def stale(self, names: list[str]) -> list[Path]:
        """Return what is left of the old OUT when the files of these names are in place, in order of removal."""
        return []

    def _earlier(self, *, act: bool) -> Stage | None:
        """Return the stage that this very command left. Raises LlmqError for one that is in the way.

        act: keep it locked, to go on in it, and remove what is in nobody's way; else nothing is touched, and what
        depends on a run that is not known yet is left for later.
        """
        for folder in stages(self.out):
            stage = Stage.open(folder)
            stage.put_back(self.out)
            state = stage.state(self.target)
            same = self._run == stage.run() if self._run else not act
            if same and (state in ("whole", "committed") or self._may_go_on(stage, state)):
                if not act:
                    stage.close()
                return stage
            else:
                self._refuse_or_remove(stage, state, same=same, act=act)
        return None

    def _may_go_on(self, stage: Stage, state: str) -> bool:
        """Say whether the same command goes on in a stage: nobody has changed it, and no --overwrite was added."""
        untouched = state == "unfinished" and not stage.files() and (stage.overwrites() or not self.overwrite)
        return untouched and not self._again

    def _refuse_or_remove(self, stage: Stage, state: str, *, same: bool, act: bool) -> None:
        """Raise LlmqError for a stage that is in the way; act: remove one that is not, but for a whole result."""
        of = f", of another command{unlike(stage.run(), self._run or {})}" if not same and state != "empty" else ""
        said = f"an earlier run left {stage}, {state}{of}"
        anew = same and self._again and state == "unfinished"
        if state in ("whole", "unfinished") and not self.overwrite and not anew:
            stage.close()
            raise LlmqError(f"{said}; move it away, or say --overwrite to begin anew")
        if not act or state == "whole":
            stage.close()
        if act:
            log.warning("%s; it %s", said, "stays there" if state == "whole" else "is removed")
            if state == "committed":
                self._clean(stage)
            elif state != "whole":
                stage.remove()

    def _clean(self, stage: Stage) -> None:
        """Remove a stage whose content is in place, and what it replaced."""
        try:
            with writing(self.out):
                disk.sync(self.out.parent)
                disk.sync(stage.folder)
                for name, seen in stage.stale().items():
                    if look(self.target(name)) == seen:  # else it is no longer what was to be replaced
                        self.target(name).unlink(missing_ok=True)
            stage.remove()
        except LlmqError as e:  # OUT is there and whole: not worth failing for
            log.warning("%s is written; what it replaced could not be removed: %s", printable(str(self.out)), e)
            stage.close()


def unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first thing in which two runs differ, as ` (bits 4, not 8)`."""
    for key in {**then, **now}:
        if then.get(key) != now.get(key):
            return f" ({key} {then.get(key)!r}, not {now.get(key)!r})" if then and now else ""
    return ""


def _fill(tensors: list[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    filled = 0
    for t in tensors:
        if shard and filled + t.nbytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(t)
        filled += t.nbytes
    if shard:
        yield shard
