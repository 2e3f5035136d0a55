"""What `llmq push` would send of a checkpoint, held against the checksums that were recorded when it was made.

    found = parcel("./my-llama-int4")       every file of the folder, checked; evaluation.json, where figures were kept
    found = parcel("my-llama.gguf")         the file or its shards, checked, and a model card made from their keys

Hidden files, the report and timings stay here.
Not here: sending it (upload.py), whether the weights are right, which `llmq verify` says.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmq.checkpoint.card import gguf_card, with_figures
from llmq.checkpoint.hub_metadata import CARD, of_gguf
from llmq.checkpoint.place import beside, one_file, user_path
from llmq.checkpoint.source import refuse_links
from llmq.errors import LlmqError, printable
from llmq.evaluation import kept
from llmq.gguf.reader import GgufFile
from llmq.guard.reading import json_object, yaml_object
from llmq.readable import readers_of
from llmq.verify.ggml import broken, shards
from llmq.verify.record import RECORDS, check_files, checked
from llmq.verify.report import Report

_KEPT = "evaluation.json"
_SAYING = (*RECORDS, "config.json", "recipe.yaml", _KEPT)
"""Files in which a run may have named files of its machine."""
_PATH = re.compile(r"(?<![\w/.:])(?:~|/[\w.@+-]+|[A-Za-z]:)[/\\][\w.@+-][^\s\"'<>|,;)]*")


@dataclass
class Parcel:
    """Files by their path in the repository, each a file here or the bytes of one that is made.

    notes: what a user should know before others do.
    """

    name: str
    files: dict[str, Path | bytes]
    notes: list[str] = field(default_factory=list)

    @property
    def card(self) -> str:
        """The model card."""
        found = self.files[CARD]
        return found.decode() if isinstance(found, bytes) else found.read_text(errors="replace")

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file."""
        return {n: len(f) if isinstance(f, bytes) else f.stat().st_size for n, f in self.files.items()}


def parcel(out: str) -> Parcel:
    """Return what would go. Raises LlmqError unless OUT was finished by llmq and is as it was written."""
    path = user_path(out)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file() and one_file(path):
        return _of_gguf(path)
    raise LlmqError(f"{out} is no folder or .gguf file; give what llmq quantize, export or dequantize wrote")


def _of_folder(folder: Path) -> Parcel:
    refuse_links(folder)
    record = next((folder / name for name in RECORDS if (folder / name).is_file()), None)
    if record is None:
        raise LlmqError(
            f"{folder} is no finished checkpoint of llmq (it has no {RECORDS[0]}); other folders are sent by "
            "hf upload ORG/NAME FOLDER"
        )
    report = Report()
    said = checked(json_object(record), record.name, report)
    if not said.get("files"):
        raise LlmqError(f"{record} holds no checksums: an older llmq made {folder}; write it again")
    check_files(folder, said["files"], report)
    if report.failures:
        raise LlmqError(f"{folder} is not as it was written: {report.failures[0]}; write it again, or take it out")
    names = sorted([*said["files"], record.name, *([_KEPT] if (folder / _KEPT).is_file() else [])])
    found = Parcel(folder.resolve().name, {name: folder / name for name in names})
    if CARD not in found.files:
        raise LlmqError(f"{folder} has no {CARD}: an older llmq made it; write it again")
    found.notes += [*_spoken_paths(folder), *_left(folder, names)]
    return found


def _of_gguf(path: Path) -> Parcel:
    first = GgufFile(path)
    files = shards(first)
    damaged = broken(first, files)
    if damaged is None:
        raise LlmqError(f"{path} holds no checksums of llmq: another tool made it; hf upload ORG/NAME FILE sends it")
    if damaged:
        raise LlmqError(f"{damaged[0]} is not as it was written: its checksum differs; write it again")
    card, base = of_gguf(first.value)
    types = ", ".join(f"{n} {kind}" for kind, n in first.kinds().most_common())
    text = gguf_card(first.report(), path.name, types, base, card, readers_of(str(path)))
    made = {CARD: with_figures(text, kept.read(path)).encode()}
    figures = beside(path, _KEPT)
    held: dict[str, Path | bytes] = {f.name: f for f in [*files, *([figures] if figures.is_file() else [])]}
    told = [first.value("llmq.recipe"), first.report(), first.value("quantize.imatrix.file")]
    notes = [f"its keys say {path}, for everyone to read" for path in _paths(told)]
    return Parcel(path.name, {**held, **made}, notes)


def _left(folder: Path, names: list[str]) -> Iterator[str]:
    """Yield a note of the files that stay here."""
    there = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    if left := sorted(there - set(names)):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        yield f"not sent: {', '.join(left[:3])}{more}"


def _spoken_paths(folder: Path) -> Iterator[str]:
    """Yield a note for each path of this machine that a file tells."""
    for name in _SAYING:
        if (file := folder / name).is_file():
            said = yaml_object(file) if file.suffix == ".yaml" else json_object(file)
            yield from (f"{name} says {path}, for everyone to read" for path in _paths(said))


def _paths(value: Any) -> list[str]:
    """Return the paths that texts name, at any depth."""
    found = (match[0] for text in _texts(value) for match in _PATH.finditer(text))
    return [printable(path, 200) for path in dict.fromkeys(found)]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text but the scales of folds: numbers in base64, of which `/` is a letter (llmq/model/folding.py)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        inside = [v for k, v in value.items() if k != "scale"] if isinstance(value, Mapping) else value
        for inner in inside:
            yield from _texts(inner)
