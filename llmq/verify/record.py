"""What was recorded when the checkpoint was made, compared with what the files hold now.

    record["sha256"]                      of the record itself: its JSON, keys sorted, without this one
    record["files"][file]                 of every other file of the folder
    record["tensors"][tensor]             of a tensor's bytes, as given to be written
    record["linears"][name]["sha256"]     of what was solved, before anything was packed:
        codes    uint8 [N, K]             scale   as stored, [N, G] ([1, 1] for one in all)
        zero     int32 [N, G]             g_idx   int32 [K], where the columns are in activation order
        values   float32 [N, K] decoded, in place of the others for ggml's types
        input    the scale of the input [1], where calibration fixed one
    and of small floats: codes, scale (its bits, where those are stored), divisor float32 [1]

Checksums of files find what has changed since; those of linears find what was never written right.
Not here: the checksum of a GGUF file (seal.py), the weights of the source (against.py).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmq.checkpoint.digest import digest, file_digest, holds
from llmq.checkpoint.place import AFTERWARDS, DEQUANTIZED, EXPORTED, RECORD
from llmq.errors import LlmqError
from llmq.guard.reading import Entry, json_object
from llmq.verify.decode import Array
from llmq.verify.linears import Linear
from llmq.verify.report import Report

RECORDS = (RECORD, DEQUANTIZED, EXPORTED)


def read_record(folder: Path, report: Report) -> dict[str, Any]:
    """Return quantization.json, or what stands in its place, with what is wrong reported; empty where there is none."""
    file = next((folder / name for name in RECORDS if (folder / name).exists()), None)
    if file is None:
        report.note(f"there is no {RECORDS[0]}: another tool made this checkpoint, so nothing can be compared with it")
        return {}
    try:
        record = json_object(file)
    except LlmqError as e:
        report.fail(str(e))
        return {}
    if "sha256" in record:  # 1E-05 for 1e-05 is the same record, and not what was written
        same = file.read_bytes() == (json.dumps(record, indent=2) + "\n").encode()
        report.expect(same, f"{file.name} is not as written: it is spelled in another way")
    return checked(record, file.name, report)


def checked(record: dict[str, Any], where: str, report: Report) -> dict[str, Any]:
    """Return a record, its own checksum compared; what of it is no object becomes an empty one."""
    if "sha256" in record:
        report.count("records")
        report.expect(holds(record), f"{where} is not as written: its own checksum differs")
    elif "tensors" in record or "files" in record:
        report.fail(f"{where} is not as written: it has lost its own checksum")
    else:
        report.note(f"{where} holds no checksums: an older llmq made this checkpoint; all else is checked")
    for key in ("files", "tensors", "linears"):
        if not isinstance(record.get(key, {}), dict):
            report.fail(f"{where}: {key} is no object")
            record[key] = {}
    tuned = record.get("tuned", [])
    if not isinstance(tuned, list) or not all(isinstance(n, str) for n in tuned):
        report.fail(f"{where}: tuned is no list of names")
        record["tuned"] = []
    return record


def check_files(folder: Path, recorded: Mapping[str, Any], report: Report) -> None:
    """Compare every file of the folder with its recorded checksum; none may be missing, none may have come.

    Hidden files and those that llmq puts there afterwards are left alone: no reader of checkpoints takes them. The card
    may also be one into which figures were put since (evaluation/kept.py), which keeps its checksum.
    """
    there = {
        f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file() and not _hidden(f, folder)
    }
    there.pop(next((name for name in RECORDS if name in there), RECORDS[0]), None)
    for name, said in recorded.items():
        report.count("files")
        if report.expect(name in there, f"{name} is missing"):
            taken = [said, *_cards(folder)] if name == "README.md" else [said]
            report.expect(file_digest(there[name]) in taken, f"{name} is not as written: its checksum differs")
    for name in sorted(there.keys() - recorded.keys() - set(AFTERWARDS)):
        report.fail(f"{name} is not among the files that were written")


def _cards(folder: Path) -> list[Any]:
    """Return the checksums of cards that figures were put into; none where the file that keeps them is not whole."""
    file = folder / "evaluation.json"
    try:
        found = json_object(file) if file.is_file() else {}
    except LlmqError:
        return []
    cards = found.get("cards")
    return cards if isinstance(cards, list) and holds(found) else []


def check_tensors(entries: Iterable[Entry], recorded: Mapping[str, Any], report: Report) -> None:
    """Compare every stored tensor with its recorded checksum; none may be missing, none may have come."""
    there = {e.name: e for e in entries}
    for name, said in recorded.items():
        report.count("tensors")
        if report.expect(name in there, f"tensor {name} is missing"):
            same = digest(there[name].read()) == said
            report.expect(same, f"tensor {name} is not as it was solved: its checksum differs")
    for name in sorted(there.keys() - recorded.keys()):
        report.fail(f"tensor {name} is not among those that were written")


def check_linear(linear: Linear, recorded: Mapping[str, Any], report: Report) -> None:
    """Compare a decoded linear with the checksums of what was solved."""
    line = recorded.get(linear.name)
    digests = line.get("sha256") if isinstance(line, dict) else None
    if not isinstance(digests, dict):
        if any(isinstance(v, dict) and "sha256" in v for v in recorded.values()):
            report.fail(f"{linear.name} is packed, but no record says that it was quantized")
        return
    report.count("solved weights compared")
    weight = linear.weight
    found = {
        "codes": of_array(weight.codes),
        "scale": digest(linear.scale),
        "zero": of_array(weight.zero.astype("<i4")),
    }
    if weight.g_idx is not None or "g_idx" in digests:
        found["g_idx"] = of_array(linear.g_idx)
    if linear.input is not None and "input" in digests:
        found["input"] = digest(linear.input)
    for part in sorted(digests.keys() | found.keys()):
        same = digests.get(part) == found.get(part)
        report.expect(same, f"{linear.name}: the {part} in the file is not what was solved")


def check_floats(name: str, solved: Mapping[str, Tensor], recorded: Mapping[str, Any], report: Report) -> None:
    """Compare what a linear of small floats holds with the checksums of what was solved.

    Decoded values follow from the rest; a divisor that the file has the inverse of is judged by the error alone.
    """
    line = recorded.get(name)
    digests = line.get("sha256") if isinstance(line, dict) else None
    if isinstance(digests, dict):
        report.count("solved weights compared")
        if digests.keys() == {"values"} and "values" not in solved:  # biases that are of no integer grid
            return
        for part in sorted({*digests, *solved} - ({"values", "divisor"} - solved.keys())):
            same = part in solved and digests.get(part) == digest(solved[part])
            report.expect(same, f"{name}: the {part} in the file is not what was solved")


def check_decoded(name: str, values: Array, recorded: Mapping[str, Any], report: Report) -> None:
    """Compare a weight decoded from a ggml type, rows in the model's order, with the checksum of what was solved."""
    line = recorded.get(name)
    digests = line.get("sha256") if isinstance(line, dict) else None
    if isinstance(digests, dict):
        report.count("solved weights compared")
        same = of_array(values) == digests.get("values")
        report.expect(same, f"{name}: the weight in the file is not the one that was solved")


def of_array(values: Array) -> str:
    """Return the checksum of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
