"""The files of a checkpoint folder against each other: index and shards, one config and its copies.

Not here: checksums (record.py), which file a reader takes (checkpoint/source.py).
"""

from collections.abc import Iterator
from typing import Any

from llmq.checkpoint import Source
from llmq.guard.reading import json_object, tensor_entries
from llmq.verify.report import Report

_INDEX = "model.safetensors.index.json"
_MIRRORED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "lm_head")


def check_index(source: Source, report: Report) -> None:
    """Check that index and shards hold the same tensors, each once; note weight files that no reader takes."""
    folder, taken = source.path, sorted({e.file for e in source.entries().values()})
    seen: dict[str, str] = {}
    total = 0
    for file in taken:
        entries = tensor_entries(file)
        report.count("weight files")
        total += sum(e.nbytes for e in entries.values())
        for tensor in entries:
            report.expect(tensor not in seen, f"tensor {tensor} is in both {seen.get(tensor)} and {file.name}")
            seen[tensor] = file.name
    for file in sorted(folder.glob("*.safetensors")):
        if file not in taken:
            report.note(f"{file.name} is a weight file that no reader takes")
    index = folder / _INDEX
    if not index.exists():
        report.expect(len(taken) == 1, f"there are {len(taken)} weight files and no {_INDEX} that names them")
    elif [f.name for f in taken] == ["model.safetensors"]:
        report.note(f"{_INDEX} is beside model.safetensors, which readers take in its place")
    else:
        for line in _index_faults(json_object(index), seen, total):
            report.fail(line)


def _index_faults(index: dict[str, Any], seen: dict[str, str], total: int) -> Iterator[str]:
    named = index.get("weight_map")
    if not isinstance(named, dict):
        yield f"{_INDEX} has no weight_map"
        return
    for tensor in sorted(named.keys() | seen.keys()):
        if named.get(tensor) != seen.get(tensor):
            there, said = seen.get(tensor, "no file"), named.get(tensor, "no file")
            yield f"tensor {tensor} is in {there}, {_INDEX} says {said}"
    metadata = index.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if size is not None and size != total:
        yield f"{_INDEX} says {size} bytes in all, there are {total}"


def check_mirror(source: Source, report: Report) -> None:
    """Check that GPTQ's quantize_config.json says what config.json says."""
    file, config = source.path / "quantize_config.json", source.config.get("quantization_config") or {}
    if not file.exists():
        return
    mirrored = json_object(file)
    for key in _MIRRORED:
        if mirrored.get(key) is not None and config.get(key) is not None:
            same = mirrored[key] == config[key]
            report.expect(same, f"quantize_config.json says {key} {mirrored[key]!r}, config.json {config[key]!r}")
