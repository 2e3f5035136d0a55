"""The record of an exported folder: what became of its linears, checksums of all that it holds.

Not here: what a target writes beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmq import __version__
from llmq.checkpoint import Sink
from llmq.checkpoint.digest import file_digests, sealed
from llmq.checkpoint.place import EXPORTED
from llmq.export._target import Packed


def close(
    out: Sink, opened: Packed, target: Mapping[str, Any], outcomes: Mapping[str, int], warnings: list[str], **more: Any
) -> dict[str, Any]:
    """Write export.json, which seals all other files of a folder. Returns what the run says.

    target: its options by its name. more: what else the record says.
    """
    files = file_digests(out.stage, out.files())
    record = {
        "llmq": __version__,
        "source": asdict(opened.source.origin),
        "target": target,
        "outcomes": outcomes,
        "warnings": warnings,
        **more,
        "files": files,
        "exported": opened.made,
    }
    out.json(EXPORTED, sealed(record))
    return {
        "outcomes": outcomes,
        "files": [str(out.target(name)) for name in (*files, EXPORTED)],
        "bytes": sum(p.stat().st_size for p in out.files()),
        "warnings": warnings,
    }
