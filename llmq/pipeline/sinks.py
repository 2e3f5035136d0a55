"""Which sink a run writes to, and what it tells the sink: what is read, and by what the same command is known again.

Not here: how OUT is written (checkpoint/sink.py, gguf/sink.py).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmq import __version__, blend, registry
from llmq.checkpoint import Sink
from llmq.checkpoint.journal import finished
from llmq.checkpoint.place import one_file, user_path
from llmq.checkpoint.stage import JOURNAL, fingerprint, look
from llmq.errors import LlmqError
from llmq.pipeline.plan import Plan
from llmq.recipe import Recipe

IMATRIX = "imatrix"
"""By what name the sink knows the importance matrix that --imatrix-out asks for."""


def refuse(recipe: Recipe, src: str, adapter: str | None, out: Path, *, overwrite: bool) -> None:
    """Raise LlmqError for all that can be said against OUT before SRC is fetched or read."""
    given = {"SRC": src} | ({"--adapter": adapter} if adapter else {})
    local = {what: path for what, name in given.items() if (path := user_path(name)).is_dir()}
    form = registry.find("formats", recipe.resolved().format.partition(":")[0], code=True)
    _sink(form, recipe, out, overwrite=overwrite, reads=local)


def left(plan: Plan, out: Path, *, overwrite: bool) -> str | None:
    """Return what an earlier run of this very command left beside OUT, in words, None where it left nothing.

    Raises LlmqError where OUT cannot be written, which a run of another command may be the reason of.
    """
    sink = sink_of(plan, out, overwrite=overwrite)
    if sink.left is None:
        return None
    if sink.left.state(sink.target) != "unfinished":
        return f"at its end: the whole result in {sink.left} is put in place"
    return f"from {where(finished(sink.left.folder / JOURNAL), len(plan.skeleton))}, in {sink.left}"


def where(steps: int, blocks: int) -> str:
    """Return how far a run is that has finished so many steps."""
    return f"block {steps} of {blocks}" if steps < blocks else f"behind the last of {blocks} blocks"


def sink_of(plan: Plan, out: Path, *, overwrite: bool) -> Sink:
    """Return what a plan writes to. Raises LlmqError where OUT cannot be written."""
    form, recipe = plan.method.format, plan.method.recipe
    return _sink(form, recipe, out, overwrite=overwrite, reads=_reads(plan), run=identity(plan))


def _sink(form: Any, recipe: Recipe, out: Path, *, reads: dict[str, Path], **more: Any) -> Sink:
    if one_file(out) and not recipe.gguf:
        raise LlmqError(
            f"{out} ends in .gguf, by which llama.cpp's tools know its files, but --format {recipe.resolved().format} "
            "writes a folder; leave --format out to write GGUF, or name a folder"
        )
    read = {"--imatrix": user_path(recipe.imatrix)} if recipe.imatrix else {}
    beside = {IMATRIX: user_path(recipe.imatrix_out)} if recipe.imatrix_out else {}
    sink: Sink = form.sink(out, reads=reads | read, beside=beside, **more)
    return sink


def _reads(plan: Plan) -> dict[str, Path]:
    adapter = plan.source.adapter
    return {"SRC": plan.source.path} | ({"--adapter": adapter} if adapter else {})


def _texts(calib: str | tuple[str, ...] | None) -> Iterator[tuple[str, str]]:
    """Yield the calibration's sources by what the file of a run calls each."""
    sources = list(blend.parted(calib))
    yield from ((f"calib file {s}" if len(sources) > 1 else "calib file", s) for s in sources)


def identity(plan: Plan) -> dict[str, Any]:
    """Return what tells a run from others: recipe, files that are read by size and time, versions, device, dtype."""
    recipe = dataclasses.asdict(plan.method.recipe)
    named = [*_texts(recipe["calib"]), *([("imatrix file", recipe["imatrix"])] if recipe["imatrix"] else [])]
    read = {name: user_path(file) for name, file in named}
    files = {what: fingerprint(path) if path.is_dir() else look(path) for what, path in read.items()}
    folders = {what: fingerprint(folder) for what, folder in _reads(plan).items()}
    made_by = {"llmq": __version__, "torch": str(torch.__version__)}
    computed = {"device": str(plan.device), "dtype": str(plan.skeleton.dtype)}
    return {"command": "quantize"} | made_by | folders | recipe | computed | files
