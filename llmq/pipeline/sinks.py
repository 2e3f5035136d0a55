"""Which sink a run writes to, and what it tells the sink: what is read, and by what the same command is known again.

Not here: how OUT is written (checkpoint/sink.py, gguf/pipeline.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq.checkpoint import Sink
from llmq.checkpoint.place import user_path
from llmq.checkpoint.stage import fingerprint, look
from llmq.gguf.pipeline import GgufSink
from llmq.pipeline.plan import Plan
from llmq.recipe import Recipe

IMATRIX = "imatrix"
"""By what name the sink knows the importance matrix that --imatrix-out asks for."""


def refuse(recipe: Recipe, src: str, adapter: str | None, out: Path, *, overwrite: bool) -> None:
    """Raise LlmqError for all that can be said against OUT before SRC is fetched or read."""
    given = {"SRC": src} | ({"--adapter": adapter} if adapter else {})
    local = {what: path for what, name in given.items() if (path := user_path(name)).is_dir()}
    _sink(recipe, out, overwrite, local, None)


def sink_of(plan: Plan, out: Path, *, overwrite: bool) -> Sink:
    """Return what a plan writes to. Raises LlmqError where OUT cannot be written."""
    return _sink(plan.method.recipe, out, overwrite, _reads(plan), _run(plan))


def _sink(recipe: Recipe, out: Path, overwrite: bool, reads: dict[str, Path], run: Mapping[str, Any] | None) -> Sink:
    sink_class = GgufSink if recipe.gguf else Sink
    more = {"--imatrix": user_path(recipe.imatrix)} if recipe.imatrix else {}
    beside = {IMATRIX: user_path(recipe.imatrix_out)} if recipe.imatrix_out else {}
    return sink_class(out, overwrite=overwrite, reads=reads | more, run=run, beside=beside)


def _reads(plan: Plan) -> dict[str, Path]:
    adapter = plan.source.adapter
    return {"SRC": plan.source.path} | ({"--adapter": adapter} if adapter else {})


def _run(plan: Plan) -> dict[str, Any]:
    recipe = dataclasses.asdict(plan.method.recipe)
    files = {f"{n} file": look(user_path(recipe[n])) for n in ("calib", "imatrix") if recipe[n]}
    folders = {what: fingerprint(folder) for what, folder in _reads(plan).items()}
    return {"command": "quantize", "device": str(plan.device)} | folders | recipe | files
