"""What stands beside the weights: config, recipe, records and model card; and the shards joined.

Not here: the weights themselves, which each block adds to the sink as it is finished (block.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__, card
from llmq.checkpoint import Sink
from llmq.finish import finish
from llmq.gguf import imatrix, pipeline
from llmq.job import Job


def publish(job: Job, sink: Sink, record: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """Join the shards, finish them, and write everything else that a runtime or a reader wants.

    tokens: the calibration, int64 `[samples, seq_len]`. Returns quantization.json's content.
    """
    recipe, fmt = job.plan.recipe, job.plan.format
    qconfig = fmt.config(list(job.linears.values()), job.skipped)
    config = job.source.config | {"quantization_config": qconfig}
    if job.head is not None:
        config["tie_word_embeddings"] = False
    sink.copy_files(job.source.path)
    sink.text("config.json", json.dumps(config, indent=2) + "\n")
    if qconfig["quant_method"] == "gptq":
        sink.text("quantize_config.json", json.dumps(qconfig, indent=2) + "\n")
    sink.text("recipe.yaml", recipe.to_yaml())
    total = sink.join()
    summary = _summary(job, total, record)
    if job.plan.finishers:
        where = (sink.stage, job.float_source)
        summary["finished"] = finish(job.plan.finishers, *where, tokens, recipe.seed, job.device)
    sink.text("quantization.json", json.dumps(summary, indent=2) + "\n")
    sink.text("README.md", card.model_card(summary, config))
    return summary


def publish_gguf(job: Job, sink: pipeline.GgufSink, record: dict[str, Any]) -> dict[str, Any]:
    """Write the GGUF file or files from the staged parts. Returns what quantization.json holds for other formats."""
    recipe, plan = job.plan.recipe, job.gguf
    if plan is None:
        raise TypeError("a GGUF sink without a blueprint")
    keys = pipeline.keys(recipe.to_yaml(), record, recipe.imatrix)
    files = sink.write(plan, job.source.origin.name, keys)
    summary = _summary(job, sum(f.stat().st_size for f in files), record)
    return summary | {"files": [f.name for f in files]}


def write_importance(job: Job, sums: Mapping[str, tuple[Tensor, int]]) -> None:
    """Write what the calibration measured as an importance matrix, under ggml's names."""
    recipe, plan = job.plan.recipe, job.gguf
    if plan is None or recipe.imatrix_out is None:
        raise TypeError("no importance matrix was asked for")
    named = {str(plan.architecture.tensor(f"{n}.weight")): entry for n, entry in sums.items()}
    imatrix.write(Path(recipe.imatrix_out), named, recipe.calib, recipe.seq_len)


def _summary(job: Job, total: int, record: dict[str, Any]) -> dict[str, Any]:
    """Return how the run went; `total` is the bytes written."""
    return {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": job.device.type,
        "dtype": str(job.skeleton.dtype).removeprefix("torch."),
        "source": dataclasses.asdict(job.source.origin),
        "recipe": json.loads(json.dumps(dataclasses.asdict(job.plan.recipe))),
        "warnings": job.warnings,
        "size": card.size((job.linears | job.rows).values(), job.plan.format, total, job.source.bytes()),
        "linears": record,
    }
