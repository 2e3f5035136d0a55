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
from typing import Any, cast

import torch

from llmq import __version__, registry
from llmq.checkpoint import Sink
from llmq.checkpoint.digest import digest, file_digest, sealed
from llmq.gguf import imatrix, pipeline
from llmq.pipeline import card
from llmq.pipeline.plan import Plan, packed_bytes
from llmq.pipeline.records import Record
from llmq.stats import MeanSquare


def publish_model(plan: Plan, sink: Sink) -> int:
    """Join the shards and write what makes them a checkpoint that loads. Returns the bytes of its tensors."""
    config = _config(plan)
    sink.copy_files(plan.source.path)
    sink.text("config.json", json.dumps(config, indent=2) + "\n")
    if config["quantization_config"]["quant_method"] == "gptq":
        sink.text("quantize_config.json", json.dumps(config["quantization_config"], indent=2) + "\n")
    sink.text("recipe.yaml", plan.method.recipe.to_yaml())
    return sink.join()


def publish_record(plan: Plan, sink: Sink, record: Record, total: int) -> dict[str, Any]:
    """Write what a reader wants: the model card, and the record, which seals all other files. Returns the record."""
    summary = _summary(plan, total, record, sink.digests)
    sink.text("README.md", card.model_card(summary, _config(plan)))
    files = {p.relative_to(sink.stage).as_posix(): file_digest(p) for p in sink.files()}
    summary = sealed(summary | {"files": files})
    sink.text("quantization.json", json.dumps(summary, indent=2) + "\n")
    return summary


def publish_gguf(plan: Plan, sink: pipeline.GgufSink, record: Record) -> dict[str, Any]:
    """Write the GGUF file or files from the staged parts, the record within. Returns it with the names of the files."""
    file: Any = plan.assigned
    layout = file.blueprint
    digests, total = {}, 0
    for name, tensor in sink.contents(layout):
        digests[name] = digest(tensor)
        total += tensor.nbytes
    name, keys = plan.source.origin.name, pipeline.keys(plan.method.recipe)
    summary = _summary(plan, total, record, digests)
    report = json.dumps(sealed(summary), separators=(",", ":"))
    files = sink.write(layout, name, keys | {pipeline.REPORT: report})
    summary["size"]["bytes"] = sum(f.stat().st_size for f in files)
    return summary | {"files": [f.name for f in files]}


def write_importance(plan: Plan, file: Path, measured: Mapping[str, MeanSquare]) -> None:
    """Write what the calibration measured as an importance matrix, under ggml's names."""
    recipe, layout = plan.method.recipe, cast(Any, plan.assigned)
    named = {
        str(layout.architecture.tensor(f"{n}.weight")): (m.whole("sum"), m.number("count")) for n, m in measured.items()
    }
    imatrix.write(file, named, recipe.calib, recipe.seq_len)


def _config(plan: Plan) -> dict[str, Any]:
    """Return config.json of the quantized checkpoint."""
    quantization = plan.method.format.config(list(plan.linears.values()), plan.skipped)
    untied = {} if plan.head is None else {"tie_word_embeddings": False}
    return plan.source.config | {"quantization_config": quantization} | untied


def _size(plan: Plan, total: int) -> dict[str, Any]:
    """Return the bytes of the file before and after, and the bits per quantized weight, scales and zeros counted."""
    specs = (plan.linears | plan.rows).values()
    weights, packed = sum(s.N * s.K for s in specs), sum(packed_bytes(plan.method.format, s) for s in specs)
    return {
        "float_bytes": plan.source.bytes(),
        "bytes": total,
        "quantized_weights": weights,
        "bits_per_weight": round(8 * packed / weights, 4) if weights else None,
    }


def _summary(plan: Plan, total: int, record: Record, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return how the run went; total: the bytes of all tensors, digests: their checksums."""
    return {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": plan.device.type,
        "dtype": str(plan.skeleton.dtype).removeprefix("torch."),
        "source": dataclasses.asdict(plan.source.origin),
        "recipe": json.loads(json.dumps(dataclasses.asdict(plan.method.recipe))),
        "warnings": plan.warnings,
        "size": _size(plan, total),
        "linears": record.linears,
        "transforms": [
            *({"step": registry.dump(r)} for r in plan.method.rotations),
            *(f.to_json() for f in record.folds),
        ],
        "finished": record.finished,
        "tuned": record.tuned,
        "tensors": dict(digests),
    }
