"""The record of an exported folder: what became of its linears, checksums of all that it holds; and its model card.

Not here: what a target writes beside it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmq import __version__
from llmq.checkpoint import Sink
from llmq.checkpoint.card import export_card
from llmq.checkpoint.digest import file_digests, sealed
from llmq.checkpoint.hub_metadata import CARD
from llmq.checkpoint.place import EXPORTED
from llmq.export._target import Packed
from llmq.readers import table


def close(
    out: Sink,
    opened: Packed,
    target: Mapping[str, Any],
    outcomes: Mapping[str, int],
    warnings: list[str],
    read_by: tuple[str, ...],
    **more: Any,
) -> dict[str, Any]:
    """Write the model card, and export.json, which seals all other files of a folder. Returns what the run says.

    target: its options by its name. read_by: the runtimes that it is for. more: what else the record says.
    """
    _write_card(out, opened, next(iter(target)), outcomes, read_by)
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


def _write_card(out: Sink, opened: Packed, target: str, outcomes: Mapping[str, int], read_by: tuple[str, ...]) -> None:
    export = {"llmq": __version__, "from": opened.method, "to": target, "outcomes": outcomes}
    size = {"bytes": sum(p.stat().st_size for p in out.files())}
    record = {"export": export, "source": asdict(opened.source.origin), "size": size}
    rows = table(*((name, True, "", "ran") for name in read_by))
    out.text(CARD, export_card(record, target, opened.source.config, opened.card, rows, EXPORTED))
