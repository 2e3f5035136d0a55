"""What stands beside the weights: config, recipe, records and model card; and the shards joined.

Not here: the weights themselves, which each block adds to the sink as it is finished (block.py).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from llmq import __version__, card
from llmq.checkpoint import Sink
from llmq.job import Job


def publish(job: Job, sink: Sink, record: dict[str, Any]) -> dict[str, Any]:
    """Join the shards and write everything else a runtime or a reader wants. Returns quantization.json's content."""
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
    summary = {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": job.device.type,
        "dtype": str(job.skeleton.dtype).removeprefix("torch."),
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "warnings": job.warnings,
        "size": card.size(job.linears.values(), fmt, total, job.source.bytes()),
        "linears": record,
    }
    sink.text("quantization.json", json.dumps(summary, indent=2) + "\n")
    sink.text("README.md", card.model_card(job.source.path.name, summary, config))
    return summary
