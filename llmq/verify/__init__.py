"""A written checkpoint reopened and judged, by code that shares nothing with the code that wrote it.

    files      every checksum that was recorded at writing; index against shards
    linears    stored as the config says; decoded bit by bit; codes, scales and zeros those that were solved
    floats     there, finite, of the architecture's shapes; nothing left over
    source     (where given) the recorded error found again; what stayed float unchanged but for recorded transforms
    forward    a few tokens through every block: finite, and not all alike

A peer's checkpoint, which has no records, gets all but the comparison with them.
Not here: writing (formats/, gguf/), what the command prints (commands/).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import DECODED, as_floats
from llmq.checkpoint.place import EXPORTED, is_gguf, user_path
from llmq.errors import LlmqError
from llmq.model.adapter import Adapted, Adapter
from llmq.model.skeleton import Skeleton
from llmq.progress import Progress
from llmq.verify import files, record
from llmq.verify.against import Truth
from llmq.verify.folder import Folder
from llmq.verify.forward import walk
from llmq.verify.ggml import Gguf, open_gguf
from llmq.verify.report import Report as Report


@np.errstate(all="ignore")  # what is not finite is found and named
def verify(
    model: str | Path,
    against: str | Path | None = None,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Verify a checkpoint folder, Hub id or GGUF file.

    against: the checkpoint that it was made from; adapter: the LoRA adapter that was added to that one's weights.
    progress: called with blocks done, blocks in all and what is going on.
    Raises LlmqError where there is no such file or folder; what is wrong with one that is there stands in the report.
    """
    one_file = is_gguf(model)
    path = user_path(model) if one_file else resolve(str(model))
    if one_file and not path.is_file():
        raise LlmqError(f"{model} is not a file; give a written .gguf file or a checkpoint folder")
    if not one_file and (path / EXPORTED).is_file():
        return _exported(path, against)
    source = Source(resolve(str(against)), resolve(str(adapter)) if adapter else None) if against else None
    report = Report()
    try:
        found, recorded = open_gguf(path, report) if one_file else _open_folder(path, report)
        truth = _truth(source, recorded, found) if source else None
        walk(found.skeleton, found.names(), truth, report, progress)
        if truth:
            truth.conclude(report)
    except LlmqError as e:
        report.fail(str(e))
    return report


def require_right(staged: Path, against: Path | None = None, progress: Progress | None = None) -> None:
    """Raise LlmqError unless what a run has staged is right: a folder, or the first file of a GGUF model."""
    report = verify(staged, against, progress=progress)
    if not report.passed:
        more = f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else ""
        raise LlmqError(
            f"what was written is not right: {report.failures[0]}{more}: the float model is so itself (`llmq eval SRC` "
            f"tells), or llmq or the disk is at fault; `llmq verify {staged}` lists it all"
        )


def _exported(folder: Path, against: str | Path | None) -> Report:
    """Return whether the files of a model for another runtime (ONNX, ExecuTorch) are as they were written."""
    if against is not None:
        raise LlmqError(
            f"{folder} is no checkpoint that llmq decodes; leave --against out, or verify what it was made of"
        )
    report = Report()
    record.check_files(folder, record.read_record(folder, report).get("files", {}), report)
    report.note("its files are as they were written; that they compute right was checked when they were")
    return report


def _open_folder(folder: Path, report: Report) -> tuple[Folder, dict[str, Any]]:
    recorded = record.read_record(folder, report)
    if "files" in recorded:
        record.check_files(folder, recorded["files"], report)
    source = Source(folder)
    files.check_index(source, report)
    files.check_mirror(source, report)
    if "tensors" in recorded:
        record.check_tensors(source.entries().values(), recorded["tensors"], report)
    found = Folder(source, recorded.get("linears", {}), report)
    found.check_cache(report)
    return found, recorded


def _truth(source: Source, recorded: dict[str, Any], found: Folder | Gguf) -> Truth:
    """Open the source: a float checkpoint, its adapter added, one decoded as it was for the run, or one exported."""
    made = recorded.get("source")
    added = made.get("adapter") if isinstance(made, dict) else None
    if bool(added) != (source.adapter is not None):
        name = added.get("name") if isinstance(added, dict) else added
        raise LlmqError(f"made with the adapter {name}; give it with --adapter" if added else "made without an adapter")
    if "decoded" in recorded:
        said = recorded["decoded"]
        as_floats(source, DECODED.get(str(said.get("dtype"))) if isinstance(said, dict) else None)
    packed = source.quantization is not None
    skeleton = Folder(source, {}, Report()).skeleton if packed else Skeleton(source, torch.float32)
    if source.adapter is not None and not packed:
        skeleton.source = Adapted(skeleton, Adapter(source.adapter))
    shifted, plain = (found.shifted, True) if isinstance(found, Gguf) else ((), False)
    return Truth(skeleton, recorded, found.packed, shifted, plain=plain)
