"""The record of a run, as it stands in quantization.json or within a GGUF file, and the importance matrix beside it.

Not here: where the record is written (formats/), what is measured of a linear (records.py).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__, blend, registry
from llmq.format import packed_bytes
from llmq.pipeline.experts import described, number
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Record
from llmq.pipeline.trouble import summed
from llmq.recipe import Recipe
from llmq.stats import MeanSquare


def write_importance(plan: Plan, file: Path, measured: Mapping[str, MeanSquare]) -> None:
    """Write what the calibration measured as an importance matrix, under ggml's names."""
    from llmq.gguf import imatrix

    recipe, assigned = plan.method.recipe, plan.assigned
    sums: dict[str, list[tuple[Tensor, int]]] = {}
    known = dict.fromkeys((*measured, *plan.matrices, *plan.model.linears))  # floats too, and experts without tokens
    for name in sorted(known, key=number):
        count = measured[name].number("count") if name in measured else 0
        total = measured[name].whole("sum") if count else torch.zeros(plan.model.shapes[plan.weight_of(name)][1])
        sums.setdefault(assigned.names[f"{name}.weight"], []).append((assigned.channels(name, total), count))
    sums = {name: several for name, several in sums.items() if any(n for _, n in several)}
    imatrix.write(file, sums, list(blend.parted(recipe.calib)), recipe.seq_len)


def _shares(recipe: Recipe) -> dict[str, Any]:
    """Return what each of several calibration texts gave; nothing of one."""
    parts = blend.dealt(recipe.calib, recipe.samples or 0)
    of = [{"source": p.source, "samples": p.samples, "share": p.samples / recipe.samples} for p in parts]
    return {"calibration": of} if len(parts) > 1 else {}


def _size(plan: Plan, total: int) -> dict[str, Any]:
    """Return the bytes of the file before and after, and the bits per quantized weight, scales and zeros counted."""
    specs = plan.matrices.values()
    weights, packed = sum(s.N * s.K for s in specs), sum(packed_bytes(plan.method.format, s) for s in specs)
    return {
        "float_bytes": plan.source.bytes(),
        "bytes": total,
        "quantized_weights": weights,
        "bits_per_weight": round(8 * packed / weights, 4) if weights else None,
    }


def _experts(plan: Plan, record: Record) -> dict[str, Any]:
    """Return how the tokens fell on experts; `few` are those of fewer than the input has columns."""
    return described(record.experts, plan.skeleton.text.hidden_size, every=plan.method.recipe.experts == "all")


def _trouble(record: Record) -> dict[str, Any]:
    found = summed(record.linears)
    return {"trouble": found} if found else {}


def summary(plan: Plan, record: Record, total: int, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return how the run went; total: the bytes of all tensors, digests: their checksums."""
    return {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": plan.device.type,
        "dtype": str(plan.skeleton.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "source": dataclasses.asdict(plan.source.origin),
        **({"decoded": plan.source.decoded} if plan.source.decoded else {}),
        "recipe": plan.method.recipe.to_json(),
        **_shares(plan.method.recipe),
        "warnings": plan.warnings,
        "size": _size(plan, total),
        "linears": record.linears,
        **_trouble(record),
        "untouched": plan.beside,
        **({"experts": _experts(plan, record)} if record.experts else {}),
        "transforms": [
            *({"step": registry.dump(r)} for r in plan.method.rotations),
            *(f.to_json() for f in record.folds),
        ],
        **({"activations": record.activations} if record.activations else {}),
        "finished": record.finished,
        "tuned": record.tuned,
        "tensors": dict(digests),
    }
