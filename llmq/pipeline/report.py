"""What stands beside the weights: config, recipe, record and model card; and the shards joined.

First what makes a checkpoint that loads, which finishers then train (whole_model.py); last the record of what became of
it. Not here: the weights themselves, which each block adds to the sink as it is finished (block.py), what is measured
of them (records.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__, registry
from llmq.checkpoint import Sink
from llmq.checkpoint.digest import digest, file_digest, sealed
from llmq.gguf import imatrix, pipeline
from llmq.pipeline import card
from llmq.pipeline.plan import Job
from llmq.pipeline.records import Record


def publish_model(job: Job, sink: Sink) -> int:
    """Join the shards and write what makes them a checkpoint that loads. Returns the bytes of its tensors."""
    config = _config(job)
    sink.copy_files(job.source.path)
    sink.text("config.json", json.dumps(config, indent=2) + "\n")
    if config["quantization_config"]["quant_method"] == "gptq":
        sink.text("quantize_config.json", json.dumps(config["quantization_config"], indent=2) + "\n")
    sink.text("recipe.yaml", job.plan.recipe.to_yaml())
    return sink.join()


def publish_record(job: Job, sink: Sink, record: Record, total: int) -> dict[str, Any]:
    """Write what a reader wants: the model card, and the record, which seals all other files. Returns the record."""
    summary = _summary(job, total, record, sink.digests)
    sink.text("README.md", card.model_card(summary, _config(job)))
    files = {p.relative_to(sink.stage).as_posix(): file_digest(p) for p in sink.files()}
    summary = sealed(summary | {"files": files})
    sink.text("quantization.json", json.dumps(summary, indent=2) + "\n")
    return summary


def publish_gguf(job: Job, sink: pipeline.GgufSink, record: Record) -> dict[str, Any]:
    """Write the GGUF file or files from the staged parts, the record within. Returns it with the names of the files."""
    plan = job.gguf
    if plan is None:
        raise TypeError("a GGUF sink without a blueprint")
    digests, total = {}, 0
    for name, tensor in sink.contents(plan):
        digests[name] = digest(tensor)
        total += tensor.nbytes
    name, keys = job.source.origin.name, pipeline.keys(job.plan.recipe)
    summary = _summary(job, total, record, digests)
    report = json.dumps(sealed(summary), separators=(",", ":"))
    files = sink.write(plan, name, keys | {pipeline.REPORT: report})
    summary["size"]["bytes"] = sum(f.stat().st_size for f in files)
    return summary | {"files": [f.name for f in files]}


def write_importance(job: Job, file: Path, sums: Mapping[str, tuple[Tensor, int]]) -> None:
    """Write what the calibration measured as an importance matrix, under ggml's names."""
    recipe, plan = job.plan.recipe, job.gguf
    if plan is None:
        raise TypeError("no importance matrix was asked for")
    named = {str(plan.architecture.tensor(f"{n}.weight")): entry for n, entry in sums.items()}
    imatrix.write(file, named, recipe.calib, recipe.seq_len)


def _config(job: Job) -> dict[str, Any]:
    """Return config.json of the quantized checkpoint."""
    quantization = job.plan.format.config(list(job.linears.values()), job.skipped)
    untied = {} if job.head is None else {"tie_word_embeddings": False}
    return job.source.config | {"quantization_config": quantization} | untied


def _summary(job: Job, total: int, record: Record, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return how the run went; total: the bytes of all tensors, digests: their checksums."""
    return {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": job.device.type,
        "dtype": str(job.skeleton.dtype).removeprefix("torch."),
        "source": dataclasses.asdict(job.source.origin),
        "recipe": json.loads(json.dumps(dataclasses.asdict(job.plan.recipe))),
        "warnings": job.warnings,
        "size": card.size((job.linears | job.rows).values(), job.plan.format, total, job.source.bytes()),
        "linears": record.linears,
        "transforms": [*({"step": registry.dump(r)} for r in job.plan.rotations), *(f.to_json() for f in record.folds)],
        "finished": record.finished,
        "tuned": record.tuned,
        "tensors": dict(digests),
    }
